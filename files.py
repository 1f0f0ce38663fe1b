"""Files: written whole or not at all, one run per folder, and what a disk refuses is one clear line."""

import contextlib
import fcntl
import hashlib
import os
import secrets
import shlex
import socket
import sys
import time
from datetime import datetime
from pathlib import Path

from runtime import UserError, warn

SHOWN = 75      # Seconds after which a file on a network disk shows on all machines: NFS remembers for up to 60.


def check_writable(folder):
    """Raise UserError unless `folder` can be made and written to; makes nothing."""
    existing = Path(folder).absolute()
    try:
        while not existing.exists():
            existing = existing.parent
    except OSError as e:
        raise UserError(f"save_dir {folder}: {e.strerror}") from None
    if not existing.is_dir():
        raise UserError(f"save_dir {folder}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"save_dir {folder}: no right to write in {existing}")


def make_folder(folder):
    """Make a folder and its parents. Raises UserError where that fails."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot make the folder {folder}: {e.strerror}") from None
    return Path(folder)


def sha256(path):
    """The SHA-256 of a file, as hex digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextlib.contextmanager
def lock(folder, rt):
    """Keep `folder` for this run alone while the context lasts: an flock, which ends with the process that holds it.

    All processes enter. Raises UserError that says who holds it, or that the machines do not share the folder.
    """
    path = Path(folder) / ".lock"

    def take():
        make_folder(folder)
        file = held.enter_context(open(path, "a+"))             # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"{folder} is in use by {file.read().strip() or 'another process'}: "
                            f"wait for it, stop it, or choose another folder") from None
        except OSError as e:                # A file system without locks.
            warn(f"{folder} cannot be locked ({e.strerror}): see to it that no other run writes there")
        holder = (f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}: "
                  f"{shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}")
        with contextlib.suppress(OSError):
            file.truncate(0)
            file.write(holder)
            file.flush()
            os.fsync(file.fileno())         # For the other machines.
            return holder
        return ""                           # A full disk.

    def is_shared(holder):
        for _ in range(SHOWN):
            try:
                if path.read_text() == holder:
                    return True
            except PermissionError:         # Some network disks let nobody read what is locked.
                return True
            except OSError:
                pass
            time.sleep(1)
        return False

    with contextlib.ExitStack() as held:
        holder = rt.on_main(take)
        if rt.local_world_size < rt.world_size and holder and not rt.all(rt.local_rank > 0 or is_shared(holder)):
            error = UserError(f"{folder} is not one folder for all machines: it must be on a disk that they share")
            error.said = not rt.is_main
            raise error
        yield
        if rt.is_main:
            with contextlib.suppress(OSError):
                os.truncate(path, 0)


@contextlib.contextmanager
def reported(path):
    """A failed write of `path` is a UserError that names it."""
    try:
        yield
    except (OSError, RuntimeError) as e:    # torch.save raises RuntimeError, on top of the reason.
        reason = e.__context__ if isinstance(e.__context__, OSError) else e
        raise UserError(f"cannot write {path}: {getattr(reason, 'strerror', None) or reason}") from None


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary name beside `path`; what is written there becomes `path` at the end, whole or not at all.

    Raises UserError naming the path where writing fails (disk full, no rights).
    """
    temporary = Path(path).with_name(f".{Path(path).name}.{secrets.token_hex(4)}.tmp")
    try:
        with reported(path):
            yield temporary
            with open(temporary, "rb") as f:
                os.fsync(f.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def clean(folder, hours=0):
    """Remove the temporary files that killed processes left in a folder, those older than `hours`."""
    for path in Path(folder).glob(f".*.{8 * '[0-9a-f]'}.tmp"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime <= time.time() - hours * 3600:
                path.unlink()
