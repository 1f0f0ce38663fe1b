"""The processes of torchrun, or just this one: who is who, what they tell each other, signals."""

import contextlib
import os
import signal
import socket
import sys
import warnings
from datetime import timedelta
import torch
import torch.distributed as dist
from tqdm import tqdm
from edm2 import machine
from edm2.errors import Stopped, UserError

def init():
    """Join torchrun's processes, where there are any; return this one's torch.device. Raises
    UserError where a machine has fewer GPUs than processes, or one that PyTorch cannot use, or
    where the processes cannot meet."""
    machine.check_launch()
    local_size, gpu = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), None
    with warnings.catch_warnings(action="ignore"):      # The driver is too old: see below.
        is_available = torch.cuda.is_available()
    if is_available:
        if local_size > (n_gpus := torch.cuda.device_count()):
            raise UserError(f"{local_size} processes, but {n_gpus} GPUs: lower --nproc_per_node")
        gpu = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(gpu)
        machine.check_capability(gpu)
        torch.backends.cudnn.benchmark = True
    else:                               # torchrun sets OMP_NUM_THREADS=1: share the cores instead.
        machine.check_driver()
        torch.set_num_threads(max(1, machine.cores() // local_size))
    socket.setdefaulttimeout(60)        # A download from a dead network is an error, not a hang.
    if os.environ.get("WORLD_SIZE", "1") != "1":
        env, store = os.environ, None
        try:
            if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and env["GROUP_WORLD_SIZE"] == "1":
                # torchrun's store outlives a restart, with the addresses of before.
                store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
                store = dist.PrefixStore(env["TORCHELASTIC_RESTART_COUNT"], store)
            dist.init_process_group("nccl" if gpu else "gloo", device_id=gpu, store=store,
                                    timeout=timedelta(minutes=30), rank=int(env["RANK"]),
                                    world_size=int(env["WORLD_SIZE"]))
        except (RuntimeError, ValueError, KeyError) as e:
            raise UserError(f"WORLD_SIZE is set ({e}): start with torchrun, or unset it") from None
    return gpu or torch.device("cpu")

def rank():
    """This process's number among all, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0

def world_size():
    """The number of processes, over all machines."""
    return dist.get_world_size() if dist.is_initialized() else 1

def print0(*args):
    """Print in rank 0."""
    if rank() == 0:
        print(*args, flush=True)

def progress(total, unit, initial=0, desc=None):
    """A tqdm bar of rank 0."""
    return tqdm(total=total, unit=unit, desc=desc, initial=initial, disable=rank() > 0,
                mininterval=0.5 if sys.stderr.isatty() else 30)

def barrier():
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()

def all_reduce(tensor):
    """Sum a tensor over all processes, in place, and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor

def on_rank0(function, *args):
    """Return in all processes what a function returns in rank 0, or raise its UserError there."""
    try:
        found = [function(*args) if rank() == 0 else None]
    except UserError as e:
        found = [e]
    if world_size() > 1:
        dist.broadcast_object_list(found)
    if isinstance(found[0], UserError):
        found[0].said = rank() > 0
        raise found[0]
    return found[0]

@contextlib.contextmanager
def rank0_first():
    """The first process of each machine goes first, the others follow: for downloads and caches."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:
        barrier()
    yield
    if first:
        barrier()

class Signals:
    """SIGTERM, SIGINT and, where the system has them, SIGUSR1 (Slurm's warning) and, unless nohup
    ignores it, SIGHUP: they raise Stopped or, deferred, are noted for agree()."""
    def __init__(self):
        self.signum, self.deferred = 0, False
        self.group = dist.new_group(backend="gloo") if world_size() > 1 else None
        for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):
            signum = getattr(signal, name, None)        # Windows has not all of them.
            if signum and signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, self.note)

    def defer(self, deferred):
        """Note signals from now on; or let them, and one that was noted, raise Stopped."""
        self.deferred = deferred
        if self.signum and not deferred:
            self.note(self.signum)

    def note(self, signum, frame=None):
        """The handler."""
        self.signum = self.signum or signum
        if not self.deferred:
            raise Stopped(signum, "with nothing unsaved")

    def agree(self, save):
        """(number of a signal that any process got or 0, whether any asks to save), in all."""
        asked = torch.tensor([self.signum, int(save)])
        if self.group is not None:
            dist.all_reduce(asked, dist.ReduceOp.MAX, group=self.group)     # No GPU waits for it.
        return asked.tolist()
