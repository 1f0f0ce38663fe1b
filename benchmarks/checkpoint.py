"""What a save costs training: copied and written by a thread, against written on the spot, in one run.

    python benchmarks/checkpoint.py | tee benchmarks/results/checkpoint.md

Each round trains some steps without a save, then begins a save of latest.pth as train.py does and goes on until it is
on disk, then writes the same state as train.py would without a thread. The cost of a save is the time that the step
loop stood still for it, and what the steps beside it took longer than the median of those without.
"""

import argparse
import shlex
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import checkpoint
import data
import logs
import options
import runtime
import train


def main():
    """Measure each config and print a table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--configs", nargs="+", default=["cifar10/C", "cifar10/E", "cifar10/G", "digits/G"])
    p.add_argument("--batch", type=int, help="images per step (default: 8 on the CPU, else that of the config)")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--steps", type=int, default=3, help="steps without a save, per round")
    p.add_argument("--use_amp", action="store_true")
    args = p.parse_args()
    rt = runtime.start()
    print(f"`{shlex.join(['python', 'benchmarks/checkpoint.py', *sys.argv[1:]])}`, {date.today()}, "
          f"{runtime.device_name(rt.device)}, torch {torch.__version__}\n")
    print("| config | parameters | batch | file (MB) | step, median (s) | standstill, median / most (s) | in steps "
          "| steps beside it, longer by (s) | save on the spot (s) | cost at save_minutes 10 |\n" + "|---" * 10 + "|")
    for name in args.configs:
        measure(name, args, rt)


def measure(name, args, rt):
    """Print the row of one config."""
    overrides = [f"batch_size={args.batch or 8}"] if args.batch or rt.device.type == "cpu" else []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        config = options.load_config(ROOT / "config" / f"{name}.yaml", [*overrides, f"save_dir={folder}"])
        shape = config["network"]["image_shape"]
        images = torch.randint(0, 256, (max(1024, config["batch_size"]), *shape), dtype=torch.uint8)
        flags = SimpleNamespace(use_amp=args.use_amp, amp_dtype=None, compile=None, channels_last=True, batch_gpu=None,
                                max_steps=None)
        t = train.Training(config, flags, rt, data.to_device(images, rt.device))
        log = logs.Log(folder, 0, True)
        saver = checkpoint.Saver(config, log)
        latest = checkpoint.latest_paths(config)[0]
        plain, still, longer, spot = [], [], [], []
        step_time(t)                        # Warm up.
        step_time(t)
        for _ in range(args.rounds):
            plain += [step_time(t) for _ in range(args.steps)]
            start = time.perf_counter()
            saver.save(t.state(), latest)
            still.append(time.perf_counter() - start)
            beside = []
            while not saver.is_idle():
                beside.append(step_time(t))
            longer.append((beside, sum(beside)))
            start = time.perf_counter()
            checkpoint.write(latest, t.state(), checkpoint.latest_paths(config)[1])
            spot.append(time.perf_counter() - start)
        median = statistics.median(plain)
        extra = statistics.median(total - median * len(beside) for beside, total in longer)
        cost = (statistics.median(still) + max(0, extra)) / 600
        print(f"| {name} | {sum(p.numel() for p in t.edm.net.parameters()):,} | {config['batch_size']} "
              f"| {latest.stat().st_size / 1e6:.0f} | {median:.3f} "
              f"| {statistics.median(still):.3f} / {max(still):.3f} | {statistics.median(still) / median:.2f} "
              f"| {extra:.2f} | {statistics.median(spot):.2f} | {cost:.3%} |", flush=True)
        saver.close()


def step_time(t):
    """The time of one training step, in seconds."""
    start = time.perf_counter()
    t.training_step(torch.arange(t.config["batch_size"]))
    if t.rt.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
