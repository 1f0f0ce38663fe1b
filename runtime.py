"""What every command needs around the mathematics: errors, processes, faults, seeds."""

import contextlib
import ctypes
import functools
import os
import secrets
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

FULL = 50_000                   # Samples of a figure that can be compared with published ones.
MEET = timedelta(minutes=5)     # How long processes wait for each other at the start.

# ----------------------------------------------------------------------------------------------------------------------
# Errors that a user can cause: one line on stderr, exit code 2.

class UserError(Exception):
    """Something the user can mend; the message names the file, key or value and what to do."""

    said = False        # True where another process says the same.


class Stopped(Exception):
    """The run leaves because of a signal: Stopped(signal number, what was saved)."""


def command_name():
    """The command as it stands before its messages, such as "train.py (process 1)"."""
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    return Path(sys.argv[0]).name + f" (process {os.environ.get('RANK', '?')})" * several


def warn(message):
    """Say something in one line on stderr."""
    print(f"{command_name()}: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


class Tolerant:
    """A stream that ends no run: what a full disk or a lost terminal does not take is dropped. A closed pipe raises."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        """Write what can be written."""
        self.attempt(self.stream.write, text)

    def flush(self):
        """Bring out what can be written."""
        self.attempt(self.stream.flush)

    def attempt(self, function, *args):
        """Call a function of the stream."""
        try:
            function(*args)
        except BrokenPipeError:
            if self.stream is not sys.__stderr__:
                raise
        except OSError:
            pass


def quiet_about_files(thread):
    """An excepthook of threads: who waits for a thread that could not read or write says so."""
    if not isinstance(thread.exc_value, OSError):
        threading.__excepthook__(thread)


def command(main):
    """Decorate a command's main(): a UserError becomes one line on stderr and exit code 2, a signal 128 + its number.
    """
    @functools.wraps(main)
    def run(*args):
        name = command_name()
        threading.excepthook = quiet_about_files
        sys.stdout, sys.stderr = Tolerant(sys.stdout), Tolerant(sys.stderr)
        try:
            main(*args)
            if dist.is_initialized():
                Watch.active = False        # Who leaves now is not lost.
                dist.barrier()              # No process leaves while another still needs it.
        except UserError as e:
            code, message = 2, None if e.said else f"{name}: error: {' '.join(str(e).split())}"
        except Stopped as e:
            signum, saved = e.args
            code = 128 + signum
            message = None if saved is None else f"{name}: stopped by {signal.Signals(signum).name}{saved}"
        except BrokenPipeError:             # Such as of `| head`.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code, message = 0, None
        except OSError as e:                # A full disk, missing rights, a lost mount: wherever it shows.
            code, message = 2, f"{name}: error: {e.filename or ''} {e.strerror or e}"
        except torch.OutOfMemoryError:
            code, message = 2, f"{name}: error: out of GPU memory; lower --batch_gpu (or n_channels)"
        except RuntimeError as e:
            if not dist.is_initialized() or not (isinstance(e, dist.DistError) or "gloo" in str(e)):
                raise
            Watch.suspect()
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
    job: dist.Store | None = None   # torchrun's store, which outlives its restarts.

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

    def all(self, value):
        """Whether a value is true in all processes. Every process must call it."""
        return self.all_reduce(torch.tensor(int(not value), device=self.device)).item() == 0

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

    def on_main(self, function, *args):
        """Return in all processes what a function returns in the main one; a UserError of it is raised in all."""
        value = error = None
        if self.is_main:
            try:
                value = function(*args)
            except UserError as e:
                error = str(e)
        value, error = self.agree((value, error))
        if error:
            error = UserError(error)
            error.said = not self.is_main
            raise error
        return value

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

    Raises UserError where a node has fewer GPUs than processes, and for variables that torchrun has not set.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    said = {name: os.environ[name] for name in names if name in os.environ}
    if said and not (len(said) == len(names) and all(value.isdecimal() for value in said.values())):
        raise UserError(f"the environment says {', '.join(f'{name}={value}' for name, value in said.items())}, as "
                        f"if by torchrun, which sets {', '.join(names)} to numbers: start with torchrun, or unset them")
    env = dict(zip((name.lower() for name in names), map(int, said.values() or (0, 1, 0, 1)), strict=True))
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
        torch.set_num_threads(max(1, cores() // env["local_world_size"]))
        keep_freed_memory()
    socket.setdefaulttimeout(60)        # A download from a dead network is an error, not a hang.
    store, under_torchrun = None, os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        if env["world_size"] > 1 or under_torchrun:
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=MEET,
                                  is_master=env["rank"] == 0 and not under_torchrun)
        if env["world_size"] > 1:
            attempt = meet(store, env["rank"], env["world_size"])
            store.set_timeout(timedelta(minutes=30))
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30),
                                    store=dist.PrefixStore(attempt, store), rank=env["rank"],
                                    world_size=env["world_size"], device_id=device if device.type == "cuda" else None)
            Watch(env["rank"], env["world_size"], attempt)
    except (RuntimeError, ValueError, KeyError) as e:
        raise UserError(f"cannot join the other processes: {e!r}"[:500]) from None
    return Runtime(**env, device=device, job=store)


def keep_freed_memory():
    """Let glibc keep what is freed for the next tensors: the system would give back every page anew, filled with zeros
    (benchmarks/README.md). Elsewhere nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        if mallopt(-3, 2 ** 30) or mallopt(-3, 2 ** 25):        # M_MMAP_THRESHOLD (an old glibc takes 2^25 at most):
            mallopt(-1, 2 ** 31 - 1)        # tensors come from the heap, which (M_TRIM_THRESHOLD) does not shrink.


def cores():
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def meet(store, rank, world_size):
    """Agree with the other processes on a name for this attempt, and return it.

    torchrun's store outlives a restart, and the attempts that it counts differ from machine to machine. So process 0
    makes up a name, each process answers with a word of its own, and process 0 confirms the words: those of an earlier
    attempt are others. Raises RuntimeError where a process does not come.
    """
    word, words = secrets.token_hex(8), []
    end = time.monotonic() + MEET.total_seconds()
    while word not in words:
        if time.monotonic() > end:
            raise RuntimeError(f"process 0 has not answered for {MEET}")
        if rank == 0:
            store.set("edm2/attempt", name := secrets.token_hex(8))
        else:
            name = store.get("edm2/attempt").decode()
        store.set(f"{name}/word/{rank}", word)
        if rank == 0:
            store.set(f"{name}/words", ",".join(store.get(f"{name}/word/{i}").decode() for i in range(world_size)))
        if store.check([f"{name}/words"]):
            words = store.get(f"{name}/words").decode().split(",")
        if word not in words:
            time.sleep(0.1)
    return name


class Watch:
    """Notices lost processes: each beats twice a second in a key of torchrun's store, process 0 looks at all, all at 0.

    A process whose beat stands still for LOST seconds ends the job, in a line that names it. A collective that fails
    calls for a closer look: FAILED seconds then do. Slow processes beat as well, whatever they wait for.
    """
    BEAT, LOST, FAILED = 0.5, 15, 2         # Seconds.
    active = False
    store = None

    def __init__(self, rank, world_size, attempt):
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                              timeout=timedelta(seconds=10))
        Watch.store = dist.PrefixStore(f"{attempt}/watch", store)
        Watch.store.set(f"who/{rank}", f"{rank} (pid {os.getpid()} on {socket.gethostname()})")
        Watch.store.set(f"beat/{rank}", "0")
        dist.barrier()                      # All keys exist.
        Watch.active = True
        others = range(1, world_size) if rank == 0 else [0]
        threading.Thread(target=self.run, args=(rank, others), daemon=True).start()

    def run(self, rank, others):
        """Beat and look, until a process is lost or this one is done."""
        beats, ages, n = dict.fromkeys(others), dict.fromkeys(others, 0), 0
        while True:
            try:
                n += 1
                self.store.set(f"beat/{rank}", str(n))
                for other in others:        # Ages count own beats: if all processes were stopped, none is lost.
                    beat = self.store.get(f"beat/{other}")
                    ages[other] = ages[other] + 1 if beat == beats[other] else 0
                    beats[other] = beat
                limit = (self.FAILED if self.store.check(["suspect"]) else self.LOST) / self.BEAT
                lost = [self.store.get(f"who/{other}").decode() for other in others if ages[other] > limit]
                if lost:
                    self.store.set("lost", ", ".join(lost))
                if self.store.check(["lost"]):
                    self.leave(f"process {self.store.get('lost').decode()} is lost: it ended or its machine failed")
            except RuntimeError:            # Of the store.
                self.leave("lost contact with the machine of process 0")
            time.sleep(self.BEAT)

    @staticmethod
    def leave(message):
        """End this process with one line, unless it is done anyway."""
        if Watch.active:
            warn(f"error: {message}; started again, the same command goes on")
            os._exit(1)

    @staticmethod
    def suspect():
        """A collective has failed: give the watch the time to say which process is lost, and to leave."""
        with contextlib.suppress(RuntimeError):
            Watch.store.set("suspect", "1")
            time.sleep(4 * Watch.FAILED)


class Signals:
    """SIGTERM, SIGINT and SIGHUP in training, and what all processes agree on after each step.

    The first signal lets the step end, so that it can be saved; a second SIGINT leaves at once. While there is nothing
    to save (`unsaved` is False) the first signal leaves, after wait_for_save(), for one that is still being written.
    A thread does so: Python's own handlers would wait for the end of a backward pass or of torch.compile.
    """

    def __init__(self, rt, wait_for_save):
        self.signum, self.unsaved, self.wait_for_save = 0, False, wait_for_save
        self.asked, self.work = torch.zeros(2, dtype=torch.int64), None
        self.group = dist.new_group(backend="gloo") if rt.world_size > 1 else None
        self.receive, send = os.pipe()
        os.set_blocking(send, False)
        signal.set_wakeup_fd(send, warn_on_full_buffer=False)       # Each signal's number comes as a byte.
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:       # nohup
                signal.signal(signum, lambda *_: None)
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        """Note each signal, or leave at once."""
        while True:
            signum = os.read(self.receive, 1)[0]
            if self.signum and signum == signal.SIGINT:
                self.leave(signum)
            elif not self.unsaved and not self.signum:
                self.signum = signum
                threading.Thread(target=self.leave, args=(signum, self.wait_for_save), daemon=True).start()
            self.signum = self.signum or signum

    @staticmethod
    def leave(signum, wait=lambda: None):
        """End this process from a thread."""
        Watch.active = False                # Who leaves now is not lost.
        wait()
        warn(f"stopped by {signal.Signals(signum).name} at once; started again, the same command goes on from the "
             f"last save")
        os._exit(128 + signum)

    def now(self):
        """The number of a signal that any process has got by now, or 0. All processes wait for each other."""
        signum = torch.tensor(self.signum)
        if self.group is not None:
            dist.all_reduce(signum, dist.ReduceOp.MAX, group=self.group)
        return signum.item()

    def agree(self, save):
        """Every process calls it after each step. Return (number of a signal that any process got or 0, whether any
        wants a save). No step waits for it: what several processes ask for is known to all one step later."""
        if self.group is None:
            return self.signum, save
        if self.work is not None:
            self.work.wait()
        signum, answer = self.asked.tolist()
        self.asked = torch.tensor([self.signum, int(save and not answer)])     # Not twice.
        self.work = dist.all_reduce(self.asked, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return signum, bool(answer)


def device_name(device):
    """The name of a device, as it stands beside a figure."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)"


# Dense matrix products of float16 and bfloat16 with sums in float32, in TFLOP/s, by NVIDIA's data sheets; the first
# words that are in a GPU's name count.
PEAKS = {"B200": 2250, "H200 NVL": 835, "H100 NVL": 835, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312,
         "L40S": 362, "A40": 150, "Tesla V100": 125, "Tesla T4": 65, "RTX 4090": 165, "RTX 3090": 71}


def peak_flops(device):
    """The FLOP/s of a device in mixed precision, for the share that is used of it (MFU); None where not known."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).replace("-", " ") + " "
        if "Laptop" not in name:
            return next((tflops * 1e12 for words, tflops in PEAKS.items() if f" {words} " in name), None)
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Seeds: all that is random is a function of (seed, what it is for), never of the process or of what came before.

def mix(*numbers):
    """A 63-bit seed from non-negative numbers, well mixed: neighbours have nothing in common."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
