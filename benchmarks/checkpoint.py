"""What a save costs training, which stands still for it, and what reading a checkpoint takes.

    python benchmarks/checkpoint.py | tee benchmarks/results/checkpoint.md

Saved is latest.pth, as train.py saves it; read is it, checks included. The share is of the time of
training at the default of a save every 10 minutes. plain: torch.save to the file itself, which a
crash can halve, without fsync.
"""

import argparse
import shlex
import statistics
import sys
import tempfile
import time
from types import SimpleNamespace
import torch
from sides import ROOT, machine
import train
from edm2 import checkpoint, distributed
from edm2.config import load_config

def main():
    """Measure each config and print a table."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--configs", nargs="+", default=["cifar10/G", "digits/G"])
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--dir", default=".", help="a folder of the disk that is measured (default: .)")
    args = p.parse_args()
    print(f"`{shlex.join(['python', *sys.argv])}`, {machine()}\n")
    print("| config | parameters | file (MB) | save, median (s) | least to most | plain, file (MB) "
          "| plain, median (s) | load, median (s) | least to most | of training, each 10 minutes |")
    print("|---" * 10 + "|")
    for name in args.configs:
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            measure(name, folder, args.rounds)

def measure(name, folder, rounds):
    """Print the row of one config."""
    config = load_config(ROOT / "config" / f"{name}.yaml", [f"save_dir={folder}"])
    images = torch.zeros(config.batch_size, *config.network.image_shape, dtype=torch.uint8)
    flags = SimpleNamespace(amp_dtype=None, compile=False, channels_last=True, batch_gpu=None)
    run = train.Run(config, flags, distributed.init(), images)
    for p in run.denoiser.parameters():
        p.grad = torch.randn_like(p)
    run.optimizer.step()                    # It has its moments then, which are most of the file.
    run.step, path = 1, checkpoint.latest_paths(config)[0]
    saves, loads, plain, naive = [], [], [], path.with_name("plain.pth")
    for _ in range(rounds):
        saves.append(seconds(run.save, path))
        plain.append(seconds(torch.save, {
            "model": run.denoiser.state_dict(), "ema": run.averages.ema.state_dict(),
            "optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict()}, naive))
        loads.append(seconds(checkpoint.load, path))
    n_parameters = sum(p.numel() for p in run.denoiser.net.parameters())
    print(f"| {name} | {n_parameters:,} | {path.stat().st_size / 1e6:.0f} "
          f"| {statistics.median(saves):.2f} | {min(saves):.2f} to {max(saves):.2f} "
          f"| {naive.stat().st_size / 1e6:.0f} | {statistics.median(plain):.2f} "
          f"| {statistics.median(loads):.2f} | {min(loads):.2f} to {max(loads):.2f} "
          f"| {statistics.median(saves) / 600:.3%} |", flush=True)

def seconds(function, *args):
    """How long a call takes."""
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start

if __name__ == "__main__":
    main()
