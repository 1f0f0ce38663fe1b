"""Files of images, for training, samples and scores: found, decoded and written in one way."""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from edm2 import distributed, files, machine
from edm2.errors import UserError, warn

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
CHUNK = 256     # Images that are decoded before they are asked for.

def find_images(folder, say=True):
    """The paths of the images in and below a folder, sorted. Hidden names, what is no image by its
    suffix, and links to what was walked already are left out, and named if `say`. Raises UserError
    for images beside folders of images: which are meant is not known."""
    def fail(error):
        raise error

    found, left_out, walked = [], [], {}
    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        parent, real = Path(parent), os.path.realpath(parent)
        if walked.setdefault(real, parent) != parent:
            left_out.append(parent)
            folders.clear()
            continue
        left_out += [parent / name for name in folders if name.startswith(".")]
        folders[:] = sorted((name for name in folders if not name.startswith(".")),
                            key=lambda name: ((parent / name).is_symlink(), name))    # Links last.
        for path in map(parent.joinpath, names):
            image = path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
            (found if image else left_out).append(path)
    if left_out and say and distributed.rank() == 0:
        warn(f"{folder}: {some(os.path.relpath(path, folder) for path in left_out)} left out: "
             f"hidden, no image ({' '.join(sorted(SUFFIXES))}) or seen already")
    if 0 < len(loose := [path.name for path in found if path.parent == Path(folder)]) < len(found):
        raise UserError(f"{folder}: images, {some(loose)}, beside folders of images: move one away")
    return sorted(found)

def some(names, most=3):
    """Names in short: their number, where there are several, and the first of them."""
    names = sorted(map(str, names))
    return (f"{len(names):,} (" * (len(names) > 1) + ", ".join(names[:most])
            + ", ..." * (len(names) > most) + ")" * (len(names) > 1))

def decode_all(items, decode, remedy="replace or remove it"):
    """Yield decode(item) of each item, in order, by threads: Pillow decodes without the GIL. Raises
    UserError, in the end, with the number and the first of those that decode() raised."""
    failed = []
    with ThreadPoolExecutor(machine.cores()) as pool:
        for start in range(0, len(items), CHUNK):
            for future in [pool.submit(decode, item) for item in items[start:start + CHUNK]]:
                if isinstance(error := future.exception(), UserError):
                    failed.append(error)
                elif not failed:
                    yield future.result()
    if failed:
        raise UserError(f"of {len(items):,} images {some(failed)}: {remedy}")

def decode_image(path, channels, size=None):
    """Decode an image file to (C,H,W) uint8, upright as its EXIF says, C 1 (gray) or 3 (RGB); with
    a size (H,W) resized and centre-cropped to that. Raises UserError for what is no whole image."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):                   # convert() would make it white.
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            elif image.mode in ("I", "F"):
                raise ValueError("its pixels have 32 bits, where black and white are unknown")
            image = image.convert("L" if channels == 1 else "RGB")
            if size:
                image = ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS)
            return np.asarray(image).reshape(*image.size[::-1], -1).transpose(2, 0, 1)
    except Exception as e:      # Pillow raises OSError, ValueError, SyntaxError and more.
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"{path} is not a whole image ({reason})") from None

def is_gray(path):
    """Whether an image file has no colours; what cannot be read has none."""
    try:
        with Image.open(path) as image:
            return image.mode in ("1", "L", "LA") or image.mode.startswith("I;16")
    except Exception:           # decode_image() says it.
        return True

def images_in(path, arrays):
    """The images (N,C,H,W) uint8 of an .npz with one such array, or (N,H,W,C). UserError: none."""
    found = [a for a in arrays.values() if a.dtype == np.uint8 and a.ndim == 4 and len(a)
             and {1, 3} & {a.shape[1], a.shape[3]}]
    if len(found) != 1:
        held = ", ".join(f"{name} {a.dtype} {list(a.shape)}" for name, a in arrays.items())
        raise UserError(f"{path} holds {held or 'nothing'}: expected one uint8 array of images "
                        f"(N,H,W,C) or, to score, statistics mu (d,) and sigma (d,d)")
    return found[0].transpose(0, 3, 1, 2) if found[0].shape[3] in (1, 3) else found[0]

def save_png(image, path):
    """Write an image (C,H,W) uint8, on the CPU, as a PNG: whole or not at all."""
    pixels = image.permute(1, 2, 0).numpy()
    with files.atomic(path) as temporary:
        Image.fromarray(pixels[..., 0] if len(image) == 1 else pixels).save(temporary, "PNG")

def layout(n, n_classes, n_images=10**9):
    """Which of n_images samples, of which number i has class i % n_classes, a grid of at most n
    shows: their numbers, row by row, and how many are in a row. With classes a row is one of them:
    the first ones, where there are more than 16."""
    if not n_classes:
        return range(n), math.ceil(math.sqrt(n))
    n_rows = min(n, n_images, n_classes if n_classes <= 16 else 8)
    n_columns = max(1, min(n // n_rows, n_images // n_classes))
    return [row + i * n_classes for row in range(n_rows) for i in range(n_columns)], n_columns

def grid(images, n_columns, names=()):
    """Images (N,C,H,W) uint8 side by side as one (C,H',W') uint8, n_columns wide whatever N, and
    the rows' names beside them; small ones are enlarged."""
    from torchvision.utils import make_grid
    scale = max(1, 32 // images.shape[-1])
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    blank = images.new_full((max(0, n_columns - len(images)), *images.shape[1:]), 128)
    picture = make_grid(torch.cat([images, blank]), n_columns, padding=2, pad_value=128)
    if not len(names):
        return picture
    margin = Image.new("RGB", (8 + 8 * max(len(str(name)) for name in names), picture.shape[1]))
    for row, name in enumerate(names):
        height = 2 + (row + 0.5) * (images.shape[2] + 2)
        ImageDraw.Draw(margin).text((4, height), str(name), anchor="lm", font_size=14)
    return torch.cat([torch.from_numpy(np.array(margin)).permute(2, 0, 1), picture], dim=2)
