"""What every command needs around the mathematics: errors, processes, seeds, files, logs."""

import contextlib
import functools
import hashlib
import json
import math
import os
import shlex
import socket
import sys
from dataclasses import dataclass
from datetime import datetime, timedelta
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

FULL = 50_000       # Samples of a figure that can be compared with published ones.

# ----------------------------------------------------------------------------------------------------------------------
# Errors that a user can cause: one line on stderr, exit code 2.

class UserError(Exception):
    """Something the user can mend; the message names the file, key or value and what to do."""


def command(main):
    """Decorate a command's main(): a UserError becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    @functools.wraps(main)
    def run(*args):
        name = Path(sys.argv[0]).name
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            name += f" (process {os.environ['RANK']})"
        try:
            main(*args)
            if dist.is_initialized():
                dist.barrier()              # No process leaves while another still needs it.
        except UserError as e:
            code, message = 2, f"{name}: error: {' '.join(str(e).split())}"
        except BrokenPipeError:             # Such as of `| head`.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code, message = 0, None
        except OSError as e:                # A full disk, missing rights, a lost mount: wherever it shows.
            code, message = 2, f"{name}: error: {e.filename or ''} {e.strerror or e}"
        except torch.OutOfMemoryError:
            code, message = 2, f"{name}: error: out of GPU memory; lower --batch_gpu (or n_channels)"
        except RuntimeError as e:
            if not dist.is_initialized() or not (isinstance(e, dist.DistBackendError) or "gloo" in str(e)):
                raise
            code, message = 1, f"{name}: lost contact with another process, whose own line says why"
        except KeyboardInterrupt:
            code, message = 130, f"{name}: interrupted"
        else:
            code, message = 0, None
        if message:
            print(message, file=sys.stderr, flush=True)
        if dist.is_initialized():           # Others may wait in a collective, and gloo's threads, torn down with the
            sys.stdout.flush()              # interpreter, abort a process now and then: leave at once.
            sys.stderr.flush()
            os._exit(code)
        sys.exit(code)
    return run


# ----------------------------------------------------------------------------------------------------------------------
# Processes and devices: torchrun's or just this one.

@dataclass
class Runtime:
    """This process among all: rank 0..world_size-1 over all nodes, local_rank 0..local_world_size-1 on its node."""
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @property
    def is_main(self):
        """True in the one process that writes files and prints."""
        return self.rank == 0

    def print(self, *args):
        """Print in the main process."""
        if self.is_main:
            print(*args, flush=True)

    def barrier(self):
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()

    def all_reduce(self, tensor):
        """Sum a tensor over all processes, in place, and return it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, value):
        """Return the main process's value in all processes. Every process must call it."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def bar(self, total, unit, desc=None, initial=0, shared=False):
        """A progress bar of the main process; `shared`: it counts its own share, the bar shows that of all."""
        return tqdm(total=total, unit=unit, desc=desc, initial=initial, disable=not self.is_main,
                    unit_scale=self.world_size if shared and self.world_size > 1 else False,
                    mininterval=0.5 if sys.stderr.isatty() else 30)

    @contextlib.contextmanager
    def in_turns(self):
        """The main process goes first, then one of each other node, then the rest: for downloads."""
        turn = 0 if self.is_main else 1 if self.local_rank == 0 else 2
        for _ in range(turn):
            self.barrier()
        yield
        for _ in range(2 - turn):
            self.barrier()


def start():
    """Join torchrun's processes, where there are any, and choose the device and the CPU threads. Return a Runtime.

    Raises UserError where a node has fewer GPUs than processes.
    """
    env = {name: int(os.environ.get(name.upper(), default)) for name, default in
           {"rank": 0, "world_size": 1, "local_rank": 0, "local_world_size": 1}.items()}
    if torch.cuda.is_available():
        if env["local_world_size"] > torch.cuda.device_count():
            raise UserError(f"{env['local_world_size']} processes on this machine, but {torch.cuda.device_count()} "
                            f"GPUs: lower --nproc_per_node")
        device = torch.device("cuda", env["local_rank"])
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    else:
        device = torch.device("cpu")
        # torchrun sets OMP_NUM_THREADS=1: share the cores that this process may use.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // env["local_world_size"]))
    socket.setdefaulttimeout(60)        # A download from a dead network is an error, not a hang.
    if env["world_size"] > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30),
                                device_id=device if device.type == "cuda" else None)
    return Runtime(**env, device=device)


def device_name(device):
    """The name of a device, as it stands beside a figure."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)"


# ----------------------------------------------------------------------------------------------------------------------
# Seeds: all that is random is a function of (seed, what it is for), never of the process or of what came before.

def mix(*numbers):
    """A 63-bit seed from non-negative numbers, well mixed: neighbours have nothing in common."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


# ----------------------------------------------------------------------------------------------------------------------
# Files and logs.

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
def reported(path):
    """A failed write of `path` is a UserError that names it."""
    try:
        yield
    except (OSError, RuntimeError) as e:    # torch.save raises RuntimeError where the disk is full.
        raise UserError(f"cannot write {path}: {getattr(e, 'strerror', None) or e}") from None


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary name beside `path`; what is written there becomes `path` at the end, whole or not at all.

    Raises UserError naming the path where writing fails (disk full, no rights).
    """
    temporary = Path(path).with_name(f".{Path(path).name}.tmp")
    try:
        with reported(path):
            yield temporary
            with open(temporary, "rb") as f:
                os.fsync(f.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def step_of(line):
    """The step of a line of metrics.jsonl; infinity for a line that a crash has cut."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def seen_mimg(config, epoch, n_images):
    """Million training images seen by the end of an epoch, of n_images in the training set."""
    return (epoch + 1) * (n_images // config["batch_size"]) * config["batch_size"] / 1e6


def record(config, results, device):
    """Append results to save_dir/results.jsonl, one line each, and show them in TensorBoard at their epochs.

    results: (TensorBoard's name, {figure, value, epoch, ...}) each; the command, versions, device and date are added.
    """
    from torch.utils.tensorboard import SummaryWriter  # Slow to import: only where it is used.
    common = {"dataset": config["dataset"], "net_type": config["net_type"],
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "versions": {name: metadata.version(name) for name in ("torch", "torchvision", "torch-fidelity", "numpy")},
            "processes": int(os.environ.get("WORLD_SIZE", 1)), "device": device_name(device),
            "date": datetime.now().astimezone().isoformat(timespec="seconds")}
    path = make_folder(config["save_dir"]) / "results.jsonl"
    cut = path.exists() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
    with reported(path), open(path, "a") as f:
        f.write("\n" * cut + "".join(json.dumps(result | common) + "\n" for _, result in results))
    # In a folder of their own: TensorBoard follows the newest file of a folder, and training may still write its own.
    with SummaryWriter(Path(config["save_dir"]) / "tensorboard" / "scores") as tensorboard:
        for name, result in results:
            tensorboard.add_scalar(name, result["value"], result["epoch"])


class Log:
    """Figures of a run: one JSON line each in save_dir/metrics.jsonl, and TensorBoard in save_dir/tensorboard.

    A run that goes on from `step` drops the lines after it. Active in the main process alone.
    """

    def __init__(self, save_dir, step, active):
        self.active = active
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter  # Slow to import: only where it is used.
        path = Path(save_dir) / "metrics.jsonl"
        kept = [line for line in path.read_text(errors="replace").splitlines(keepends=True)
                if step_of(line) <= step] if path.exists() else []
        with atomic(path) as temporary:
            temporary.write_text("".join(kept))
        self.file = path.open("a", buffering=1)
        self.tensorboard = SummaryWriter(Path(save_dir) / "tensorboard", purge_step=step + 1)

    def write(self, step, figures):
        """Write figures (a dict of numbers and None) at a step, counted in steps done."""
        if self.active:
            plain = {k: v if v is None or math.isfinite(v) else None for k, v in figures.items()}
            self.file.write(json.dumps({"step": step, **plain}) + "\n")
            for name, value in figures.items():
                if value is not None:
                    self.tensorboard.add_scalar(name, value, step)

    def image(self, step, name, image):
        """Show an image (C,H,W) uint8 in TensorBoard."""
        if self.active:
            self.tensorboard.add_image(name, image, step)

    def close(self):
        """Write out what is pending."""
        if self.active:
            self.file.close()
            self.tensorboard.close()
