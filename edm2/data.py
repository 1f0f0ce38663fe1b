"""Data set name -> uint8 images and labels in memory -> batches on the device; images to files."""

import contextlib
import functools
import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
import PIL
import torch
from filelock import FileLock
from PIL import Image, ImageOps
from edm2 import diffusion, distributed, files
from edm2.errors import UserError, warn

DECODED = 2     # Version of the code that decodes: with another one, what was kept is decoded anew.
NOISE = 1       # What a step's seed is for.
TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"

def load(config, train=True):
    """The training or test set of a config, downloaded if missing and left decoded in cache_dir:
    images (N,C,H,W) uint8 and labels (N,) int64, on the CPU. UserError: missing or damaged."""
    kept = cache_path(config, train)            # None where it is not downloaded yet.
    if kept and kept.exists():
        try:
            arrays = read_npz(kept)
            return torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
        except (UserError, KeyError) as e:
            warn(f"{kept} does not serve ({e}); decoding the data set again")
    load_set = {"digits": load_digits, "cifar10": load_cifar, "cifar100": load_cifar,
                "tinyimagenet": load_tinyimagenet, "folder": load_folder}[config.dataset]
    shape = tuple(config.network.image_shape)
    images, labels = load_set(config.dataset, Path(config.data_root), train, shape)
    if kept := kept or cache_path(config, train):
        write_npz(kept, images=images, labels=np.array(labels, np.int64))
    return torch.from_numpy(images), torch.tensor(labels, dtype=torch.int64)

def load_digits(name, root, train, shape):
    """scikit-learn's digits, (1,8,8), 0..16 brought to 0..255; the last 360 are the test set."""
    from sklearn.datasets import load_digits as sklearn_digits  # Slow to import.
    digits, split = sklearn_digits(), slice(None, -360) if train else slice(-360, None)
    images = (digits.images * (255 / 16)).round().astype(np.uint8)[:, None]
    return images[split], digits.target[split]

def load_cifar(name, root, train, shape):
    """CIFAR-10 or -100, (3,32,32), 50,000 and 10,000 images, by torchvision, MD5 checked."""
    from torchvision.datasets import CIFAR10, CIFAR100
    from torchvision.datasets.utils import check_integrity
    kind = CIFAR10 if name == "cifar10" else CIFAR100
    folder, meta = root / kind.base_folder, (kind.meta["filename"], kind.meta["md5"])
    fetch(kind.__name__, kind.url, kind.tgz_md5, folder)
    for part, md5 in [*kind.train_list, *kind.test_list, meta]:
        if not check_integrity(folder / part, md5):
            raise UserError(f"{kind.__name__}: {folder / part} is missing, damaged or cut short; "
                            f"remove {folder} to download it again")
    cifar = kind(root, train)
    return np.ascontiguousarray(cifar.data.transpose(0, 3, 1, 2)), cifar.targets

def load_tinyimagenet(name, root, train, shape):
    """Tiny ImageNet in its original layout, (3,64,64). A label is the rank of the sorted wnid."""
    from torchvision.datasets import ImageFolder
    folder = root / "tiny-imagenet-200"
    fetch("Tiny ImageNet", TINY_URL, TINY_MD5, folder)
    remedy = f"remove {folder} to download it again"
    part = folder / "wnids.txt"                 # What is being read.
    try:
        rank = {wnid: i for i, wnid in enumerate(sorted(part.read_text("utf-8").split()))}
        part = folder / ("train" if train else "val/val_annotations.txt")
        if train:
            if names := rank.keys() ^ {p.name for p in part.iterdir() if p.is_dir()}:
                raise ValueError(f"it and wnids.txt differ in {min(names)}")
            found = ImageFolder(part).samples
        else:
            rows = [line.split("\t")[:2] for line in part.read_text("utf-8").splitlines()]
            found = [(folder / "val/images" / image, rank[wnid]) for image, wnid in rows]
        if not found:
            raise ValueError("it is empty")
    except (OSError, ValueError, KeyError) as e:        # Of bytes that are no text, too.
        raise UserError(f"Tiny ImageNet: {part} is damaged or missing ({e}); {remedy}") from None
    return decode([path for path, _ in found], shape, remedy), [label for _, label in found]

def load_folder(name, root, train, shape):
    """Images in one sub-folder per class, resized and centre-cropped to `shape` (C,H,W): those to
    train on of root/train, where it exists, or root; the others of root/val or root/test."""
    from torchvision.datasets.folder import ImageFolder, find_classes
    names = ["train", "."] if train else ["val", "test"]
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    if folder is None:
        raise UserError(f"data_root {root}: there is no folder {' or '.join(names)}")
    try:
        found = ImageFolder(folder)
        trained = find_classes(root / "train" if (root / "train").is_dir() else root)[0]
    except OSError as e:
        raise UserError(f"{folder} must hold one folder of images per class: {e}") from None
    if differences := set(trained) ^ set(found.classes):        # Labels are the ranks of the names.
        raise UserError(f"{folder} and the training images differ in class {min(differences)}")
    return decode([path for path, _ in found.samples], shape), found.targets

def decode(paths, shape, remedy="replace or remove it"):
    """Decode image files to one array (N, *shape) uint8, as decode_image does."""
    images = np.empty((len(paths), *shape), np.uint8)
    with ThreadPoolExecutor(distributed.cores()) as pool:
        for i, image in enumerate(pool.map(lambda p: decode_image(p, shape, remedy), paths)):
            images[i] = image
    return images

def decode_image(path, shape=None, remedy="replace or remove it"):
    """Decode an image file to (C,H,W) uint8: resized and centre-cropped to `shape` with C 1 (gray)
    or 3 (RGB), or, without a shape, as it is. Raises UserError naming what is no whole image."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):                   # convert() would make it white.
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            elif image.mode in ("I", "F"):
                raise ValueError("its pixels have 32 bits, where black and white are unknown")
            gray = shape[0] == 1 if shape else image.mode in ("1", "L")
            image = image.convert("L" if gray else "RGB")
        if shape:
            image = ImageOps.fit(image, shape[:0:-1], Image.Resampling.LANCZOS)
    except Exception as e:      # Pillow raises OSError, ValueError, SyntaxError and more.
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"{path} is not a whole image ({reason}): {remedy}") from None
    return np.asarray(image).reshape(*image.size[::-1], -1).transpose(2, 0, 1)

def cache_path(config, train):
    """The decoded set's .npz, by a hash of sources, shape, decoder; None: not kept, no source."""
    root, split = Path(config.data_root), "train" if train else "test"
    folders = {"cifar10": ["cifar-10-batches-py"], "cifar100": ["cifar-100-python"],
               "tinyimagenet": ["tiny-imagenet-200"]}.get(config.dataset) or (
        ["train", "val", "test"] if (root / "train").is_dir() else ["."])
    if config.dataset == "digits" or not config.cache_dir or not (root / folders[0]).is_dir():
        return None
    about = [f"{config.network.image_shape} {DECODED} {PIL.__version__}"]
    for folder in folders:
        for parent, _, names in sorted(os.walk(root / folder, followlinks=True)):
            about.append(os.path.relpath(parent, root))
            for path in map(Path(parent).joinpath, sorted(names)):
                status = path.stat() if path.exists() else path.lstat()
                about.append(f"{path.name} {status.st_size} {status.st_mtime_ns}")
    digest = hashlib.sha256("\n".join(about).encode(errors="surrogateescape")).hexdigest()
    return Path(config.cache_dir) / "data" / f"{config.dataset}-{split}-{digest[:16]}.npz"

def write_npz(path, **arrays):
    """Leave arrays in a cache; where that fails, say so and go on."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)
    except (UserError, OSError) as e:
        warn(f"{path} is not kept for the next time: {e}")

def read_npz(path):
    """The arrays of an .npz by name. Runs no code from it. UserError where it is not whole."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}        # Its checksums are looked at.
    except Exception as e:      # numpy and zipfile raise what a damage leads them to.
        reason = getattr(e, "strerror", None) or ("" if "pickle" in str(e) else e)
        raise UserError(f"{path} is not a whole .npz file: {reason}") from None

def fetch(name, url, md5, folder):
    """Download and unpack the archive with `folder` where that is missing, whole or not at all."""
    if folder.exists():
        return
    from torchvision.datasets.utils import check_integrity, download_url, extract_archive
    archive, partial = folder.with_name(Path(url).name), folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{partial}.lock"), contextlib.ExitStack() as stack:
            shutil.rmtree(partial, ignore_errors=True)      # What a killed process left.
            stack.callback(shutil.rmtree, partial, ignore_errors=True)
            if not folder.exists():             # Another run may have fetched it meanwhile.
                if not check_integrity(archive, md5):
                    download_url(url, partial, md5=md5)
                    (partial / archive.name).replace(archive)
                extract_archive(archive, partial)
                (partial / folder.name).rename(folder)
    except Exception as e:      # urllib, http.client, tarfile, zipfile: each has errors of its own.
        raise UserError(f"{name} could not be downloaded from {url} ({e}): download it elsewhere "
                        f"(MD5 {md5}) and unpack it as {folder}") from None

def placement(nbytes, device):
    """The device for so many bytes: this one where they take less than half of what is free."""
    fits = device.type == "cuda" and nbytes < torch.cuda.mem_get_info(device)[0] / 2
    return device if fits else torch.device("cpu")

@functools.lru_cache(2)
def epoch_order(n, seed, epoch):
    """The order of n images in an epoch, (n,) int64: a function of (seed, epoch) alone."""
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(n))

def draw(config, step, images, device, batch_gpu):
    """Image numbers, noise levels and noise ~ N(0,1) and flips of a step's total batch, B images;
    of them this process's part, as a list of passes of batch_gpu images."""
    B, (epoch, i) = config.batch_size, divmod(step, len(images) // config.batch_size)
    index = epoch_order(len(images), config.seed, epoch)[i * B:(i + 1) * B]
    g = torch.Generator(device).manual_seed(diffusion.derive_seed(config.seed, step, NOISE))
    level = torch.randn(B, generator=g, device=device)
    noise = torch.randn(B, *images.shape[1:], generator=g, device=device)
    flip = torch.rand(B, generator=g, device=device) < (0.5 if config.flip else 0)
    mine = [drawn.chunk(distributed.world_size())[distributed.rank()].split(batch_gpu)
            for drawn in (index, level, noise, flip)]
    return list(zip(*mine, strict=True))

def batch(images, index, device, flip=None):
    """Images number `index` (B,) of a data set (N,C,H,W) uint8, as (B,C,H,W) float32 in [-1,1] on
    `device`. flip: (B,) bool, those to flip left to right; None: none."""
    x = images[index.to(images.device)].to(device)
    if flip is not None:
        x = torch.where(flip[:, None, None, None], x.flip(-1), x)
    return to_float(x)

def to_float(images):
    """Pixels, uint8 0..255, as float32 in [-1,1]."""
    return images.float() / 127.5 - 1

def save_png(image, path):
    """Write an image (C,H,W) uint8, on the CPU, as a PNG: whole or not at all."""
    pixels = image.permute(1, 2, 0).numpy()
    with files.atomic(path) as temporary:
        Image.fromarray(pixels[..., 0] if len(image) == 1 else pixels).save(temporary, "PNG")

def grid(images, n_columns):
    """Images (N,C,H,W) uint8 side by side as one (C,H',W') uint8; small ones are enlarged."""
    from torchvision.utils import make_grid
    scale = max(1, 32 // images.shape[-1])
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return make_grid(images, n_columns, padding=2, pad_value=128)
