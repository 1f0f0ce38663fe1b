"""Files: written whole or not at all, one run per folder."""

import contextlib
import hashlib
import os
from pathlib import Path
import numpy as np
from filelock import FileLock, Timeout
from edm2.errors import UserError, warn

def sha256(path):
    """The SHA-256 of a file, as hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

@contextlib.contextmanager
def locked(folder):
    """Keep a folder to this process; it is made. Raises UserError where another one has it."""
    if Path(folder).is_symlink() and not Path(folder).exists():
        raise UserError(f"{folder} is a link to what does not exist: {Path(folder).readlink()}")
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(Path(folder) / ".lock", timeout=0):
            yield
    except Timeout:
        raise UserError(f"{folder} is in use by another run: wait, or choose another") from None

@contextlib.contextmanager
def atomic(path):
    """Yield a temporary name beside `path`; what is written there becomes it, whole or not at all.
    Raises UserError naming the path where writing fails (disk full, no rights)."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(exist_ok=True)    # Not what it lies in: a save_dir that went is missed.
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as e:    # torch.save raises RuntimeError, on top of the reason.
        reason = e.__context__ if isinstance(e.__context__, OSError) else e
        reason = getattr(reason, "strerror", None) or reason
        raise UserError(f"cannot write {path}: {reason}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()

def write_cache(path, **arrays):
    """Leave arrays in a cache, unless path is None; where that fails, say so and go on."""
    try:
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic(path) as temporary, open(temporary, "wb") as file:
                (np.save if path.suffix == ".npy" else np.savez)(file, **arrays)
    except (UserError, OSError) as e:
        warn(f"{path} is not kept for the next time: {e}")

def read_cache(path, *names):
    """What write_cache() left; None where there is nothing or, which it says, it does not serve."""
    try:
        if path and path.exists():
            arrays = read_npz(path)
            return {name: arrays[name] for name in names}
    except (UserError, KeyError) as e:
        warn(f"{path} does not serve ({e}): made anew")

def read_npz(path):
    """The arrays of an .npz by name. Runs no code from it. UserError where it is not whole."""
    try:
        if isinstance(file := np.load(path, allow_pickle=False), np.ndarray):
            raise ValueError("it is an .npy, of one array: write it with numpy.savez")
        with file:
            arrays = {name: file[name] for name in file.files}      # Its checksums are looked at.
        if others := [name for name, a in arrays.items() if not isinstance(a, np.ndarray)]:
            raise ValueError(f"{others[0]} in it is no array: unpack it")
        return arrays
    except Exception as e:      # numpy and zipfile raise what a damage leads them to.
        reason = getattr(e, "strerror", None) or ("no arrays" if "pickle" in str(e) else e)
        raise UserError(f"{path} is no folder and not a whole .npz file: {reason}") from None

def remove_temporaries(folder):
    """Remove what killed processes left in a folder and just below; deeper, sample.py may work."""
    for path in [*Path(folder).glob(".*.tmp"), *Path(folder).glob("*/.*.tmp")]:
        path.unlink(missing_ok=True)
