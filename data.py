"""Data set name -> uint8 images and labels in memory -> batches on the device; and images back to files.

A data set is decoded once into one array (N,C,H,W) uint8, kept in cache_dir. No step ever waits for data: a batch is an
index look-up.
"""

import contextlib
import fcntl
import hashlib
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps

import files
import runtime
from runtime import UserError, warn

DECODED = 1     # Version of the code that decodes: with another one, what was kept is decoded anew.
TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


# ----------------------------------------------------------------------------------------------------------------------
# Data sets.

def load(config, train=True):
    """Load the training or test set that a config names, downloading it to data_root where a source exists.

    Return images (N,C,H,W) uint8 and labels (N,) int64, both on the CPU: not to be written to, as they may be a mapped
    file of cache_dir, where they are left decoded for the next time.
    Raises UserError where the data are missing or damaged. That image_shape is theirs, options has checked.
    """
    name, root = config["dataset"], Path(config["data_root"])
    shape = tuple(config["network"]["image_shape"])
    split = "train" if train else "test"
    before = sources(config, split)
    if before and (tensors := read_kept(kept_path(config, split, before))) is not None:
        return tensors
    if name == "folder":
        images, labels = load_folder(root, train, shape)
    else:
        images, labels = {"digits": load_digits, "cifar10": load_cifar10, "cifar100": load_cifar100,
                          "tinyimagenet": load_tinyimagenet}[name](root, train)
    images, labels = torch.from_numpy(images), torch.from_numpy(labels)
    if (after := sources(config, split)) and before in (None, after):           # Not changed meanwhile.
        keep(kept_path(config, split, after), images, labels)
    return images, labels


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
    """CIFAR by torchvision, which checks the MD5 of every file."""
    from torchvision.datasets.utils import check_integrity
    folder = root / dataset.base_folder
    fetch(dataset.__name__, dataset.url, dataset.tgz_md5, folder)
    try:
        cifar = dataset(root, train=train)
    except (RuntimeError, OSError) as e:
        parts = [*dataset.train_list, *dataset.test_list, [dataset.meta["filename"], dataset.meta["md5"]]]
        damaged = [str(folder / name) for name, md5 in parts if not check_integrity(folder / name, md5)]
        raise UserError(f"{dataset.__name__}: {damaged[0] if damaged else e} is missing, damaged or cut short; remove "
                        f"{folder} to download it again") from None
    return np.ascontiguousarray(cifar.data.transpose(0, 3, 1, 2)), np.array(cifar.targets, np.int64)


def load_tinyimagenet(root, train):
    """Tiny ImageNet in its original layout, (3,64,64), from root/tiny-imagenet-200.

    train/<wnid>/images/*.JPEG; val/images and val/val_annotations.txt are the test set. A label is the rank of the
    sorted wnid.
    """
    folder = root / "tiny-imagenet-200"
    fetch("Tiny ImageNet", TINY_URL, TINY_MD5, folder)
    remedy = f"remove {folder} to download it again"
    part = folder / "wnids.txt"                 # What is being read.
    try:
        label_of = {wnid: label for label, wnid in enumerate(sorted(part.read_text("utf-8").split()))}
        paths, labels = [], []
        if train:
            part = folder / "train"
            if differences := label_of.keys() ^ {path.name for path in part.iterdir() if path.is_dir()}:
                raise ValueError(f"it and wnids.txt differ in {min(differences)}")
            for wnid, label in label_of.items():
                part = folder / "train" / wnid / "images"
                found = sorted(path for path in part.iterdir() if path.suffix == ".JPEG")
                if not found:
                    raise ValueError("no images")
                paths += found
                labels += [label] * len(found)
        else:
            part = folder / "val" / "val_annotations.txt"
            for name, wnid, *_ in (row.split("\t") for row in part.read_text("utf-8").splitlines()):
                paths.append(folder / "val" / "images" / name)
                labels.append(label_of[wnid])
        if not paths:
            raise ValueError("it is empty")
    except OSError as e:
        raise UserError(f"Tiny ImageNet: cannot read {e.filename}: {e.strerror}; {remedy}") from None
    except KeyError as e:
        raise UserError(f"Tiny ImageNet: {part} is damaged (no class {e} in wnids.txt); {remedy}") from None
    except ValueError as e:                     # That a line has too few columns, or bytes that are no text, too.
        raise UserError(f"Tiny ImageNet: {part} is damaged ({e}); {remedy}") from None
    return decode(paths, (3, 64, 64), remedy), np.array(labels, np.int64)


def load_folder(root, train, shape):
    """Images in one sub-folder per class, resized and centre-cropped to `shape` (C,H,W).

    Training images lie in root/train where that exists, else in root; test images in root/val or root/test.
    """
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import find_classes
    names = ["train", "."] if train else ["val", "test"]
    folder = root
    try:
        folder = next((root / name for name in names if (root / name).is_dir()), None)
        if folder is None:
            raise UserError(f"data_root {root}: no folder {' or '.join(names)} there" if root.is_dir() or not train else
                            f"data_root {root} is not a folder")
        samples = ImageFolder(folder).samples
        trained = find_classes(root / "train" if (root / "train").is_dir() else root)[0]
        differences = sorted(set(trained) ^ set(find_classes(folder)[0]))
    except OSError as e:
        raise UserError(f"{folder} must hold one folder of images per class: {e}") from None
    if differences:                         # The labels are the ranks of the names.
        raise UserError(f"{folder} has other classes than the training images: they differ in {differences[0]}")
    return decode([path for path, _ in samples], shape), np.array([label for _, label in samples], np.int64)


def decode(paths, shape, remedy="replace or remove it"):
    """Decode image files, resized and centre-cropped where needed, into one array (N, *shape) uint8, on all cores.

    shape is (C,H,W) with C 1 (grayscale) or 3 (RGB). Raises UserError naming a file that is no whole image.
    """
    try:
        images = np.empty((len(paths), *shape), np.uint8)
    except MemoryError:
        raise UserError(f"{len(paths)} images of shape {list(shape)} do not fit in memory: make network.image_shape "
                        f"smaller or take fewer") from None
    chunks = Chunks(paths, shape, remedy)
    loader = torch.utils.data.DataLoader(chunks, batch_size=None, collate_fn=tuple,         # Threads are not faster.
                                         num_workers=runtime.cores() if len(paths) >= 1000 else 0)
    for i, (part, error) in enumerate(loader):
        if error:
            raise UserError(error)
        images[i * chunks.SIZE:(i + 1) * chunks.SIZE] = part
    return images


class Chunks(torch.utils.data.Dataset):
    """Image files in groups of SIZE: (array (n, *shape) uint8, None) each, or (None, what is wrong with a file)."""
    SIZE = 256

    def __init__(self, paths, shape, remedy):
        self.paths, self.shape, self.remedy = paths, shape, remedy

    def __len__(self):
        return -(-len(self.paths) // self.SIZE)

    def __getitem__(self, i):
        part = []
        for path in self.paths[i * self.SIZE:(i + 1) * self.SIZE]:
            try:
                part.append(decode_one(path, self.shape))
            except Exception as e:          # Pillow raises OSError, ValueError, SyntaxError and more for damaged files.
                return None, f"{path} is not a whole image ({getattr(e, 'strerror', None) or e}): {self.remedy}"
        return np.stack(part), None


def decode_one(path, shape):
    """Decode an image file into an array of `shape` (C,H,W) uint8. Raises whatever is wrong with it."""
    C, H, W = shape
    with Image.open(path) as image:
        if image.mode.startswith("I;16"):                       # convert() would make all above 255 white.
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise ValueError("its pixels have 32 bits, where black and white are unknown")
        image = image.convert("L" if C == 1 else "RGB")
    if image.size != (W, H):
        image = ImageOps.fit(image, (W, H), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(H, W, C).transpose(2, 0, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Data sets kept decoded in cache_dir: a file of tensors whose name tells what it was made from, its SHA-256 beside it.

def sources(config, split):
    """A hash of all that decides what a data set looks like: names, sizes and times of its files, image shape, decoder.

    None where nothing is to be kept, or where the files cannot be listed.
    """
    name, root = config["dataset"], Path(config["data_root"])
    folders = {"digits": [], "cifar10": [root / "cifar-10-batches-py"], "cifar100": [root / "cifar-100-python"],
               "tinyimagenet": [root / "tiny-imagenet-200"], "folder": [root]}[name]
    if name == "folder" and (root / "train").is_dir():
        folders = [folder for folder in (root / "train", root / "val", root / "test") if folder.is_dir()]
    if not folders or not config["cache_dir"]:
        return None
    about = [f"{name} {split} {config['network']['image_shape']} {DECODED} {PIL.__version__}"]
    try:
        for folder in folders:
            about += [folder.name, *sorted(listing(folder))]
    except OSError:
        return None
    return hashlib.sha256("\n".join(about).encode(errors="surrogateescape")).hexdigest()


def listing(folder, prefix=""):
    """Yield a line for each folder and file below `folder`: its name there, of a file also size and time (of a link,
    those of what it leads to)."""
    for entry in os.scandir(folder):
        name = f"{prefix}{entry.name}"
        if entry.is_dir():
            yield f"{name}/"
            yield from listing(entry, f"{name}/")
        else:
            status = entry.stat(follow_symlinks=entry.is_file())
            yield f"{name} {status.st_size} {status.st_mtime_ns}"


def kept_path(config, split, of):
    """The file of a data set with the hash `of`."""
    return Path(config["cache_dir"]) / "data" / f"{config['dataset']}-{split}-{of[:16]}.pt"


def read_kept(path):
    """Images and labels of a kept file, mapped into memory; None where it is missing or damaged."""
    try:
        if path.with_suffix(".sha256").read_text() == files.sha256(path):
            tensors = torch.load(path, mmap=True, weights_only=True)
            return tensors["images"], tensors["labels"]
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError, KeyError, TypeError):
        pass
    return None


def keep(path, images, labels):
    """Leave images and labels for the next time; where that fails, say so and go on."""
    try:
        files.clean(files.make_folder(path.parent), hours=24)       # A younger one may be another run's.
        with files.atomic(path) as temporary:
            with open(temporary, "wb") as file:     # Not by its name, which would be in the file.
                torch.save({"images": images, "labels": labels}, file)
            checksum = files.sha256(temporary)
        with files.atomic(path.with_suffix(".sha256")) as temporary:
            temporary.write_text(checksum)
    except (UserError, OSError) as e:
        warn(f"the decoded data set is not kept for the next time: {e}")


# ----------------------------------------------------------------------------------------------------------------------
# Downloads.

def fetch(name, url, md5, folder):
    """Where `folder` is missing, download the archive that holds it and unpack it: whole or not at all.

    Both happen under a temporary name. Raises UserError with the way to do it by hand.
    """
    from torchvision.datasets.utils import check_integrity, download_url, extract_archive
    archive, partial = folder.with_name(Path(url).name), folder.with_name(f".{folder.name}.partial")
    try:
        if folder.exists():
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent):
            if folder.exists():                                 # Another run has fetched it meanwhile.
                return
            shutil.rmtree(partial, ignore_errors=True)          # Of a run that was killed.
            try:
                if not check_integrity(archive, md5):
                    download_url(url, partial, md5=md5)
                    (partial / archive.name).replace(archive)
                extract_archive(archive, partial)
                (partial / folder.name).rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except Exception as e:                  # urllib, http.client, tarfile and zipfile each raise errors of their own.
        raise UserError(f"{name} is not in {folder} and could not be downloaded from {url} ({e}); download it "
                        f"elsewhere (MD5 {md5}) and unpack it so that {folder} exists") from None


@contextlib.contextmanager
def locked(folder):
    """Hold a folder against other runs; the system lets go when this process ends. Without locks, as on some network
    file systems, go on without."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another run's download to {folder}", flush=True)
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


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
    x = images[index.to(images.device)].to(device)
    if flip is not None:
        x = torch.where(flip[:, None, None, None], x.flip(-1), x)
    return x.float() / 127.5 - 1


# ----------------------------------------------------------------------------------------------------------------------
# Images to files.

def save_png(image, path):
    """Write an image (C,H,W) uint8, on the CPU, as a PNG: whole or not at all."""
    pixels = image.permute(1, 2, 0).numpy()
    with files.atomic(path) as temporary:
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(temporary, "PNG")


def grid(images, n_columns):
    """Images (N,C,H,W) uint8 side by side as one image (C,H',W') uint8; small ones are enlarged to be seen."""
    from torchvision.utils import make_grid
    images = images.repeat_interleave(scale := max(1, 32 // images.shape[-1]), 2).repeat_interleave(scale, 3)
    return make_grid(images, n_columns, padding=2, pad_value=128)
