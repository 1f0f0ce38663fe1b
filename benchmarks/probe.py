"""The linear probe against the naive way, a fresh forward pass in each of its epochs: accuracy and time in one run.

    python benchmarks/probe.py --data_root ../shared/data | tee benchmarks/results/probe.md

Trains a small network on CIFAR-10 first (--save_dir keeps it). Both ways then see the same images, network, memory
layout, precision, head and schedule; nothing is compiled. The naive way is the predecessor's: the whole network on
every image in every epoch, in the head's batches of 128 (probe.py: 256). A second naive way ends at the block, as
probe.py does: it tells what of the gain comes from that, and what from keeping features.
"""

import argparse
import functools
import shlex
import statistics
import subprocess
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
import options
import probe
import runtime

# Block out_2 lies as deep as out_6 in the shipped network: up to there 35 % of the FLOPs, 30 % in that one.
NETWORK = ["network.ch_mults=[1,2,4]", "network.is_attn=[false,true,false]",
           "network.n_blocks=2", "network.dropout=0", "n_epoch=1", "batch_size=64",
           "lrate=2e-3", "warm_epoch=0.1", "ema=0.995", "n_sample=4", "linear.blockname=out_2"]


def main():
    """Train the network where it is missing, probe it both ways in turn, print a table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data_root", default="data")
    p.add_argument("--save_dir", help="of the network (default: a temporary folder)")
    p.add_argument("--n_channels", type=int, default=16, help="of the network")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override another key")
    p.add_argument("--n_train", type=int, default=50_000)
    p.add_argument("--n_test", type=int, default=10_000)
    p.add_argument("--passes", default="1,2,3,5")
    p.add_argument("--repeats", type=int, default=2, help="seeds of each way")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        overrides = [f"data_root={args.data_root}", f"save_dir={args.save_dir or temporary}", *NETWORK,
                     f"network.n_channels={args.n_channels}", f"network.attn_channels_per_head={args.n_channels}",
                     *args.set]
        config = options.load_config(ROOT / "config" / "cifar10" / "C.yaml", overrides)
        if not checkpoint.epochs(config):
            flags = [word for override in overrides for word in ("--set", override)]
            subprocess.run([sys.executable, ROOT / "train.py", "--config", ROOT / "config" / "cifar10" / "C.yaml",
                            *flags], check=True, stdout=sys.stderr)
        compare(config, args)


def compare(config, args):
    """Time both ways in alternation; print accuracies and medians."""
    rt = runtime.start()
    flags = SimpleNamespace(use_amp=False, amp_dtype=None, channels_last=True, compile=False)
    denoiser = checkpoint.load_edm(config, checkpoint.find(config), "ema", flags, rt.device)
    train, test = ([tensor[:n] for tensor in data.load(config, train)]
                   for train, n in ((True, args.n_train), (False, args.n_test)))
    ways = {"naive": functools.partial(naive, whole=True),
            "naive, ending at the block": functools.partial(naive, whole=False)}
    ways |= {f"{n} passes": functools.partial(kept, passes=n) for n in map(int, args.passes.split(","))}
    found = {name: [] for name in ways}
    for seed in range(args.repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            accuracy = way(denoiser, config, train, test, seed, rt)
            found[name].append((accuracy, time.perf_counter() - start))
            print(f"seed {seed}, {name}: {accuracy:.2f} %, {found[name][-1][1]:.1f} s", file=sys.stderr, flush=True)
    print(f"`{shlex.join(['python', *sys.argv])}`, {date.today()}, {runtime.device_name(rt.device)}, torch "
          f"{torch.__version__}, {len(train[0]):,} + {len(test[0]):,} images, {config['linear']}\n")
    print("| probe | accuracy, mean of seeds (%) | each | difference to naive (points) | time, median (s) | times "
          "faster |\n|---|---|---|---|---|---|")
    base_accuracy, base_time = (f(column) for f, column in zip((statistics.mean, statistics.median),
                                                               zip(*found["naive"], strict=True), strict=True))
    for name, rows in found.items():
        accuracy, seconds = (list(column) for column in zip(*rows, strict=True))
        mean, median = statistics.mean(accuracy), statistics.median(seconds)
        print(f"| {name} | {mean:.2f} | {', '.join(f'{a:.2f}' for a in accuracy)} | {mean - base_accuracy:+.2f} | "
              f"{median:.1f} | {base_time / median:.2f} |")


def kept(denoiser, config, train, test, seed, rt, passes):
    """Test accuracy in per cent by probe.py: features of `passes` draws are kept."""
    args = SimpleNamespace(seed=seed, batch_gpu=None, timesteps=None, blocks=None, grid=False)
    pairs = probe.choose_pairs(config, args)
    features = [probe.extract(denoiser, *images, pairs, n, kind, config, args, rt)
                for images, n, kind in ((train, passes, probe.TRAIN), (test, 1, probe.TEST))]
    return probe.probe(*features, pairs, 10, config["linear"], seed, rt)[0]


def naive(denoiser, config, train, test, seed, rt, whole):
    """Test accuracy in per cent with fresh noise, flips and features in every epoch, of the whole network or of what
    comes before the block."""
    linear = config["linear"]
    pair, = probe.choose_pairs(config, SimpleNamespace(timesteps=None, blocks=None, grid=False))
    torch.manual_seed(seed)

    def features(images, index, flip):
        flips = torch.rand(len(index), device=rt.device) < (0.5 if flip else 0)
        y = data.batch(images, index, rt.device, flips)
        with torch.no_grad():
            _, out = denoiser.denoise(y + pair.sigma * torch.randn_like(y),
                                      torch.full([len(y)], pair.sigma, device=rt.device),
                                      return_features=whole or pair.block)
        return out[pair.block].mean((2, 3))

    head = torch.nn.Linear(pair.width, 10, device=rt.device)
    optimizer = torch.optim.Adam(head.parameters(), lr=linear["lrate"])
    images, labels = data.to_device(train[0], rt.device), train[1]
    steps = -(-len(train[0]) // linear["batch_size"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, linear["n_epoch"] * steps)
    for _ in range(linear["n_epoch"]):
        for index in torch.randperm(len(images)).split(linear["batch_size"]):
            logits = head(features(images, index, config["flip"]))
            loss = torch.nn.functional.cross_entropy(logits, labels[index].to(rt.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    right = sum((head(features(test[0], index, False)).argmax(1) == test[1][index].to(rt.device)).sum().item()
                for index in torch.arange(len(test[0])).split(linear["batch_size"]))
    return 100 * right / len(test[0])


if __name__ == "__main__":
    main()
