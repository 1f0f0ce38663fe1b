"""The linear probe against the naive way, a fresh forward pass in each of its epochs: accuracy and
time in one run.

    python benchmarks/probe.py --data_root ../shared/data | tee benchmarks/results/probe.md

Trains a small network on CIFAR-10 first (--save_dir keeps it). Both ways then see the same images,
network, memory layout, precision, head and schedule; nothing is compiled. The naive way is the
predecessor's: the whole network on every image in every epoch, in the head's batches of 128
(probe.py: 256). A second naive way ends at the block, as probe.py does: it tells what of the gain
comes from that, and what from keeping features.
"""

import argparse
import functools
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import torch
from sides import ROOT, machine
from edm2 import checkpoint, data, diffusion, distributed, linear_probe
from edm2.config import load_config
from edm2.posthoc_ema import load_denoiser

CONFIG = ROOT / "config" / "cifar10" / "C.yaml"
# Block out_2 lies as deep as out_6 in the shipped network: up to there 35 % of the FLOPs, 30 % in
# that one.
NETWORK = ["network.ch_mults=[1,2,4]", "network.is_attn=[false,true,false]",
           "network.n_blocks=2", "network.dropout=0", "n_epoch=1", "batch_size=64",
           "lrate=2e-3", "warm_epoch=0.1", "ema=0.995", "n_sample=4", "linear.blockname=out_2"]

def main():
    """Train the network where it is missing, probe it both ways in turn, print a table."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data_root", default="data")
    p.add_argument("--save_dir", help="of the network (default: a temporary folder)")
    p.add_argument("--n_channels", type=int, default=16, help="of the network")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                   help="override another key")
    p.add_argument("--n_train", type=int, default=50_000)
    p.add_argument("--n_test", type=int, default=10_000)
    p.add_argument("--passes", default="1,2,3,5")
    p.add_argument("--repeats", type=int, default=2, help="seeds of each way")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        overrides = [f"data_root={args.data_root}", f"save_dir={args.save_dir or temporary}",
                     *NETWORK, f"network.n_channels={args.n_channels}",
                     f"network.attn_channels_per_head={args.n_channels}", *args.set]
        config = load_config(CONFIG, overrides)
        if not checkpoint.epochs(config):
            words = [word for override in overrides for word in ("--set", override)]
            subprocess.run([sys.executable, ROOT / "train.py", "--config", CONFIG, *words],
                           check=True, stdout=sys.stderr)
        compare(config, args)

def compare(config, args):
    """Time both ways in alternation; print accuracies and medians."""
    device = distributed.init()
    denoiser = load_denoiser(config, checkpoint.find(config))
    denoiser = diffusion.deploy(denoiser, device, compiled=False)
    train, test = ([tensor[:n] for tensor in data.load(config, train)]
                   for train, n in ((True, args.n_train), (False, args.n_test)))
    ways = {"naive": functools.partial(naive, whole=True),
            "naive, ending at the block": functools.partial(naive, whole=False)}
    ways |= {f"{n} passes": functools.partial(kept, passes=n)
             for n in map(int, args.passes.split(","))}
    found = {name: [] for name in ways}
    for seed in range(args.repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            accuracy = way(denoiser, config, train, test, seed, device)
            seconds = time.perf_counter() - start
            found[name].append((accuracy, seconds))
            print(f"seed {seed}, {name}: {accuracy:.2f} %, {seconds:.1f} s", file=sys.stderr,
                  flush=True)
    print(f"`{shlex.join(['python', *sys.argv])}`, {machine()}, {len(train[0]):,} + "
          f"{len(test[0]):,} images, {config.linear.model_dump()}\n")
    print("| probe | accuracy, mean of seeds (%) | each | difference to naive (points) "
          "| time, median (s) | times faster |\n|---|---|---|---|---|---|")
    base_accuracy, base_time = (f(column) for f, column in zip(
        (statistics.mean, statistics.median), zip(*found["naive"], strict=True), strict=True))
    for name, rows in found.items():
        accuracy, seconds = (list(column) for column in zip(*rows, strict=True))
        mean, median = statistics.mean(accuracy), statistics.median(seconds)
        print(f"| {name} | {mean:.2f} | {', '.join(f'{a:.2f}' for a in accuracy)} "
              f"| {mean - base_accuracy:+.2f} | {median:.1f} | {base_time / median:.2f} |")

def kept(denoiser, config, train, test, seed, device, passes):
    """Test accuracy in per cent by probe.py: features of `passes` draws are kept."""
    sets = {linear_probe.TRAIN: train, linear_probe.TEST: test}
    probe = linear_probe.Probe(config, denoiser, sets, seed, passes)
    return probe.accuracies(config.linear.timestep, [config.linear.blockname])[0]

def naive(denoiser, config, train, test, seed, device, whole):
    """Test accuracy in per cent with fresh noise, flips and features in every epoch, of the whole
    network or of what comes before the block."""
    linear, block = config.linear, config.linear.blockname
    sigma = linear_probe.sigma_of(config, linear.timestep)
    torch.manual_seed(seed)

    def features(images, index, flip):
        flips = torch.rand(len(index), device=device) < (0.5 if flip else 0)
        y = data.batch(images, index, device, flips)
        with torch.no_grad():
            _, out = denoiser.denoise(y + sigma * torch.randn_like(y),
                                      torch.full([len(y)], sigma, device=device),
                                      return_features=whole or block)
        return out[block].mean((2, 3))

    n_classes = max(int(labels.max()) + 1 for _, labels in (train, test))
    head = torch.nn.Linear(linear_probe.block_widths(config)[block], n_classes, device=device)
    optimizer = torch.optim.Adam(head.parameters(), lr=linear.lrate)
    images, labels = train
    images = images.to(data.placement(images.nbytes, device))
    steps = -(-len(images) // linear.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, linear.n_epoch * steps)
    for _ in range(linear.n_epoch):
        for index in torch.randperm(len(images)).split(linear.batch_size):
            logits = head(features(images, index, config.flip))
            loss = torch.nn.functional.cross_entropy(logits, labels[index].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    right = sum((head(features(test[0], index, False)).argmax(1)
                 == test[1][index].to(device)).sum().item()
                for index in torch.arange(len(test[0])).split(linear.batch_size))
    return 100 * right / len(test[0])

if __name__ == "__main__":
    main()
