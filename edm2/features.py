"""Image sets -> features of Inception-v3 or DINOv2, or the pixels themselves."""

import json
import os
import re
from importlib import metadata
from itertools import islice
from pathlib import Path
import numpy as np
import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate
from torch.nn.utils.fusion import fuse_conv_bn_eval
from edm2 import data, distributed, files
from edm2.errors import UserError, warn
from edm2.image_files import decode_all, decode_image, is_gray, some

class ImageSet:
    """Images (N,C,H,W) uint8, or paths of images of one size: RGB where one of them has colours.
    Raises UserError, with the number and the first names, for those that cannot be taken."""
    def __init__(self, name, items, limit=None):
        self.name, self.items, self.shape = name, items[:limit], None
        if not len(self.items):
            raise UserError(f"{name}: there are no images")
        self.channels = 1 if isinstance(items, list) and all(map(is_gray, self.items)) else 3
        self.first = next(decode_all(self.items, self.read))
        self.shape = self.first.shape

    def read(self, item):
        """An image, (C,H,W) uint8. Raises UserError naming a damaged or differently sized file."""
        image = decode_image(item, self.channels) if isinstance(item, Path) else np.asarray(item)
        if image.shape != (self.shape or image.shape):
            raise UserError(f"{item} is {list(image.shape)}, the first image {list(self.shape)}")
        return image

    def batches(self, indices, size):
        """Yield up to `size` of the indices at a time and their images, (size,C,H,W) uint8: the
        last one fills the batch, as rounding depends on the size."""
        images = decode_all([self.items[i] for i in indices], self.read)
        for start in range(0, len(indices), size):
            part = indices[start:start + size]
            found = list(islice(images, len(part)))
            yield part, torch.from_numpy(np.stack(found + found[-1:] * (size - len(part))))

def open_samples(folder, numbers):
    """The ImageSet of sample.py's images of these numbers; what else lies there is named."""
    paths = [sample_path(folder, i) for i in numbers]
    strays = [p.name for p in paths[0].parent.iterdir() if not re.match(r"\d{6,}\.png$|\.", p.name)]
    if strays and distributed.rank() == 0:
        warn(f"{paths[0].parent}: {some(strays)} left out: not written by sample.py")
    return ImageSet(str(folder), paths)

def sample_path(folder, i):
    """The file of image i in a folder of sample.py."""
    return Path(folder) / "images" / f"{i:06d}.png"

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
    name: of NETWORKS, or pixels. weights, weights_sha256: a file of other weights."""
    def __init__(self, name, device, weights=None, weights_sha256=None):
        self.name, self.device, self.sha256 = name, device, None
        self.label, self.version, self.network = "pixels", "1", pixels
        if name != "pixels":
            with distributed.rank0_first():     # Downloads; torch.hub fetches DINOv2's code.
                path, self.sha256 = find_weights(name, weights, weights_sha256)
                try:
                    network = NETWORKS[name][2](path)
                except Exception as e:      # The unpickler and torch.hub raise many kinds.
                    raise UserError(f"cannot load {name} from {path}: {str(e)[:300]}") from None
            self.network = network.to(device, memory_format=torch.channels_last)
            self.label, published = name, NETWORKS[name][1]
            self.label += f"-{self.sha256[:8]}" if self.sha256 != (published or self.sha256) else ""
            self.version = f"folded, torch-fidelity {metadata.version('torch-fidelity')}"

    @torch.inference_mode()
    def __call__(self, images):
        images = images.to(self.device)
        if self.name != "pixels" and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        # Full precision: the score is compared with other people's.
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
            return self.network(images)

    def metric(self, name):
        """FID, or KID, where the features are Inception's; else FD_DINOv2, or as FD(pixels)."""
        name = name if self.label == "inception" else name.replace("ID", "D")
        return name + {"inception": "", "dinov2": "_DINOv2"}.get(self.label, f"({self.label})")

def pixels(images):
    """The pixels in [-1,1], flattened, (B,d); images above 32x32 are averaged down to that."""
    size = [min(side, 32) for side in images.shape[2:]]
    return (adaptive_avg_pool2d(data.to_float(images), size).flatten(1),)

class DINOv2(nn.Module):
    """Images (B,3,H,W) uint8 -> the class token (B,1024) of DINOv2 ViT-L/14, for FD_DINOv2 (Stein
    et al., arXiv 2306.04675): at 224x224, bicubic with antialiasing and rounded as Pillow does."""
    def __init__(self, network):
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    def forward(self, images):
        x = interpolate(images.float(), (224, 224), mode="bicubic", antialias=True)
        mean, std = (x.new_tensor(values)[:, None, None]        # ImageNet's.
                     for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        return (self.network((x.round().clamp(0, 255) / 255 - mean) / std),)

def find_weights(name, path=None, expected=None):
    """A network's weights, `path` or in torch's hub cache, where they are downloaded, and their
    SHA-256. Raises UserError where that is not `expected` (default: the published one)."""
    (url, published, _), path = NETWORKS[name], path and Path(path)
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
                        f"{published or 'unknown'}) to there, or take --features pixels") from None
    if found != (expected or published or found).lower():
        raise UserError(f"{path} has SHA-256 {found}, not {expected or published}: take {url}")
    return path, found

def load_inception(path):
    """torch-fidelity's Inception-v3, with weights of a file."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    torch.load(path, weights_only=True)     # Refuses code, which torch-fidelity would run.
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"],
                                          feature_extractor_weights_path=str(path))
    for m in network.modules():     # Batch norms of fixed statistics: part of convolutions.
        if hasattr(m, "conv") and hasattr(m, "bn"):
            m.conv, m.bn = fuse_conv_bn_eval(m.conv, m.bn), nn.Identity()
    return network

def load_dinov2(path):
    """DINOv2, whose code torch.hub fetches, with weights of a file."""
    os.environ["XFORMERS_DISABLED"] = "1"       # In full precision, everywhere the same.
    network = torch.hub.load("facebookresearch/dinov2", "dinov2_vitl14", pretrained=False,
                             trust_repo=True, verbose=False)
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return DINOv2(network)

# {name: (address of the weights, their SHA-256, what makes the network of a file of them)}; others
# can be added (benchmarks/judge.py). Inception-v3 is the TF port of every published FID; of
# DINOv2's weights no SHA-256 is published, so that which they were is recorded beside the score.
NETWORKS = {
    "inception": ("https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
                  "weights-inception-2015-12-05-6726825d.pth",
                  "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
                  load_inception),
    "dinov2": ("https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
               None, load_dinov2)}
