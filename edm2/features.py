"""Image sets -> features of Inception-v3 or DINOv2, or the pixels themselves."""

import os
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d
from torch.nn.utils.fusion import fuse_conv_bn_eval

from edm2.data import decode_image, read_npz, to_float
from edm2.distributed import cores, rank0_first
from edm2.errors import UserError
from edm2.files import sha256

# name: (files in torch's hub cache, address, SHA-256, label). Inception-v3 is the TF port of every
# published FID; pytorch-fid has the same file under the second name.
FID_FILE = "inception-2015-12-05-6726825d.pth"
WEIGHTS = {
    "inception": ([f"weights-{FID_FILE}", f"pt_{FID_FILE}"], "https://github.com/toshas/"
                  f"torch-fidelity/releases/download/v0.2.0/weights-{FID_FILE}",
                  "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2", "inception"),
    "dinov2-vit-b-14": (["dinov2_vitb14_pretrain.pth"], "https://dl.fbaipublicfiles.com/dinov2/"
                        "dinov2_vitb14/dinov2_vitb14_pretrain.pth",
                        "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
                        "dinov2")}
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


class ImageSet:
    """n images of one size: an array or tensor (N,C,H,W) uint8, or a list of paths, read when asked
    for; gray ones have the channels of the first."""

    def __init__(self, name, items, limit=None):
        self.name, self.items, self.n = name, items, len(items[:limit])
        if not self.n:
            raise UserError(f"{name}: there are no images")
        self.shape = self.open(0).shape

    def open(self, i):
        """Image i as it is."""
        return decode_image(self.items[i], remedy="remove it; if sample.py made it, run that again"
                            ) if isinstance(self.items, list) else np.asarray(self.items[i])

    def read(self, i):
        """Image i, (C,H,W) uint8. Raises UserError naming a damaged or differently sized file."""
        image = self.open(i)
        image = image.repeat(3, 0) if len(image) < self.shape[0] else image
        if image.shape != self.shape:
            raise UserError(f"{self.items[i]} is an image of channels, height and width "
                            f"{list(image.shape)}, but the first is one of {list(self.shape)}")
        return image

    def batches(self, indices, size):
        """The images number `indices`, in batches (B,C,H,W) uint8."""
        with ThreadPoolExecutor(cores()) as pool:
            for start in range(0, len(indices), size):
                batch = list(pool.map(self.read, indices[start:start + size]))
                yield torch.from_numpy(np.stack(batch))


def samples_folder(config, epoch, variant="", sigma_rel=None):
    """The folder of the images that sample.py makes from the checkpoint of `epoch`."""
    length = "" if sigma_rel is None else f"_sigma_rel{sigma_rel:g}"
    return Path(config.save_dir) / "samples" / f"{epoch}{length}{variant}"


def image_files(folder):
    """The image files of a folder, by name; [] where there is no such folder."""
    return sorted(path for path in (Path(folder).iterdir() if Path(folder).is_dir() else ())
                  if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))


def open_images(path, limit=None):
    """The ImageSet of a folder, of one that sample.py made, or of an .npz; of an .npz of statistics
    its arrays. Raises UserError where it is none of these."""
    folder = Path(path)
    if folder.is_dir():
        made = (folder / "settings.json").exists() and (folder / "images").is_dir()
        return ImageSet(str(path), image_files(folder / "images" if made else folder), limit)
    arrays = read_npz(path)
    if {"mu", "sigma"} <= set(arrays):
        return arrays
    images = [a for a in arrays.values()
              if a.dtype == np.uint8 and a.ndim == 4 and {1, 3} & {a.shape[1], a.shape[3]}]
    if len(images) != 1:
        held = ", ".join(f"{name} {a.dtype} {list(a.shape)}" for name, a in arrays.items())
        raise UserError(f"{path} holds {held or 'nothing'}: expected one uint8 array of images "
                        f"(N,H,W,C), or statistics mu (d,) and sigma (d,d)")
    last = images[0].shape[3] in (1, 3)
    return ImageSet(str(path), images[0].transpose(0, 3, 1, 2) if last else images[0], limit)


class Extractor:
    """images (B,C,H,W) uint8 -> [features (B,d) float32, and Inception's logits where asked for].

    name: inception, dinov2-vit-b-14 or pixels. weights, weights_sha256: a file of other weights.
    """

    def __init__(self, name, device, weights=None, weights_sha256=None, logits=False):
        self.name, self.device, self.sha256, self.weights = name, device, None, weights
        self.label, self.version, self.network = "pixels", "1", pixels
        if name != "pixels":
            with rank0_first():             # Downloads, and torch.hub fetches DINOv2's code.
                self.weights, self.sha256 = find_weights(name, weights, weights_sha256)
                network = load_network(name, self.weights, logits)
            published, label = WEIGHTS[name][2:]
            self.label = label if self.sha256 == published else f"{label}-{self.sha256[:8]}"
            self.version = f"torch-fidelity {metadata.version('torch-fidelity')}"
            self.version = "folded, " * (name == "inception") + self.version
            self.network = network.to(device, memory_format=torch.channels_last)

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
        short = name.replace("FID", "FD").replace("KID", "KD")
        return name if self.label == "inception" else f"{short}({self.label})"


def pixels(images):
    """The pixels in [-1,1], flattened, (B,d); images above 32x32 are averaged down to that."""
    size = [min(side, 32) for side in images.shape[2:]]
    return (adaptive_avg_pool2d(to_float(images), size).flatten(1),)


def find_weights(name, path=None, expected=None):
    """A network's weights, `path` or the file of torch's hub cache, downloaded where it is missing,
    and its SHA-256. Raises UserError where that is not `expected` (default: the published one)."""
    names, url, published, _ = WEIGHTS[name]
    cached = [Path(torch.hub.get_dir()) / "checkpoints" / file for file in names]
    if path and name != "inception" and Path(path).resolve() != cached[0].resolve():
        raise UserError(f"--weights: {name} is read from {cached[0]} alone: put the file there")
    path = Path(path or next((file for file in cached if file.exists()), cached[0]))
    try:
        if path in cached and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, path, hash_prefix=published, progress=False)
        found = sha256(path)
    except Exception as e:                  # urllib's, http's and torch's errors.
        raise UserError(f"cannot read the weights {path}, nor download them from {url} ({e}): put "
                        f"them there (SHA-256 {published}), or take --features pixels") from None
    if found != (expected or published).lower():
        raise UserError(f"{path} has SHA-256 {found}, not {expected or published}: it is damaged "
                        f"or another file; the right one is at {url}")
    return path, found


def load_network(name, path, logits):
    """torch-fidelity's extractor; its torch.load would unpickle anything, here tensors alone."""
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        if name != "inception":
            from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2
            return FeatureExtractorDinoV2(name, ["dinov2"])
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"][:1 + logits],
            feature_extractor_weights_path=str(path))
        for m in network.modules():     # Batch norms of fixed statistics: part of convolutions.
            if hasattr(m, "conv") and hasattr(m, "bn"):
                m.conv, m.bn = fuse_conv_bn_eval(m.conv, m.bn), torch.nn.Identity()
        return network
    except Exception as e:              # The unpickler and torch.hub raise what they are led to.
        raise UserError(f"cannot load {name} from {path}: {str(e).partition(chr(10))[0]}") from None
    finally:
        del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
