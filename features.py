"""Images from folders, files and data sets -> feature vectors: Inception-v3's, DINOv2's, or the pixels themselves."""

import os
import urllib.error
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.fusion import fuse_conv_bn_eval

import files
from runtime import UserError

# name: (files in torch's hub cache, address, SHA-256, label of a figure). Inception-v3 is the TF port that every
# published FID rests on; pytorch-fid has the same file under the second name.
WEIGHTS = {
    "inception": (["weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"],
                  "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
                  "weights-inception-2015-12-05-6726825d.pth",
                  "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2", "inception"),
    "dinov2-vit-b-14": (["dinov2_vitb14_pretrain.pth"],
                        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
                        "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73", "dinov2"),
}
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


# ----------------------------------------------------------------------------------------------------------------------
# Images.

class Images:
    """n images of one size, read when asked for: read(i) gives a (C,H,W) uint8 array; name stands in messages."""

    def __init__(self, name, n, read):
        if not n:
            raise UserError(f"{name}: there are no images")
        self.name, self.n, self.read = name, n, read

    def batches(self, indices, size):
        """The images number `indices` in batches (B,C,H,W) uint8, read by threads a few batches ahead."""
        ahead = deque()
        with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
            for start in range(0, len(indices), size):
                ahead.append(pool.map(self.read, indices[start:start + size]))
                if len(ahead) > 3:
                    yield torch.from_numpy(np.stack(list(ahead.popleft())))
            for batch in ahead:
                yield torch.from_numpy(np.stack(list(batch)))


def array_images(name, array, limit=None):
    """Images of an array or tensor (N,C,H,W) uint8."""
    array = np.asarray(array)
    return Images(name, len(array[:limit]), lambda i: array[i])


def image_files(folder):
    """The image files of a folder, by name; [] where there is no such folder."""
    folder = Path(folder)
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")
                  ) if folder.is_dir() else []


def folder_images(folder, limit=None):
    """The image files of a folder, in the order of their names: at most `limit`. Gray ones have one channel, unless
    the first is in colour. Raises UserError for an empty folder and, naming it, a damaged or differently sized file."""
    folder = Path(folder)
    if (folder / "settings.json").exists() and (folder / "images").is_dir():
        folder /= "images"                  # What sample.py made, named by its parent.
    paths = image_files(folder)[:limit]
    if not paths:
        raise UserError(f"{folder}: there are no images in this folder")

    def open_image(i):
        try:
            with Image.open(paths[i]) as file:
                gray = file.mode in ("1", "L")
                return np.asarray(file.convert("L" if gray else "RGB")).reshape(file.height, file.width, -1), gray
        except Exception as e:              # Pillow raises OSError, ValueError, SyntaxError and more for damaged files.
            remedy = "; remove it and run sample.py again" * (folder.parent / "settings.json").exists()
            raise UserError(f"{paths[i]} is not a whole image: {e}{remedy}") from None

    first, all_gray = open_image(0)

    def read(i):
        image, gray = open_image(i)
        if gray and not all_gray:
            image = image.repeat(3, axis=2)
        if image.shape != first.shape:
            raise UserError(f"{paths[i]} is an image of height, width and channels {list(image.shape)}, but "
                            f"{paths[0].name} has {list(first.shape)}: all must be of one size")
        return image.transpose(2, 0, 1)

    return Images(str(folder), len(paths), read)


def read_npz(path):
    """The arrays of an .npz by name. Runs no code from the file. Raises UserError where it is damaged or no .npz."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file or folder") from None
    except Exception as e:                  # numpy and zipfile raise whatever a damaged file leads them to.
        reason = str(e).partition("\n")[0] or "it is cut"      # numpy's own would advise to unpickle.
        raise UserError(f"{path} is not a whole .npz file" + f": {reason}" * ("pickle" not in reason)) from None


def npz_images(path, arrays, limit=None):
    """The images of an .npz with one uint8 array (N,H,W,C), as sample.py --npz writes it, or (N,C,H,W)."""
    images = [a for a in arrays.values() if a.dtype == np.uint8 and a.ndim == 4 and {1, 3} & {a.shape[1], a.shape[3]}]
    if len(images) != 1:
        held = ", ".join(f"{name} {a.dtype} {list(a.shape)}" for name, a in arrays.items())
        raise UserError(f"{path} holds {held or 'nothing'}: expected one uint8 array of images (N,H,W,C), or "
                        f"statistics mu (d,) and sigma (d,d)")
    array = images[0]
    return array_images(str(path), array.transpose(0, 3, 1, 2) if array.shape[3] in (1, 3) else array, limit)


# ----------------------------------------------------------------------------------------------------------------------
# Features.

class Extractor:
    """images (B,C,H,W) uint8 -> features (B,d) float32.

    name: inception, dinov2-vit-b-14 or pixels. label: as it stands in "FD(label)"; None for the one that is called FID.
    version: what the features depend on, for the cache of statistics. logits: also return Inception's, for its score.
    """

    def __init__(self, name, rt, weights=None, sha256=None, logits=False):
        self.name, self.device, self.sha256, self.weights = name, rt.device, None, weights
        self.label, self.version = "pixels", "1"
        if name == "pixels":
            self.network = lambda images: (pixels(images),)
            return
        path, self.sha256 = find_weights(name, rt, weights, sha256)
        self.weights = path
        self.label = WEIGHTS[name][3]
        if self.sha256 != WEIGHTS[name][2]:
            self.label += f"-{self.sha256[:8]}"
        elif name == "inception":
            self.label = None
        self.version = "folded, " * (name == "inception") + f"torch-fidelity {metadata.version('torch-fidelity')}"
        with rt.in_turns():                 # torch.hub fetches DINOv2's code.
            network = load_network(name, path, logits)
        self.network = network.to(self.device, memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, images):
        """Features (B,d), and logits where asked for, of images (B,C,H,W) uint8."""
        images = images.to(self.device)
        if self.name != "pixels" and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        allowed = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False     # Full precision: the figure is compared with other people's.
        try:
            return self.network(images)
        finally:
            torch.backends.cudnn.allow_tf32 = allowed

    def figure(self, name):
        """A figure's name: FID, or KID for these features, where they are Inception's; else such as FD(pixels)."""
        return name if self.label is None else f"{name.replace('FID', 'FD').replace('KID', 'KD')}({self.label})"


def pixels(images):
    """The pixels in [-1,1], flattened (B,d); images above 32x32 are averaged down to that."""
    x = images.float() / 127.5 - 1
    H, W = x.shape[2:]
    return torch.nn.functional.adaptive_avg_pool2d(x, (min(H, 32), min(W, 32))).flatten(1)


def find_weights(name, rt, path=None, sha256=None):
    """The file of a feature network's weights: `path`, else in torch's hub cache, else downloaded there.

    Return it and its SHA-256, which is checked before anything reads the file. Raises UserError where it differs from
    `sha256` (default: the published one), and where there is neither file nor network.
    """
    names, url, published, _ = WEIGHTS[name]
    expected = (sha256 or published).lower()
    cached = [Path(torch.hub.get_dir()) / "checkpoints" / file for file in names]
    if path is not None:
        path = Path(path)
        if name != "inception" and path.resolve() != cached[0].resolve():
            raise UserError(f"--weights: {name} is read from {cached[0]} alone: put the file there")
    with rt.in_turns():
        if path is None:
            path = next((file for file in cached if file.exists()), cached[0])
        if not path.exists() and path in cached:
            download(name, url, path, published)
        if not path.is_file():
            raise UserError(f"--weights {path}: no such file")
        found = files.sha256(path)
    if found != expected:
        raise UserError(f"{path} has SHA-256 {found}, not {expected}: it is damaged or another file; the right one is "
                        f"at {url}")
    return path, found


def download(name, url, path, sha256):
    """Fetch a file, whole and checked or not at all. Raises UserError saying how to do it by hand."""
    files.make_folder(path.parent)
    try:
        torch.hub.download_url_to_file(url, path, hash_prefix=sha256, progress=False)
    except (urllib.error.URLError, OSError, RuntimeError, EOFError) as e:
        raise UserError(f"the weights {path.name} are not in {path.parent} and could not be downloaded from {url} "
                        f"({e}); download them elsewhere (SHA-256 {sha256}) and put them there"
                        + (", or say --weights FILE" if name == "inception" else "; torch.hub must fetch the code, "
                           "github.com/facebookresearch/dinov2, once too")
                        + ". --features pixels needs none") from None


def load_network(name, path, logits):
    """torch-fidelity's extractor. Its own torch.load would unpickle anything; here it reads plain tensors only."""
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        if name == "inception":
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
            layers = ["2048", "logits_unbiased"] if logits else ["2048"]
            network = FeatureExtractorInceptionV3("inception-v3-compat", layers,
                                                  feature_extractor_weights_path=str(path))
            for m in network.modules():     # Batch norms of fixed statistics become part of their convolutions.
                if hasattr(m, "conv") and hasattr(m, "bn"):
                    m.conv, m.bn = fuse_conv_bn_eval(m.conv, m.bn), torch.nn.Identity()
            return network
        from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2
        return FeatureExtractorDinoV2(name, ["dinov2"])
    except Exception as e:                  # The unpickler, and torch.hub for DINOv2, raise whatever they are led to.
        reason = str(e).partition("\n")[0]
        remedy = ("; torch.hub fetches its code from github.com/facebookresearch/dinov2 the first time"
                  if name != "inception" else "")
        raise UserError(f"cannot load {name} from {path}: {reason}{remedy}") from None
    finally:
        del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
