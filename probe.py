"""Linear probe: test accuracy of a linear classifier on the features inside the denoiser (DDAE, arXiv 2303.09769).

The config's timestep and block:  python probe.py --config config/cifar10/C.yaml --epoch 1000
Several checkpoints:              python probe.py --config config/cifar10/C.yaml --epoch 500,1000   (or: --epoch all)
Every timestep and block:         python probe.py --config config/cifar10/C.yaml --epoch 1000 --grid
Some of them:                     python probe.py --config config/cifar10/C.yaml --timesteps 3-5 --blocks out_5,out_6
Several GPUs:                     torchrun --nproc_per_node=4 probe.py --config config/cifar10/C.yaml --use_amp --grid
Accuracies are appended to save_dir/results.jsonl and written to TensorBoard; a grid also to save_dir/probe_<epoch>.png.
"""

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import checkpoint
import data
import edm
import files
import logs
import options
import runtime
from runtime import UserError

DRAW = 256                              # Images whose noise and flips are drawn together, and that pass together.
TRAIN, TEST, HEADS, ORDER = 1, 2, 3, 4  # What seeds are for.


def main():
    """Parse the command line, extract the features, train the heads, report."""
    args = parse_arguments()
    config = options.load_config(args.config, args.set)
    pairs = choose_pairs(config, args)
    rt = runtime.start()
    epochs = rt.agree(checkpoint.epochs(config) if args.epoch == "all" else
                      [checkpoint.find(config, epoch) for epoch in args.epoch or [None]])
    with rt.in_turns():
        sets = {TRAIN: data.load(config), TEST: data.load(config, train=False)}
    classes = max(int(labels.max()) + 1 for _, labels in sets.values())
    if config["classes"] is not None and config["classes"] != classes:
        raise UserError(f"classes is {config['classes']}, but {config['dataset']} has {classes}")
    files.check_writable(config["save_dir"])
    for epoch in epochs or [checkpoint.find(config)]:
        start = time.perf_counter()
        accuracy = probe_checkpoint(config, args, epoch, sets, pairs, classes, rt)
        if rt.is_main:
            n_train, n_test = (len(sets[kind][0]) for kind in (TRAIN, TEST))
            report(config, args, epoch, pairs, accuracy, n_train, n_test, time.perf_counter() - start, rt)


def parse_arguments():
    """The command line."""
    p = options.parser(__doc__)
    options.network_flags(p)
    count = options.argument(options.integer(1))
    p.add_argument("--epoch", type=options.epochs, help="checkpoints, such as 500,1000, or all (default: the newest)")
    p.add_argument("--grid", action="store_true", help="every pair of --timesteps (1-10) and --blocks (all)")
    p.add_argument("--timesteps", type=options.span(1, 18),
                   help="noise levels of 1-18, such as 3-5 (default: linear.timestep)")
    p.add_argument("--blocks", help="decoder blocks, such as out_5,out_6, or all (default: linear.blockname)")
    options.sigma_rel_flag(p)
    p.add_argument("--passes", type=count, default=5,
                   help="draws of noise and flips whose features are kept; the epochs take turns on them (default: 5)")
    p.add_argument("--seed", type=options.argument(options.integer(0)), default=0, help="of noise, flips, order, heads")
    return p.parse_args()


def probe_checkpoint(config, args, epoch, sets, pairs, classes, rt):
    """The accuracy in per cent of each Pair at a checkpoint. sets: images and labels to TRAIN and to TEST on."""
    denoiser = checkpoint.load_edm(config, epoch, "ema", args, rt.device, args.sigma_rel)
    train, test = (extract(denoiser, *sets[kind], pairs, n_passes, kind, config, args, rt)
                   for kind, n_passes in ((TRAIN, args.passes), (TEST, 1)))
    return probe(train, test, pairs, classes, config["linear"], args.seed, rt)


# ----------------------------------------------------------------------------------------------------------------------
# What is probed.

@dataclass
class Pair:
    """A noise level and a decoder block: timestep t counts the sampler's 18 steps from their clean end."""
    timestep: int
    sigma: float
    block: str
    number: int         # Of the block, in order of execution.
    width: int          # Its channels: features of the head.


def choose_pairs(config, args):
    """The Pairs that the command line or the config asks for. Raises UserError for a block that does not exist."""
    linear, widths = config["linear"], edm.block_widths(config)
    timesteps = args.timesteps or (range(1, 11) if args.grid else [linear["timestep"]])
    blocks = args.blocks or ("all" if args.grid else linear["blockname"])
    blocks = list(widths) if blocks == "all" else list(dict.fromkeys(blocks.split(",")))
    for block in blocks:
        if block not in widths:
            raise UserError(f"{'--blocks' if args.blocks else 'linear.blockname'} {block}: this network has no such "
                            f"block; its blocks are {', '.join(widths)}")
    schedule = {key: config["diffusion"][key] for key in ("sigma_min", "sigma_max", "rho")}
    sigmas = edm.sigma_steps(18, **schedule)
    return [Pair(t, float(sigmas[18 - t]), block, list(widths).index(block) + 1, widths[block])
            for t in timesteps for block in blocks]


# ----------------------------------------------------------------------------------------------------------------------
# Features: the network runs over the images once per draw and timestep.

@dataclass
class Features:
    """A process's share of a data set of n images: values (passes,m,d) float32, the pairs' features side by side,
    labels (m,), and row (n,), where each image lies in the share, -1 if with another process."""
    n: int
    values: torch.Tensor
    labels: torch.Tensor
    row: torch.Tensor


@torch.no_grad()
def extract(denoiser, images, labels, pairs, n_passes, kind, config, args, rt):
    """Features of images (N,C,H,W) uint8 at each Pair's noise level and block, averaged over positions.

    Image i is noised (and, in TRAIN, flipped where the config flips) from (seed, pass, i // DRAW), in any process.
    """
    n, flip = len(images), kind == TRAIN and config["flip"]
    starts = range(rt.rank * DRAW, n, rt.world_size * DRAW)
    share = torch.cat([torch.arange(start, min(start + DRAW, n)) for start in starts] or [torch.arange(0)])
    row = torch.full([n], -1).scatter_(0, share, torch.arange(len(share)))
    values = storage((n_passes, len(share), sum(pair.width for pair in pairs)), rt, config["save_dir"])
    images = data.to_device(images, rt.device)
    last = max(pairs, key=lambda pair: pair.number).block       # The decoder ends there.
    g = torch.Generator(rt.device)
    with rt.bar(n_passes * len(share), "img", {TRAIN: "train features", TEST: "test features"}[kind],
                shared=True) as bar:
        for draw in range(n_passes):
            for start in starts:
                g.manual_seed(runtime.mix(args.seed, draw, start, kind))
                index = torch.arange(start, start + DRAW).clamp(max=n - 1)     # One shape for torch.compile.
                noise = torch.randn(DRAW, *images.shape[1:], generator=g, device=g.device)
                flips = torch.rand(DRAW, generator=g, device=g.device) < (0.5 if flip else 0)
                y = data.batch(images, index, rt.device, flips)
                found = pooled(denoiser, y, noise, pairs, last, args.batch_gpu or DRAW)
                rows = row[index[:min(DRAW, n - start)]]
                values[draw, rows[0]:rows[-1] + 1] = found[:len(rows)].to(values.device)
                bar.update(len(rows))
    if not rt.all(bool(torch.isfinite(values.sum()))):
        raise UserError("the features are NaN or Inf: the network has diverged, or --amp_dtype bfloat16 is needed")
    return Features(n, values, labels[share].to(rt.device), row)


def pooled(denoiser, y, noise, pairs, last, batch_size):
    """The pairs' features of images y (B,C,H,W), given noise of that shape: (B,d), one pair beside the other."""
    out = []
    for part, eps in zip(y.split(batch_size), noise.split(batch_size), strict=True):
        columns, sigma = [], None
        for pair in pairs:                  # The blocks of a timestep follow each other.
            if pair.sigma != sigma:
                sigma = pair.sigma
                level = torch.full([len(part)], sigma, device=part.device)
                _, features = denoiser.denoise(part + sigma * eps, level, return_features=last)
            columns.append(features[pair.block].float().mean((2, 3)))
        out.append(torch.cat(columns, 1))
    return torch.cat(out)


def storage(shape, rt, folder):
    """An empty float32 tensor: on the GPU where it takes less than half of what is free, else in memory likewise, else
    a file in `folder` mapped into memory, which is gone with the process. Raises UserError where the disk is full."""
    size = 4 * int(np.prod(shape))
    if rt.device.type == "cuda":
        torch.cuda.empty_cache()            # What is cached counts as taken.
        if size < torch.cuda.mem_get_info(rt.device)[0] / 2:
            return torch.empty(shape, device=rt.device)
    if size < free_memory() / 2 / rt.local_world_size:
        return torch.empty(shape)
    files.make_folder(folder)
    if size > shutil.disk_usage(folder).free / rt.local_world_size:
        raise UserError(f"the features take {size / 1e9:.0f} GB, more than is free in memory or in {folder}: probe "
                        f"fewer timesteps or blocks at once, or lower --passes")
    rt.print(f"the features take {size / 1e9:.1f} GB: kept in a temporary file in {folder}")
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):      # A full disk shows here, not as a crash while writing.
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
        return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=shape))


def free_memory():
    """Bytes of memory that are free, or can be freed: of the machine and, in a container, of its limit (cgroup 2)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):                    # Not Linux.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    try:
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):                       # No container, or one without a limit ("max").
        return free
    return min(free, limit - used)


# ----------------------------------------------------------------------------------------------------------------------
# Heads: one linear layer per pair, all trained together as one batched layer.

def probe(train, test, pairs, classes, linear, seed, rt):
    """Train a linear layer per Pair on the train Features; return the accuracies on the test Features in per cent.

    linear: n_epoch, batch_size, lrate. Adam, cosine to 0; every head sees the images in the same order.
    """
    widths = [pair.width for pair in pairs]
    columns = head_columns(widths).to(rt.device)
    weight, bias = torch.zeros(len(pairs), max(widths), classes), torch.zeros(len(pairs), 1, classes)
    for head, pair in enumerate(pairs):     # As torch.nn.Linear begins; the same whatever other pairs there are.
        g = torch.Generator().manual_seed(runtime.mix(seed, HEADS, pair.timestep, pair.number))
        for p in (weight[head, :pair.width], bias[head]):
            p.uniform_(-pair.width ** -0.5, pair.width ** -0.5, generator=g)
    weight, bias = (p.to(rt.device).requires_grad_() for p in (weight, bias))
    optimizer = torch.optim.Adam([weight, bias], lr=linear["lrate"], fused=True)
    steps = linear["n_epoch"] * -(-train.n // linear["batch_size"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with rt.bar(steps, "step", f"{len(pairs)} head{'s' * (len(pairs) > 1)}") as bar:
        for epoch in range(linear["n_epoch"]):
            for rows, draws, size in epoch_batches(train, linear["batch_size"], runtime.mix(seed, ORDER), epoch):
                x = train.values[draws, rows].to(rt.device)
                y = train.labels[rows.to(rt.device)]
                logits = heads(x, columns, weight, bias)
                # Each process takes the images that it holds; the sum of their gradients is the batch's.
                loss = F.cross_entropy(logits.flatten(0, 1), y.repeat(len(pairs)), reduction="sum") / size
                optimizer.zero_grad()
                loss.backward()
                for p in (weight, bias):
                    rt.all_reduce(p.grad)
                optimizer.step()
                schedule.step()
                bar.update()
    correct = torch.zeros(len(pairs), dtype=torch.int64, device=rt.device)
    with torch.no_grad():
        for x, y in zip(test.values[0].split(1024), test.labels.split(1024), strict=True):
            correct += (heads(x.to(rt.device), columns, weight, bias).argmax(-1) == y).sum(1)
    return [100 * right / test.n for right in rt.all_reduce(correct).tolist()]


def head_columns(widths):
    """The columns of each head's features, (H, max width); those past its width point at a column of zeros."""
    total = sum(widths)
    columns = torch.full([len(widths), max(widths)], total)
    start = 0
    for head, width in enumerate(widths):
        columns[head, :width] = torch.arange(start, start + width)
        start += width
    return columns


def heads(x, columns, weight, bias):
    """Logits (H,B,classes) of all heads: features x (B,d), weight (H,max width,classes), bias (H,1,classes)."""
    x = F.pad(x, (0, 1))[:, columns].transpose(0, 1)            # (H,B,max width)
    return torch.baddbmm(bias, x, weight)


def epoch_batches(train, batch_size, seed, epoch):
    """Yield, for each batch of an epoch, this process's rows, the draw of each, and the size of the whole batch.

    From epoch to epoch an image takes the next of its draws.
    """
    order = data.epoch_order(train.n, seed, epoch)
    for batch in order.split(batch_size):
        mine = batch[train.row[batch] >= 0]
        yield train.row[mine], (mine + epoch) % len(train.values), len(batch)


# ----------------------------------------------------------------------------------------------------------------------
# Output.

def report(config, args, epoch, pairs, accuracy, n_train, n_test, seconds, rt):
    """Print the accuracies, append them to results.jsonl; of several pairs a table and a heat map, the best named."""
    best = max(range(len(pairs)), key=accuracy.__getitem__)
    length = f" sigma_rel={args.sigma_rel:g}" if args.sigma_rel else ""
    lines = [(f"probe t={pair.timestep} {pair.block}{length} (%)", {
        "figure": "probe", "value": value, "n": n_test, "n_reference": n_train, "seeds": [args.seed], "epoch": epoch,
        "Mimg": logs.seen_mimg(config, epoch, n_train), "features": pair.block, "timestep": pair.timestep,
        "sigma": pair.sigma, "width": pair.width, "passes": args.passes, "linear": config["linear"], "weights": "ema",
        "sigma_rel": args.sigma_rel,
        "precision": options.precision(args), "seconds": round(seconds, 2)})
        for pair, value in zip(pairs, accuracy, strict=True)]
    logs.record(config, lines, rt.device)
    if len(pairs) > 1:
        timesteps, blocks = (list(dict.fromkeys(names)) for names in
                             zip(*((pair.timestep, pair.block) for pair in pairs), strict=True))
        table = np.array(accuracy).reshape(len(timesteps), len(blocks)).T
        print("\n".join(["| block | " + " | ".join(f"t={t}" for t in timesteps) + " |",
                         "|---" * (len(timesteps) + 1) + "|",
                         *(f"| {block} | " + " | ".join(f"{value:.2f}" for value in values) + " |"
                           for block, values in zip(blocks, table, strict=True))]))
        path = Path(config["save_dir"]) / f"probe_{epoch}{checkpoint.sigma_rel_suffix(args.sigma_rel)}.png"
        sigmas = list(dict.fromkeys(pair.sigma for pair in pairs))
        heat_map(path, table, timesteps, sigmas, blocks,
                 f"{config['dataset']}, Config {config['net_type'][-1]}, epoch {epoch}\n"
                 f"{n_test:,} test images, {args.passes} pass{'es' * (args.passes > 1)}, seed {args.seed}; the best "
                 f"framed")
        print(f"heat map: {path}")
    pair = pairs[best]
    print(f"{'best ' * (len(pairs) > 1)}probe accuracy {accuracy[best]:.2f} %: epoch {epoch}, t={pair.timestep} "
          f"(sigma {pair.sigma:.4g}), {pair.block} ({pair.width} features){length}, {n_test:,} test images")


def heat_map(path, table, timesteps, sigmas, blocks, title):
    """Draw accuracies (blocks, timesteps) in per cent as a PNG, the best framed."""
    from matplotlib.figure import Figure  # Slow to import: only where it is used.
    from matplotlib.patches import Rectangle
    figure = Figure(figsize=(2.4 + 0.75 * len(timesteps), 1.8 + 0.38 * len(blocks)), layout="constrained", dpi=150)
    axes = figure.subplots()
    image = axes.imshow(table, aspect="auto", cmap="viridis")
    low, high = image.get_clim()
    for (row, column), value in np.ndenumerate(table):
        axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=8,
                  color="black" if value > (low + high) / 2 else "white")
    row, column = np.unravel_index(table.argmax(), table.shape)
    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2))
    axes.set_xticks(range(len(timesteps)), [f"{t}\n{sigma:.3g}" for t, sigma in zip(timesteps, sigmas, strict=True)],
                    fontsize=8)
    axes.set_yticks(range(len(blocks)), blocks, fontsize=8)
    axes.set_xlabel("timestep, and its noise level sigma")
    axes.set_ylabel("decoder block")
    axes.set_title(f"Linear probe: {title}", fontsize=10)
    figure.colorbar(image, label="test accuracy (%)")
    with files.atomic(path) as temporary:
        figure.savefig(temporary, format="png")


if __name__ == "__main__":
    runtime.command(main)()
