"""Several ways to do the same thing, each in a process of its own, timed in turns: what the benchmarks share."""

import contextlib
import multiprocessing
import statistics
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch

import runtime


@dataclass
class Timing:
    """What was measured of one side: the seconds of each call, what the calls returned, and the process' peak memory in
    GB (on CUDA the allocator's, on the CPU its resident set)."""
    seconds: list
    returned: list
    memory: float

    @property
    def median(self):
        """The median of the seconds."""
        return statistics.median(self.seconds)


def times_faster(timing, than):
    """How many times faster a Timing is than another of the same run: the median of the rounds' ratios, which hardly
    change while something slows the machine down."""
    return statistics.median(b / a for a, b in zip(timing.seconds, than.seconds, strict=True))


def alternate(sides, rounds, warmup=2):
    """Time the sides in turns, so that what slows the machine down for a while slows all of them.

    sides: {name: (make, *arguments)}: in a process of its own, make(*arguments) gives the function that is called
    `warmup` times, then timed `rounds` times. Return {name: Timing}.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name, (make, *arguments) in sides.items():
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(theirs, make, arguments)))
        processes[-1].start()
        theirs.close()                      # A side that dies then ends this run, too, and the other way round.
        for _ in range(1 + warmup):
            pipes[name].send(True)
            pipes[name].recv()
    timings = {name: Timing([], [], 0) for name in sides}
    for _ in range(rounds):
        for name, pipe in pipes.items():
            pipe.send(True)
            seconds, returned = pipe.recv()
            timings[name].seconds.append(seconds)
            timings[name].returned.append(returned)
            print(f"{name}: {seconds:.3f} s", file=sys.stderr, flush=True)
    for name, pipe in pipes.items():
        pipe.send(False)
        timings[name].memory = pipe.recv()
    for process in processes:
        process.join()
    return timings


def serve(pipe, make, arguments):
    """One side, until this run or its own work ends."""
    with contextlib.suppress(EOFError, BrokenPipeError):
        work(pipe, make, arguments)


def work(pipe, make, arguments):
    """Make the function of a side, then call it as often as asked for."""
    multiprocessing.set_start_method(None, force=True)      # For workers of its own the system's, as in the commands.
    if getattr(make, "default_malloc", False):      # Of what is not ours.
        runtime.keep_freed_memory = lambda: None
    device = runtime.start().device
    pipe.recv()
    function = make(*arguments)
    forget_peak(device)
    pipe.send("ready")
    while pipe.recv():
        start = time.perf_counter()
        returned = function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        pipe.send((time.perf_counter() - start, returned))
    pipe.send(peak(device))


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
        return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("VmHWM"))
    return None


def table(timings, against, columns):
    """A Markdown table of Timings; how many times faster than the side `against`, and more columns: {head: function of
    a Timing}."""
    head = ["side", "median (s)", "least to most (s)", "peak memory (GB)", *columns, f"times faster than {against}"]
    lines = [head, ["---"] * len(head)]
    for side, t in timings.items():
        lines.append([side, f"{t.median:.3f}", f"{min(t.seconds):.3f} to {max(t.seconds):.3f}", f"{t.memory:.2f}",
                      *(column(t) for column in columns.values()), f"{times_faster(t, timings[against]):.2f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine():
    """The device, processor, versions and day, as they stand above a table."""
    with contextlib.suppress(OSError):
        names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                 if line.startswith("model name")]
        return f"{runtime.device_name(runtime.start().device)}, {names[0]}, torch {torch.__version__}, {date.today()}"
    return f"{runtime.device_name(runtime.start().device)}, torch {torch.__version__}, {date.today()}"
