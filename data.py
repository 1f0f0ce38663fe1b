"""Data set name -> uint8 images and labels in memory -> batches on the device; and images back to files.

A data set is decoded once into one array (N,C,H,W) uint8. No step ever waits for data: a batch is an index look-up.
"""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
from PIL import Image

from runtime import UserError, atomic

TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


# ----------------------------------------------------------------------------------------------------------------------
# Data sets.

def load(config, train=True):
    """Load the training or test set that a config names, downloading it to data_root where a source exists.

    Return images (N,C,H,W) uint8 and labels (N,) int64, both on the CPU.
    Raises UserError where the data are missing, damaged, or not of the config's image_shape.
    """
    name, root = config["dataset"], Path(config["data_root"])
    shape = tuple(config["network"]["image_shape"])
    if name == "folder":
        images, labels = load_folder(root, train, shape)
    else:
        images, labels = {"digits": load_digits, "cifar10": load_cifar10, "cifar100": load_cifar100,
                          "tinyimagenet": load_tinyimagenet}[name](root, train)
    if images.shape[1:] != shape:
        raise UserError(f"{name} has images of shape {list(images.shape[1:])}, "
                        f"but network.image_shape is {list(shape)}")
    return torch.from_numpy(images), torch.from_numpy(labels)


def load_digits(root, train):
    """scikit-learn's handwritten digits, (1,8,8) with values 0..16 brought to 0..255; the last 360 are the test set."""
    from sklearn.datasets import load_digits as sklearn_digits  # Slow to import: only where it is used.
    digits = sklearn_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)[:, None]
    split = slice(None, -360) if train else slice(-360, None)
    return images[split], digits.target[split].astype(np.int64)


def load_cifar10(root, train):
    """CIFAR-10, (3,32,32), 50,000 and 10,000 images, from root/cifar-10-batches-py."""
    from torchvision.datasets import CIFAR10
    return load_cifar(CIFAR10, root, train)


def load_cifar100(root, train):
    """CIFAR-100, (3,32,32), 50,000 and 10,000 images, from root/cifar-100-python."""
    from torchvision.datasets import CIFAR100
    return load_cifar(CIFAR100, root, train)


def load_cifar(dataset, root, train):
    """CIFAR by torchvision, which checks the files' MD5 and downloads them where they are missing."""
    with download_errors(dataset.__name__, dataset.url, root / dataset.base_folder, dataset.tgz_md5):
        cifar = dataset(root, train=train, download=True)
    return np.ascontiguousarray(cifar.data.transpose(0, 3, 1, 2)), np.array(cifar.targets, np.int64)


def load_tinyimagenet(root, train):
    """Tiny ImageNet in its original layout, (3,64,64), from root/tiny-imagenet-200.

    train/<wnid>/images/*.JPEG; val/images and val/val_annotations.txt are the test set. A label is the rank of the
    sorted wnid.
    """
    folder = root / "tiny-imagenet-200"
    if not folder.exists():
        from torchvision.datasets.utils import download_and_extract_archive
        partial = root / ".tiny-imagenet-200.partial"           # So that a cut download is never taken for whole.
        shutil.rmtree(partial, ignore_errors=True)
        with download_errors("Tiny ImageNet", TINY_URL, folder, TINY_MD5):
            download_and_extract_archive(TINY_URL, root, partial, md5=TINY_MD5)
            (partial / folder.name).rename(folder)
    try:
        label_of = {wnid: label for label, wnid in enumerate(sorted((folder / "wnids.txt").read_text().split()))}
        if train:
            paths = [path for wnid in label_of for path in sorted((folder / "train" / wnid / "images").iterdir())]
            labels = [label_of[path.parent.parent.name] for path in paths]
        else:
            rows = [row.split("\t") for row in (folder / "val" / "val_annotations.txt").read_text().splitlines()]
            paths = [folder / "val" / "images" / row[0] for row in rows]
            labels = [label_of[row[1]] for row in rows]
    except OSError as e:
        raise UserError(f"Tiny ImageNet: cannot read {e.filename}: {e.strerror}; remove {folder} to download it "
                        f"again") from None
    except (IndexError, KeyError):
        raise UserError(f"Tiny ImageNet: {folder / 'val' / 'val_annotations.txt'} is damaged; remove {folder} to "
                        f"download it again") from None
    return decode(paths, (3, 64, 64)), np.array(labels, np.int64)


def load_folder(root, train, shape):
    """Images in one sub-folder per class, resized and centre-cropped to `shape` (C,H,W).

    Training images lie in root/train where that exists, else in root; test images in root/val or root/test.
    """
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import find_classes
    names = ["train", "."] if train else ["val", "test"]
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    if folder is None:
        raise UserError(f"data_root {root}: no folder {' or '.join(names)} there" if root.is_dir() or not train else
                        f"data_root {root} is not a folder")
    try:
        samples = ImageFolder(folder).samples
        trained = find_classes(root / "train" if (root / "train").is_dir() else root)[0]
        differences = sorted(set(trained) ^ set(find_classes(folder)[0]))
    except (FileNotFoundError, PermissionError) as e:
        raise UserError(f"{folder}: {e}") from None
    if differences:                         # The labels are the ranks of the names.
        raise UserError(f"{folder} has other classes than the training images: they differ in {differences[0]}")
    return decode([path for path, _ in samples], shape), np.array([label for _, label in samples], np.int64)


def decode(paths, shape):
    """Decode image files, resized and centre-cropped where needed, into one array (N, *shape) uint8, on all cores.

    shape is (C,H,W) with C 1 (grayscale) or 3 (RGB). Raises UserError naming a file that is no whole image.
    """
    C, H, W = shape
    if C not in (1, 3):
        raise UserError(f"network.image_shape {list(shape)}: image files have 1 or 3 channels, not {C}")
    images = np.empty((len(paths), *shape), np.uint8)

    def decode_one(i):
        try:
            with Image.open(paths[i]) as file:
                image = file.convert("L" if C == 1 else "RGB")
        except Exception as e:              # Pillow raises OSError, ValueError, SyntaxError and more for damaged files.
            raise UserError(f"{paths[i]} is not a whole image: {e}") from None
        if image.size != (W, H):
            scale = max(W / image.width, H / image.height)
            image = image.resize((max(W, round(image.width * scale)), max(H, round(image.height * scale))),
                                 Image.Resampling.LANCZOS)
            left, top = (image.width - W) // 2, (image.height - H) // 2
            image = image.crop((left, top, left + W, top + H))
        images[i] = np.asarray(image).reshape(H, W, C).transpose(2, 0, 1)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(decode_one, range(len(paths))):
            pass
    return images


class download_errors:
    """Context manager: what a failed download raises becomes a UserError with the way to do it by hand."""

    def __init__(self, name, url, folder, md5):
        self.message = f"{name} is not in {folder} and could not be downloaded from {url}"
        self.remedy = f"download it elsewhere (MD5 {md5}) and unpack it so that {folder} exists"

    def __enter__(self):
        pass

    def __exit__(self, kind, error, traceback):
        if isinstance(error, URLError | OSError | RuntimeError | EOFError):
            raise UserError(f"{self.message} ({error}); {self.remedy}") from None


# ----------------------------------------------------------------------------------------------------------------------
# Batches.

def to_device(images, device):
    """Move a data set to the device where it takes less than half of the free memory; else keep it on the CPU."""
    if device.type == "cuda" and images.numel() < torch.cuda.mem_get_info(device)[0] / 2:
        return images.to(device)
    return images


def epoch_order(n, seed, epoch):
    """The order of n images in an epoch, (n,) int64: a function of (seed, epoch) alone."""
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(n))


def batch(images, index, device, flip=None):
    """Images number `index` (B,) of a data set (N,C,H,W) uint8, as (B,C,H,W) float32 in [-1,1] on `device`.

    flip: (B,) bool on `device`, the images to flip left to right; None: none.
    """
    x = images[index.to(images.device)].to(device).float() / 127.5 - 1
    return x if flip is None else torch.where(flip[:, None, None, None], x.flip(-1), x)


# ----------------------------------------------------------------------------------------------------------------------
# Images to files.

def save_png(image, path):
    """Write an image (C,H,W) uint8, on the CPU, as a PNG: whole or not at all."""
    pixels = image.permute(1, 2, 0).numpy()
    with atomic(path) as temporary:
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(temporary, "PNG")


def grid(images, n_columns):
    """Images (N,C,H,W) uint8 side by side as one image (C,H',W') uint8; small ones are enlarged to be seen."""
    from torchvision.utils import make_grid
    images = images.repeat_interleave(scale := max(1, 32 // images.shape[-1]), 2).repeat_interleave(scale, 3)
    return make_grid(images, n_columns, padding=2, pad_value=128)
