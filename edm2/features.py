"""Image sets -> features of Inception-v3 or DINOv2, or the pixels themselves."""

import json
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d
from torch.nn.utils.fusion import fuse_conv_bn_eval
from edm2 import data, distributed, files
from edm2.errors import UserError

# {name: (address, SHA-256)}. Inception-v3 is the TF port of every published FID.
WEIGHTS = {
    "inception": ("https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
                  "weights-inception-2015-12-05-6726825d.pth",
                  "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"),
    "dinov2-vit-b-14": (
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
        "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73")}
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}

class ImageSet:
    """Images (N,C,H,W) uint8 of one size, or paths; gray ones get the channels of the first."""
    def __init__(self, name, items, limit=None):
        self.name, self.items, self.shape = name, items[:limit], None
        if not len(self.items):
            raise UserError(f"{name}: there are no images")
        self.shape = self.read(0).shape

    def read(self, i):
        """Image i, (C,H,W) uint8. Raises UserError naming a damaged or differently sized file."""
        item = self.items[i]
        image = data.decode_image(item) if isinstance(item, Path) else np.asarray(item)
        if self.shape and len(image) < self.shape[0]:
            image = image.repeat(3, 0)
        if image.shape != (self.shape or image.shape):
            raise UserError(f"{item} has channels, height and width {list(image.shape)}, but the "
                            f"first image {list(self.shape)}")
        return image

    def batches(self, indices, size):
        """Yield up to `size` of the indices at a time and their images, (size,C,H,W) uint8: the
        last one fills the batch, as rounding depends on the size."""
        with ThreadPoolExecutor(distributed.cores()) as pool:
            for start in range(0, len(indices), size):
                part = indices[start:start + size]
                images = list(pool.map(self.read, part))
                yield part, torch.from_numpy(np.stack(images + images[-1:] * (size - len(part))))

def samples_folder(config, epoch, variant="", sigma_rel=None):
    """The folder of the images that sample.py makes from the checkpoint of `epoch`."""
    length = "" if sigma_rel is None else f"_sigma_rel{sigma_rel:g}"
    return Path(config.save_dir) / "samples" / f"{epoch}{length}{variant}"

def read_settings(folder):
    """What sample.py wrote about a folder's images, {} where that is missing or damaged."""
    try:
        return dict(json.loads((Path(folder) / "settings.json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}

class Extractor:
    """images (B,C,H,W) uint8 -> features (B,d) float32 and, of Inception, logits (B,1008).
    name: inception, dinov2-vit-b-14 or pixels. weights, weights_sha256: a file of other weights."""
    def __init__(self, name, device, weights=None, weights_sha256=None):
        self.name, self.device, self.sha256 = name, device, None
        self.label, self.version, self.network = "pixels", "1", pixels
        if name != "pixels":
            with distributed.rank0_first():     # Downloads; torch.hub fetches DINOv2's code.
                path, self.sha256 = find_weights(name, weights, weights_sha256)
                network = load_network(name, path)
            self.network = network.to(device, memory_format=torch.channels_last)
            self.label = name.partition("-")[0]
            self.label += f"-{self.sha256[:8]}" if self.sha256 != WEIGHTS[name][1] else ""
            self.version = "folded, " * (name == "inception")
            self.version += f"torch-fidelity {metadata.version('torch-fidelity')}"

    @torch.inference_mode()
    def __call__(self, images):
        images = images.to(self.device)
        if self.name != "pixels" and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        # Full precision: the score is compared with other people's.
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
            return self.network(images)

    def metric(self, name):
        """FID, or KID, where the features are Inception's; else such as FD(pixels)."""
        return name if self.label == "inception" else f"{name.replace('ID', 'D')}({self.label})"

def pixels(images):
    """The pixels in [-1,1], flattened, (B,d); images above 32x32 are averaged down to that."""
    size = [min(side, 32) for side in images.shape[2:]]
    return (adaptive_avg_pool2d(data.to_float(images), size).flatten(1),)

def find_weights(name, path=None, expected=None):
    """A network's weights, `path` or in torch's hub cache, where they are downloaded, and their
    SHA-256. Raises UserError where that is not `expected` (default: the published one)."""
    (url, published), path = WEIGHTS[name], path and Path(path)
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    same = cached.with_name(cached.name.replace("weights-", "pt_"))     # As pytorch-fid names it.
    try:
        if path is None and not (cached.exists() or same.exists()):
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, cached, hash_prefix=published, progress=False)
        path = path or (cached if cached.exists() else same)
        found = files.sha256(path)
    except Exception as e:                  # urllib's, http's and torch's errors.
        raise UserError(f"cannot read the weights {path or cached} ({e}): download {url} (SHA-256 "
                        f"{published}) to there, or take --features pixels") from None
    if found != (expected or published).lower():
        raise UserError(f"{path} has SHA-256 {found}, not {expected or published}: take {url}")
    return path, found

def load_network(name, path):
    """torch-fidelity's extractor. Raises UserError where it cannot be loaded."""
    try:
        if name != "inception":
            from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2
            return FeatureExtractorDinoV2(name, ["dinov2"])
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        torch.load(path, weights_only=True)     # Refuses code, which torch-fidelity would run.
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"],
                                              feature_extractor_weights_path=str(path))
        for m in network.modules():     # Batch norms of fixed statistics: part of convolutions.
            if hasattr(m, "conv") and hasattr(m, "bn"):
                m.conv, m.bn = fuse_conv_bn_eval(m.conv, m.bn), torch.nn.Identity()
        return network
    except Exception as e:              # The unpickler and torch.hub raise what they are led to.
        raise UserError(f"cannot load {name} from {path}: {str(e).partition(chr(10))[0]}") from None
