"""Linear probe: test accuracy of a linear classifier on the features inside the denoiser.

The config's timestep and block:  python probe.py --config config/cifar10/C.yaml --epoch 500,1000
Every timestep and block:         python probe.py --config config/cifar10/C.yaml --epoch all --grid
Several GPUs:                     torchrun --nproc_per_node=4 probe.py --config config/digits/G.yaml
Accuracies go to save_dir/results.jsonl; a grid is also drawn, as save_dir/probe_<epoch>.png."""

import time
import numpy as np
from edm2 import checkpoint, data, diffusion, distributed, files, flags, linear_probe, results
from edm2.config import Count, Index, Timestep, load_config
from edm2.errors import command
from edm2.posthoc_ema import load_denoiser

def main():
    """Parse the command line, probe each checkpoint, report."""
    p = flags.parser(__doc__, network=True, sigma_rel=True)
    add, flag = p.add_argument, flags.flag
    add("--epoch", type=flags.epochs, help="such as 500,1000, or all (default: the newest)")
    add("--grid", action="store_true", help="every pair of --timesteps (1-10) and --blocks (all)")
    add("--timesteps", type=flags.ranges(Timestep),
        help="of 1-18, such as 3-5 (default: linear.timestep)")
    add("--blocks", help="decoder blocks: out_5,out_6, or all (default: linear.blockname)")
    add("--passes", type=flag(Count), default=5, help="draws of noise and flips (default: 5)")
    add("--seed", type=flag(Index), default=0, help="of noise, flips, order, layers")
    args = p.parse_args()

    config = load_config(args.config, args.set)
    widths = linear_probe.block_widths(config)
    timesteps = args.timesteps or (range(1, 11) if args.grid else [config.linear.timestep])
    blocks = args.blocks or ("all" if args.grid else config.linear.blockname)
    blocks = list(widths) if blocks == "all" else list(dict.fromkeys(blocks.split(",")))
    linear_probe.check_blocks(config, blocks, "--blocks" if args.blocks else "linear.blockname")
    widths, device = {block: widths[block] for block in blocks}, distributed.init()
    asked = checkpoint.epochs(config) if args.epoch == "all" else args.epoch
    epochs = distributed.on_rank0(lambda: [checkpoint.find(config, i) for i in asked or [None]])
    with distributed.rank0_first():
        train, test = data.load(config), data.load(config, train=False)
    sets, sha256 = {linear_probe.TRAIN: train, linear_probe.TEST: test}, data.digest(train[0])
    flags.resolve(args, device)
    distributed.print0(f"{diffusion.processes_on(device)}; {flags.precision(args.amp_dtype)}")
    for epoch in epochs:
        start, trained_on = time.perf_counter(), (len(train[0]), sha256)
        denoiser = load_denoiser(config, epoch, "ema", args.sigma_rel, args.amp_dtype, trained_on)
        denoiser = diffusion.deploy(denoiser, device, args.channels_last, args.compile)
        probe = linear_probe.Probe(config, denoiser, sets, args.seed, args.passes, args.batch_gpu)
        table = np.array([probe.accuracies(timestep, blocks) for timestep in timesteps])
        if distributed.rank() == 0:
            report(config, table, timesteps, widths, device, {
                "figure": "probe", "n": len(test[0]), "n_reference": len(train[0]), "epoch": epoch,
                "images_sha256": sha256, "seeds": [args.seed], "passes": args.passes,
                "linear": config.linear.model_dump(), "weights": "ema",
                "sigma_rel": args.sigma_rel, "precision": flags.precision(args.amp_dtype),
                "seconds": time.perf_counter() - start})

def report(config, table, timesteps, widths, device, common):
    """Print accuracies (timesteps, blocks), append them to results.jsonl, draw several as a map."""
    epoch, length, n = common["epoch"], common["sigma_rel"], f"{common['n']:,} test images"
    suffix = f" sigma_rel={length:g}" if length else ""
    pairs = [(t, linear_probe.sigma_of(config, t), block) for t in timesteps for block in widths]
    results.record(config, [
        (f"probe t={t} {block}{suffix} (%)", common | {"value": value, "timestep": t,
            "sigma": sigma, "features": block, "width": widths[block]})
        for (t, sigma, block), value in zip(pairs, table.flatten().tolist(), strict=True)], device)
    if table.size > 1:
        print("| block | " + " | ".join(f"t={t}" for t in timesteps) + " |\n"
              + "|---" * (len(timesteps) + 1) + "|")
        for block, values in zip(widths, table.T, strict=True):
            print(f"| {block} | " + " | ".join(f"{value:.2f}" for value in values) + " |")
        path = f"{config.save_dir}/probe_{epoch}{suffix and f'_sigma_rel{length:g}'}.png"
        figure = heat_map(table.T, [f"{t}\n{sigma:.3g}" for t, sigma, _ in pairs[::len(widths)]],
                          list(widths), f"{config.dataset}, {config.net_type}, epoch {epoch}, {n}")
        with files.atomic(path) as temporary:
            figure.savefig(temporary, format="png")
        print(f"heat map: {path}")
    t, sigma, block = pairs[table.argmax()]
    print(f"{'best ' * (table.size > 1)}probe accuracy {table.max():.2f} %: epoch {epoch}, t={t} "
          f"(sigma {sigma:.4g}), {block} ({widths[block]} features){suffix}, {n}")

def heat_map(accuracies, levels, blocks, title):
    """A matplotlib Figure of accuracies (blocks, levels) in per cent, the best framed."""
    from matplotlib.figure import Figure  # Slow to import: only where it is used.
    size = 2.4 + 0.75 * len(levels), 1.8 + 0.38 * len(blocks)
    axes = Figure(size, layout="constrained", dpi=150).subplots()
    axes.imshow(accuracies, aspect="auto", alpha=0.6)
    for (row, column), value in np.ndenumerate(accuracies):
        axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=8,
                  bbox={"fill": False, "ec": "red"} if value == accuracies.max() else None)
    axes.set_xticks(range(len(levels)), levels, fontsize=8)
    axes.set_yticks(range(len(blocks)), blocks, fontsize=8)
    axes.set(xlabel="timestep, and its noise level sigma", ylabel="decoder block")
    axes.set_title(f"Linear probe, test accuracy (%)\n{title}", fontsize=10)
    return axes.figure

if __name__ == "__main__":
    command(main)()
