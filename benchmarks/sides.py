"""Several ways to do the same thing, each in a process of its own, timed in turns: what the
benchmarks share."""

import contextlib
import inspect
import multiprocessing
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch
from edm2 import distributed
from edm2.machine import device_name

@dataclass
class Timing:
    """What was measured of one side: of each turn the seconds, what it returned, its page faults;
    the process' peak memory in GB (on CUDA the allocator's, on the CPU its resident set)."""
    seconds: list
    returned: list
    faults: list
    memory: float

    @property
    def median(self):
        """The median of the seconds."""
        return statistics.median(self.seconds)

def ratios(timing, than):
    """How long a Timing took relative to another of the same run, round by round: these hardly
    change while something slows the machine down."""
    return [a / b for a, b in zip(timing.seconds, than.seconds, strict=True)]

def times_faster(timing, than):
    """How many times faster a Timing is than another of the same run: the median of the rounds'."""
    return statistics.median(ratios(than, timing))

def alternate(sides, rounds, warmup=2):
    """Time the sides in turns, so that what slows the machine down for a while slows all of them.

    sides: {name: (make, *arguments)}: in a process of its own, make(*arguments) gives the function
    that is called `warmup` times, then timed `rounds` times. A function with a parameter is called
    once, with the Turns, of which it takes one after the other. Return {name: Timing}.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    timings = {name: Timing([], [], [], 0) for name in sides}
    with contextlib.ExitStack() as stack:   # A side that dies ends the run, the run ends all sides.
        for name, (make, *arguments) in sides.items():
            pipes[name], theirs = context.Pipe()
            stack.enter_context(pipes[name])
            processes.append(context.Process(target=serve, args=(theirs, make, arguments)))
            processes[-1].start()
            theirs.close()
            for _ in range(1 + warmup):
                pipes[name].send(True)
                pipes[name].recv()
        for _ in range(rounds):
            for name, pipe in pipes.items():
                pipe.send(True)
                seconds, returned, faults = pipe.recv()
                timings[name].seconds.append(seconds)
                timings[name].returned.append(returned)
                timings[name].faults.append(faults)
                print(f"{name}: {seconds:.3f} s", file=sys.stderr, flush=True)
        for name, pipe in pipes.items():
            pipe.send(False)
            timings[name].memory = pipe.recv()
    for process in processes:
        process.join()
    return timings

class Done(Exception):
    """There are no more turns."""

class Turns:
    """The turns of one side: what is timed is from begin() to end().

    before() is called when a turn begins; what after() returns, if anything, is what it returns.
    """
    def __init__(self, pipe):
        self.pipe, self.device, self.is_set_up = pipe, distributed.init(), False
        self.before = self.after = lambda: None
        self.wait()

    def wait(self):
        """Until it is the side's turn. Raises Done where there are no more."""
        if not self.pipe.recv():
            raise Done

    def begin(self):
        """Begin a turn; before the first one, say that all is set up."""
        if not self.is_set_up:
            self.is_set_up = True
            forget_peak(self.device)
            self.pipe.send("ready")
            self.wait()
        self.before()
        self.faults, self.start = page_faults(), time.perf_counter()

    def end(self, returned=None):
        """End it, and wait for the next one: what follows here disturbs no other side."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds, faults = time.perf_counter() - self.start, page_faults() - self.faults
        self.pipe.send((seconds, self.after() or returned, faults))
        self.wait()

    def take(self, function):
        """Let a function take all turns, or be called in each, as alternate() says."""
        if inspect.signature(function).parameters:
            function(self)
        while True:
            self.begin()
            self.end(function())

def serve(pipe, make, arguments):
    """One side, until this run or its own work ends."""
    multiprocessing.set_start_method(None, force=True)      # The system's, as in the commands.
    with contextlib.suppress(EOFError, BrokenPipeError):
        turns = Turns(pipe)
        with contextlib.suppress(Done):
            turns.take(make(*arguments))
        pipe.send(peak(turns.device))

def page_faults():
    """Of this process until now: pages that the system had to give to it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def forget_peak(device):
    """Let the peak memory begin anew: setting up is not what is measured."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

def peak(device):
    """The peak memory of this process in GB; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 / 1e9
                    for line in lines if line.startswith("VmHWM"))
    return None

def table(timings, against, columns):
    """A Markdown table of Timings; how many times faster than the side `against`, and more columns:
    {head: function of a Timing}."""
    head = ["side", "median (s)", "least to most (s)", "peak memory (GB)", *columns,
            f"times faster than {against}"]
    lines = [head, ["---"] * len(head)]
    for side, t in timings.items():
        lines.append([side, f"{t.median:.3f}", f"{min(t.seconds):.3f} to {max(t.seconds):.3f}",
                      f"{t.memory:.2f}", *(column(t) for column in columns.values()),
                      f"{times_faster(t, timings[against]):.2f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

def machine():
    """The device, processor, versions and day, as they stand above a table."""
    words = [device_name(distributed.init()), f"torch {torch.__version__}", str(date.today())]
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        has = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in text]
        words[1:1] = [f"{line.partition(':')[2].strip()} ({' '.join(has)})"
                      for line in text.splitlines() if line.startswith("model name")][:1]
    return ", ".join(words)
