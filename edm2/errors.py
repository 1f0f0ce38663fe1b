"""How a command ends: a user's error in one line and exit code 2, a signal in 128 + its number."""

import io
import os
import signal
import sys
import threading
from pathlib import Path
import torch
import torch.distributed as dist

class UserError(Exception):
    """Something the user can mend; the message names the file, key or value and what to do."""
    said = False        # True where another process prints the same.

class Stopped(BaseException):
    """A signal ends the command: Stopped(its number, what was saved); passes `except Exception`."""

class Stream(io.FileIO):
    """The file of a standard stream: what it cannot show (full, a broken pipe) is dropped."""
    def write(self, content):
        try:
            return super().write(content)
        except OSError:
            return len(content)

def warn(message):
    """Say something in one line on stderr."""
    process = f" (process {os.environ.get('RANK')})" * (os.environ.get("WORLD_SIZE", "1") != "1")
    line = " ".join([f"{Path(sys.argv[0]).name}{process}:", *str(message).split()])
    sys.stderr.write(f"{line}\n")       # At once, or two processes write into each other's line.

def command(main):
    """Decorate a command's main(): its errors become one line and an exit code."""
    def run():
        code, message = 0, None
        while os.open(os.devnull, os.O_RDWR) < 3:           # Closed streams: no file is to be one.
            pass
        for name, fd in (("stdout", 1), ("stderr", 2)):
            if (stream := getattr(sys, name)) is getattr(sys, f"__{name}__"):
                file = io.BufferedWriter(Stream(fd, "w", closefd=False))
                setattr(sys, name, io.TextIOWrapper(
                    file, stream and stream.encoding, errors="replace", line_buffering=True))
        # A thread that could not write (TensorBoard's) is heard of where its work is waited for.
        threading.excepthook = lambda e: isinstance(e[1], OSError) or threading.__excepthook__(e)
        try:
            main()
        except UserError as e:
            code, message = 2, None if e.said else f"error: {e}"
        except Stopped as e:
            code, name = 128 + e.args[0], signal.Signals(e.args[0]).name
            message = f"stopped by {name} {e.args[1]}: the same command goes on"
        except KeyboardInterrupt:
            code, message = 128 + signal.SIGINT, "interrupted"
        except OSError as e:                # A full disk, missing rights, a lost mount.
            code, message = 2, f"error: {e.filename or ''} {e.strerror or e}"
        except (torch.OutOfMemoryError, MemoryError):
            code, message = 2, "error: out of memory; lower --batch_gpu, n_channels or image_shape"
        except RuntimeError as e:
            if type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
                reason = str(e).partition("\n")[0]
                code, message = 2, f"error: torch.compile: {reason}; go on with --no-compile"
            elif dist.is_initialized() and (isinstance(e, dist.DistError) or "gloo" in str(e)):
                code, message = 1, "lost contact with another process, whose own line says why"
            else:
                raise
        if message:
            warn(message)
        if dist.is_initialized():
            if code == 0:
                dist.barrier()              # No process leaves while another still needs it.
            sys.stdout.flush()
            os._exit(code)                  # After an error the others may wait in a collective.
        sys.exit(code)
    return run
