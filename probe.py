"""Linear probe: test accuracy of a linear classifier on the features inside the denoiser.

The config's timestep and block:  python probe.py --config config/cifar10/C.yaml --epoch 1000
Several checkpoints:              python probe.py --config config/cifar10/C.yaml --epoch 500,1000
Every timestep and block:         python probe.py --config config/cifar10/C.yaml --epoch all --grid
Some of them:                     python probe.py --config config/cifar10/C.yaml --timesteps 3-5 \\
                                      --blocks out_5,out_6
Several GPUs:                     torchrun --nproc_per_node=4 probe.py --config config/digits/G.yaml
Accuracies are appended to save_dir/results.jsonl and written to TensorBoard; a grid also to
save_dir/probe_<epoch>.png.
"""

import time
from pathlib import Path

import numpy as np

from edm2 import checkpoint, data, diffusion, distributed, flags, linear_probe, results
from edm2.config import Count, Index, load_config
from edm2.errors import UserError, command
from edm2.files import atomic
from edm2.posthoc_ema import load_denoiser


def main():
    """Parse the command line, probe each checkpoint, report."""
    args = parse_arguments()
    config = load_config(args.config, args.set)
    widths = linear_probe.block_widths(config)
    timesteps = args.timesteps or (range(1, 11) if args.grid else [config.linear.timestep])
    blocks = args.blocks or ("all" if args.grid else config.linear.blockname)
    blocks = list(widths) if blocks == "all" else list(dict.fromkeys(blocks.split(",")))
    linear_probe.check_blocks(config, blocks, "--blocks" if args.blocks else "linear.blockname")
    device = distributed.init()
    epochs = distributed.on_rank0(lambda: checkpoint.epochs(config) if args.epoch == "all" else [
        checkpoint.find(config, epoch) for epoch in args.epoch or [None]])
    with distributed.rank0_first():
        sets = {linear_probe.TRAIN: data.load(config),
                linear_probe.TEST: data.load(config, train=False)}
    dtype = flags.dtype(args.amp_dtype or args.use_amp)
    for epoch in epochs or [checkpoint.find(config)]:
        start = time.perf_counter()
        denoiser = load_denoiser(config, epoch, "ema", args.sigma_rel, dtype)
        denoiser = diffusion.deploy(denoiser, device, args.channels_last, args.compile)
        probe = linear_probe.Probe(config, denoiser, sets, args.seed, args.passes, args.batch_gpu)
        if config.classes not in (None, probe.n_classes):
            raise UserError(f"classes is {config.classes}, but there are {probe.n_classes}")
        table = np.array([probe.accuracies(timestep, blocks) for timestep in timesteps])
        if distributed.rank() == 0:
            seconds = round(time.perf_counter() - start, 2)
            report(config, table, timesteps, {block: widths[block] for block in blocks}, {
                "n": len(sets[linear_probe.TEST][0]),
                "n_reference": len(sets[linear_probe.TRAIN][0]), "seeds": [args.seed],
                "epoch": epoch, "passes": args.passes, "linear": config.linear.model_dump(),
                "weights": "ema", "sigma_rel": args.sigma_rel,
                "precision": flags.precision(dtype), "seconds": seconds}, device)


def parse_arguments():
    """The command line."""
    p = flags.parser(__doc__, network=True, sigma_rel=True)
    add, flag = p.add_argument, flags.flag
    add("--epoch", type=flags.epochs, help="such as 500,1000, or all (default: the newest)")
    add("--grid", action="store_true", help="every pair of --timesteps (1-10) and --blocks (all)")
    add("--timesteps", type=flags.timesteps,
        help="noise levels of 1-18, such as 3-5 (default: linear.timestep)")
    add("--blocks", help="decoder blocks: out_5,out_6, or all (default: linear.blockname)")
    add("--passes", type=flag(Count), default=5, help="draws of noise and flips whose features are "
        "kept; the epochs take turns on them (default: 5)")
    add("--seed", type=flag(Index), default=0, help="of noise, flips, order, layers")
    return p.parse_args()


def report(config, table, timesteps, widths, common, device):
    """Print the accuracies (timesteps, blocks), append them to results.jsonl; of several also a
    table and a heat map, the best named."""
    length = f" sigma_rel={common['sigma_rel']:g}" if common["sigma_rel"] else ""
    sigmas = [linear_probe.sigma_of(config, timestep) for timestep in timesteps]
    results.record(config, [
        (f"probe t={t} {block}{length} (%)", {
            "figure": "probe", "value": value, "features": block, "timestep": t, "sigma": sigma,
            "width": widths[block], **common})
        for t, sigma, row in zip(timesteps, sigmas, table.tolist(), strict=True)
        for block, value in zip(widths, row, strict=True)], device)
    if table.size > 1:
        print("| block | " + " | ".join(f"t={t}" for t in timesteps) + " |\n"
              + "|---" * (len(timesteps) + 1) + "|")
        for block, values in zip(widths, table.T, strict=True):
            print(f"| {block} | " + " | ".join(f"{value:.2f}" for value in values) + " |")
        suffix = f"_sigma_rel{common['sigma_rel']:g}" if common["sigma_rel"] else ""
        path = Path(config.save_dir) / f"probe_{common['epoch']}{suffix}.png"
        title = (f"{config.dataset}, Config {config.net_type[-1]}, epoch {common['epoch']}\n"
                 f"{common['n']:,} test images, {common['passes']} passes, seed "
                 f"{common['seeds'][0]}; the best framed")
        names = [f"{t}\n{sigma:.3g}" for t, sigma in zip(timesteps, sigmas, strict=True)]
        heat_map(path, table.T, names, list(widths), title)
        print(f"heat map: {path}")
    i, j = np.unravel_index(table.argmax(), table.shape)
    block = list(widths)[j]
    best = "best " * (table.size > 1)
    print(f"{best}probe accuracy {table[i, j]:.2f} %: epoch {common['epoch']}, t={timesteps[i]} "
          f"(sigma {sigmas[i]:.4g}), {block} ({widths[block]} features){length}, "
          f"{common['n']:,} test images")


def heat_map(path, accuracies, timesteps, blocks, title):
    """Draw accuracies (blocks, timesteps) in per cent as a PNG, the best framed."""
    from matplotlib.figure import Figure  # Slow to import: only where it is used.
    from matplotlib.patches import Rectangle
    size = 2.4 + 0.75 * len(timesteps), 1.8 + 0.38 * len(blocks)
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    axes = figure.subplots()
    image = axes.imshow(accuracies, aspect="auto", cmap="viridis")
    for (row, column), value in np.ndenumerate(accuracies):
        axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=8,
                  color="black" if value > sum(image.get_clim()) / 2 else "white")
    row, column = np.unravel_index(accuracies.argmax(), accuracies.shape)
    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="red", lw=2))
    axes.set_xticks(range(len(timesteps)), timesteps, fontsize=8)
    axes.set_yticks(range(len(blocks)), blocks, fontsize=8)
    axes.set(xlabel="timestep, and its noise level sigma", ylabel="decoder block")
    axes.set_title(f"Linear probe: {title}", fontsize=10)
    figure.colorbar(image, label="test accuracy (%)")
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")


if __name__ == "__main__":
    command(main)()
