"""Data set name -> uint8 images and labels in memory -> batches on the device."""

import contextlib
import functools
import hashlib
import shutil
from pathlib import Path
import numpy as np
import PIL
import torch
from filelock import FileLock
from edm2 import augmentation, diffusion, distributed, files, image_files
from edm2.errors import UserError, warn

DECODED = 4     # Version of the code that decodes: with another one, what was kept is decoded anew.
NOISE = 1       # What a step's seed is for.
TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
TINY_SIZES = {True: 100_000, False: 10_000}     # Of the training and the test set.

def load(config, train=True):
    """The training or test set of a config, downloaded if missing and left decoded in cache_dir:
    images (N,C,H,W) uint8 and labels (N,) int64, -1 where there are none, on the CPU. Says what
    was found. Raises UserError: missing, damaged, not whole, or not of the config's classes."""
    shape, split = config.network.image_shape, "training" if train else "test"
    where, sources, read = SETS[config.dataset][0](config, train)
    path = cache_path(config, split, sources)
    if not (arrays := read_kept(path)):
        images, labels = read(shape)
        arrays = np.ascontiguousarray(images), np.array(labels, np.int64)
        if path:
            files.write_cache(path.with_suffix(".npy"), arr=arrays[0])
        if path and path.with_suffix(".npy").exists():
            files.write_cache(path, labels=arrays[1], sha256=digest(torch.from_numpy(arrays[0])))
        arrays = read_kept(path) or arrays
    images, labels = map(torch.from_numpy, arrays)
    n_classes = int(labels.max()) + 1
    distributed.print0(f"{len(images):,} {split} images, {n_classes or 'no'} classes, from {where}")
    label_dim = config.network.label_dim
    for key, wanted in (("classes", config.classes), ("network.label_dim", label_dim or None)):
        if train and wanted not in (None, n_classes):
            raise UserError(f"{key} is {wanted}, but {where} has {n_classes or 'no'} classes")
    found = labels.unique().tolist()
    if label_dim and (found[0] < 0 or found[-1] >= label_dim or len(found) < label_dim * train):
        raise UserError(f"{where} has other labels than the {label_dim} of network.label_dim")
    return images, labels

def find_digits(config, train):
    """scikit-learn's digits, (1,8,8), 0..16 brought to 0..255; the last 360 are the test set."""
    def read(shape):
        from sklearn.datasets import load_digits  # Slow to import.
        digits, split = load_digits(), slice(None, -360) if train else slice(-360, None)
        images = (digits.images * (255 / 16)).round().astype(np.uint8)[:, None]
        return images[split], digits.target[split]

    return "scikit-learn", [], read

def find_cifar(config, train):
    """CIFAR-10 or -100, (3,32,32), 50,000 and 10,000 images, by torchvision, MD5 checked."""
    from torchvision.datasets import CIFAR10, CIFAR100
    from torchvision.datasets.utils import check_integrity
    kind = CIFAR10 if config.dataset == "cifar10" else CIFAR100
    folder = Path(config.data_root, kind.base_folder)
    fetch(kind.__name__, kind.url, kind.tgz_md5, folder)
    parts = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]

    def read(shape):
        for part, md5 in parts:
            if not check_integrity(folder / part, md5):
                raise UserError(f"{kind.__name__}: {folder / part} is missing, damaged or cut "
                                f"short; replace it, or remove {folder} to download it again")
        cifar = kind(config.data_root, train)
        return cifar.data.transpose(0, 3, 1, 2), cifar.targets

    return folder, [folder / part for part, _ in parts], read

def find_tinyimagenet(config, train):
    """Tiny ImageNet in its original layout, (3,64,64). A label is the rank of the sorted wnid."""
    folder = Path(config.data_root, "tiny-imagenet-200")
    fetch("Tiny ImageNet", TINY_URL, TINY_MD5, folder)
    part = folder / "wnids.txt"                 # What is being read.
    try:
        rank = {wnid: i for i, wnid in enumerate(sorted(part.read_text("utf-8").split()))}
        part = folder / ("train" if train else "val/val_annotations.txt")
        if train:
            paths = image_files.find_images(part, say=False)
            wnids = [path.relative_to(part).parts[0] for path in paths]
        else:
            rows = [line.split("\t")[:2] for line in part.read_text("utf-8").splitlines()]
            paths, wnids = [part.parent / "images" / name for name, _ in rows], [w for _, w in rows]
        if strange := rank.keys() ^ set(wnids):
            raise ValueError(f"of it and wnids.txt only one has {image_files.some(strange)}")
        if len(paths) != TINY_SIZES[train]:
            raise ValueError(f"{len(paths):,} images of {len(rank)} classes, where the whole set "
                             f"has {TINY_SIZES[train]:,} of 200: a part of it is dataset: folder")
    except (OSError, ValueError) as e:          # Of bytes that are no text, too.
        raise UserError(f"Tiny ImageNet: {part}: {getattr(e, 'strerror', None) or e}; mend it, or "
                        f"remove {folder} to download it again") from None
    return folder, [folder / "wnids.txt", part, *paths], lambda shape: (
        decode(paths, shape, f"take it from {TINY_URL}"), [rank[wnid] for wnid in wnids])

def find_folder(config, train):
    """Images of one's own, resized and centre-cropped: a folder with one sub-folder per class, or
    of images alone, or an .npz with one array (N,H,W,C) uint8 and, if there are, `labels` (N,):
    those to train on are data_root/train(.npz), where it exists, or data_root itself; the others
    data_root/val(.npz) or data_root/test(.npz)."""
    def place(*names):
        if found := [path for name in names if (path := root / name).exists()]:
            return found[0]
        missing = " or ".join(filter(None, names))
        raise UserError(f"data_root {root} has no {missing}, or is missing")

    root = Path(config.data_root)
    trained = place("train", "train.npz", "")
    where = trained if train else place("val", "val.npz", "test", "test.npz")
    if where.is_file():
        return where, [where], functools.partial(read_npz, where)
    for key in ("save_dir", "cache_dir"):
        if Path(getattr(config, key) or "/").resolve().is_relative_to(where.resolve()):
            raise UserError(f"{key} {getattr(config, key)} lies in data {where}: choose another")
    if not (paths := image_files.find_images(where)):
        raise UserError(f"{where} holds no images ({' '.join(sorted(image_files.SUFFIXES))})")
    names = [path.relative_to(where).parts[0] for path in paths if path.parent != where]
    if where == root and (other := {"val", "test"} & set(names)):
        raise UserError(f"{where}: {image_files.some(other)} beside classes, which belong in train")
    # All of the training's folders, but for links to what was walked already.
    classes = {path.name for path in trained.glob("[!.]*/") if trained.is_dir() and (
        path.name in names or not (train and path.is_symlink()))}
    if names and (strange := classes ^ set(names)):
        folders = " or in ".join(sorted({str(where), str(trained)}))
        raise UserError(f"class {image_files.some(strange)} has no images in {folders}")
    rank = {name: i for i, name in enumerate(sorted(classes))}
    labels = [rank[name] for name in names] or [-1] * len(paths)
    return where, paths, lambda shape: (decode(paths, shape), labels)

def read_npz(path, shape):
    """Images of `shape` (C,H,W) and labels of an .npz. UserError: others, labels of no sense."""
    arrays = files.read_npz(path)
    images, labels = image_files.images_in(path, arrays), arrays.get("labels")
    if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != (len(images),)
                               or labels.min() < 0):
        raise UserError(f"{path}: labels {labels.dtype} {list(labels.shape)} are no classes")
    if list(images.shape[1:]) != shape:
        raise UserError(f"{path}: images of {list(images.shape[1:])}, network.image_shape {shape}")
    return images, [-1] * len(images) if labels is None else labels

# {name: (function of config and train, (C,H,W) where it has only one)}. The function gives where a
# data set lies, the files that it is of, and a function that decodes them to a shape (C,H,W).
SETS = {"digits": (find_digits, [1, 8, 8]), "cifar10": (find_cifar, [3, 32, 32]),
        "cifar100": (find_cifar, [3, 32, 32]), "tinyimagenet": (find_tinyimagenet, [3, 64, 64]),
        "folder": (find_folder, None)}

def decode(paths, shape, remedy="replace or remove it"):
    """Decode image files to one array (N, *shape) uint8."""
    images = np.empty((len(paths), *shape), np.uint8)
    for i, image in enumerate(image_files.decode_all(
            paths, lambda path: image_files.decode_image(path, shape[0], shape[1:]), remedy)):
        images[i] = image
    return images

def cache_path(config, split, sources):
    """The decoded set's .npz, with its images in an .npy beside it, by a hash of its files, shape
    and decoder; None: it is not kept."""
    if not sources or not config.cache_dir:
        return None
    about = [f"{config.network.image_shape} {DECODED} {PIL.__version__}"]
    for path in sources:
        status = path.stat() if path.exists() else None
        about.append(f"{path} {status and (status.st_size, status.st_mtime_ns)}")
    digest = hashlib.sha256("\n".join(about).encode(errors="surrogateescape")).hexdigest()
    return Path(config.cache_dir) / "data" / f"{config.dataset}-{split}-{digest[:16]}.npz"

def read_kept(path):
    """What load() kept, None where there is nothing whole: images (N,C,H,W) uint8, mapped from the
    file, so that a machine's processes share them, and labels (N,)."""
    if found := files.read_cache(path, "labels", "sha256"):
        try:
            images = np.load(path.with_suffix(".npy"), mmap_mode="c")
            if digest(torch.from_numpy(images)) == found["sha256"]:
                return images, found["labels"]
            raise ValueError("it was changed")
        except (OSError, EOFError, ValueError, TypeError) as e:
            warn(f"{path.with_suffix('.npy')} does not serve ({e}): made anew")

def digest(images):
    """The SHA-256 of images (N,C,H,W) uint8: what a run was trained on, what a score is of."""
    return hashlib.sha256(images.cpu().numpy()).hexdigest()

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

def draw(config, step, images, labels, batch_gpu):
    """This process's part of a step's total batch of images (N,C,H,W) uint8 and labels (N,), as a
    list of passes of batch_gpu images on the labels' device: images (B,C,H,W) in [-1,1], flipped
    or augmented, noise levels (B,) and noise ~ N(0,1), labels (B,), -1 where they are dropped, and
    what the network is told of the augmentation, (B,9), or None."""
    device, B = labels.device, config.batch_size
    epoch, i = divmod(step, len(images) // B)
    index = epoch_order(len(images), config.seed, epoch)[i * B:(i + 1) * B]
    g = torch.Generator(device).manual_seed(diffusion.derive_seed(config.seed, step, NOISE))
    level = torch.randn(B, generator=g, device=device)
    noise = torch.randn(B, *images.shape[1:], generator=g, device=device)
    flip = torch.rand(B, generator=g, device=device) < (0.5 if config.flip else 0)
    dropped = torch.rand(B, generator=g, device=device) < config.label_dropout

    def mine(drawn):
        return drawn.chunk(distributed.world_size())[distributed.rank()]

    index, level, noise, flip, dropped = map(mine, (index, level, noise, flip, dropped))
    labels = torch.where(dropped, -1, labels[index.to(device)])
    if config.augment:
        done = mine(augmentation.draw(B, config.augment, g))
        y = augmentation.transform(batch(images, index, device), done)
        told = augmentation.numbers(done).split(batch_gpu)
    else:
        y, told = batch(images, index, device, flip), [None] * (len(index) // batch_gpu)
    return list(zip(*(part.split(batch_gpu) for part in (y, level, noise, labels)), told,
                    strict=True))

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
