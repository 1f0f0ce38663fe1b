"""Files: written whole or not at all, one run per folder."""

import contextlib
import hashlib
import os
from pathlib import Path
from filelock import FileLock, Timeout
from edm2.errors import UserError

def sha256(path):
    """The SHA-256 of a file, as hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

@contextlib.contextmanager
def locked(folder):
    """Keep a folder to this process; it is made. Raises UserError where another one has it."""
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

def remove_temporaries(folder):
    """Remove what killed processes left in a folder and just below; deeper, sample.py may work."""
    for path in [*Path(folder).glob(".*.tmp"), *Path(folder).glob("*/.*.tmp")]:
        path.unlink(missing_ok=True)
