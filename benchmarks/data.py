"""Data and start-up: kept decoded against decoded anew, look-ups against a DataLoader, and
train.py --dry_run.

    python benchmarks/data.py --cifar10 ../shared/data | tee benchmarks/results/data.md
    python benchmarks/data.py --cifar10 ../shared/data --tinyimagenet DIR  # holds tiny-imagenet-200

plain: what the predecessor does: the data set read from its files at every start (Tiny ImageNet's
JPEGs one by one), batches by one DataLoader worker with PIL transforms.
"""

import argparse
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import torch
from sides import ROOT, alternate, machine, table
from train_step import plain_batches
from edm2 import data, distributed
from edm2.config import load_config

BATCHES = 20        # In a row: a DataLoader's worker has some ready, made in the other side's turn.
CONFIG = ROOT / "config" / "cifar10" / "C.yaml"

def main():
    """Time the sides and print the tables."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cifar10", metavar="DATA_ROOT")
    p.add_argument("--tinyimagenet", metavar="DATA_ROOT")
    p.add_argument("--batch", type=int, default=512)
    p.add_argument("--rounds", type=int, default=7)
    args = p.parse_args()
    print(f"`{shlex.join(['python', *sys.argv])}`, {machine()}\n")

    for name in ("cifar10", "tinyimagenet"):
        if root := getattr(args, name):
            with tempfile.TemporaryDirectory() as folder:
                config = load_config(ROOT / "config" / name / "C.yaml",
                                     [f"data_root={root}", f"cache_dir={folder}"])
                started = time.perf_counter()
                n = len(data.load(config)[0])
                first = time.perf_counter() - started
                anew = config.model_copy(update={"cache_dir": None})
                timings = alternate({"kept": (load, config), "decoded on all cores": (load, anew),
                                     "plain": (load_plain, config)}, args.rounds, warmup=1)
            print(f"{name}, training set ({n:,} images) ready; the first time, when it is kept, "
                  f"{first:.2f} s:\n")
            print(table(timings, "plain", {}), end="\n\n")

    timings = alternate({"data.batch": (look_up, args.batch), "plain": (worker, args.batch)},
                        args.rounds)
    print(f"{BATCHES} batches of {args.batch} images in a row, flipped at random, on the device:\n")
    n = BATCHES * args.batch
    print(table(timings, "plain", {"images per second": lambda t: f"{n / t.median:,.0f}"}),
          end="\n\n")

    seconds = [dry_run() for _ in range(args.rounds)]
    print(f"`python train.py --config config/cifar10/C.yaml --dry_run`: "
          f"{statistics.median(seconds):.2f} s, {min(seconds):.2f} to {max(seconds):.2f}")

def load(config):
    """data.load."""
    return lambda: len(data.load(config)[0])

def load_plain(config):
    """The files read by torchvision, one by one."""
    import torchvision
    from PIL import Image
    root = config.data_root
    if config.dataset == "cifar10":
        return lambda: len(torchvision.datasets.CIFAR10(root))

    def run():
        folder = torchvision.datasets.ImageFolder(
            f"{root}/tiny-imagenet-200/train", loader=lambda path: Image.open(path).convert("RGB"))
        return len([image for image, _ in folder])
    return run

def random_images():
    """As many images as CIFAR-10 has."""
    return torch.randint(0, 256, (50_000, 3, 32, 32), dtype=torch.uint8)

def look_up(B):
    """Batches of train.py."""
    device, images = distributed.init(), random_images()
    images = images.to(data.placement(images.nbytes, device))

    def run():
        for _ in range(BATCHES):
            index = torch.randint(len(images), (B,))
            data.batch(images, index, device, torch.rand(B, device=device) < 0.5)
    return run

def worker(B):
    """Batches of one DataLoader worker."""
    device, batches = distributed.init(), plain_batches(random_images(), B)

    def run():
        for _ in range(BATCHES):
            next(batches).to(device)
    return run

def dry_run():
    """The seconds of a dry run."""
    started = time.perf_counter()
    subprocess.run([sys.executable, ROOT / "train.py", "--config", CONFIG, "--dry_run"],
                   check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started

if __name__ == "__main__":
    main()
