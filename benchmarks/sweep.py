"""The search for Config G's recipe: variants of it beside C and E, at equal images seen, each with
several seeds.

    python benchmarks/sweep.py --data digits --save_dir runs/sweep
    python benchmarks/sweep.py --data cifar10 --data_root ../shared/data --only C E G "G lrate"

Trains with train.py, on the CPU one run per core; what has been trained and scored is not done
again. Each run is scored with its plain EMA and with post-hoc EMAs of LENGTHS: the held-out loss
and FD(pixels) of samples. The table has the mean and standard deviation over the seeds;
docs/config-g.md says what follows from it.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import shlex
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from unittest import mock
import torch
from PIL import Image
from sides import ROOT, machine
import train
from edm2 import checkpoint, data, diffusion, distributed, evaluation
from edm2.config import load_config
from edm2.errors import UserError, command
from edm2.machine import cores
from edm2.posthoc_ema import load_denoiser

LENGTHS = (0.05, 0.10, 0.18)      # sigma_rel of the post-hoc EMAs, beside the plain one.
COMMON = ["posthoc_ema.sigma_rels=[0.05,0.1]", "posthoc_ema.snapshots=32", "save_every=1000000",
          "n_sample=16", "eval.features=pixels"]

# What a run is, beside config/<data>/<C, E or G>.yaml.
DATA = {
    "digits": ["eval_every=20"],
    # CIFAR-10 at 16x16 and a small network: 50,000 images within minutes of one core.
    "cifar10": ["dataset=folder", "network.image_shape=[3,16,16]", "network.n_channels=16",
                "network.ch_mults=[1,2,2]", "network.is_attn=[false,true,false]",
                "network.attn_channels_per_head=16", "network.n_blocks=2", "n_epoch=1",
                "batch_size=64", "warm_epoch=0.05", "ema=0.998", "eval.images=1000",
                "eval_every=1"],
}
# For so few images other rates than those of the shipped configs; E's and G's fall from a fifth of
# the run on.
OWN = {"digits": {"C": [], "E": [], "G": []},
       "cifar10": {"C": ["lrate=1e-3"], "E": ["lrate=1e-2", "tref_epoch=0.2"],
                   "G": ["lrate=1e-2", "tref_epoch=0.2"]}}

# Name: config, what is changed: rate and heads as multiples of the base's, warm-up as a share of
# the run; "gain", which is no key: where the conditioning gains begin.
VARIANTS = {
    "C": ("C", {}),
    "E": ("E", {}),
    "G": ("G", {}),
    **{f"{config} lrate x{factor:g}": (config, {"lrate": factor})
       for config in "CEG" for factor in (0.25, 0.5, 2, 4, 8)},
    "G betas .9, .999": ("G", {"optim_args.betas": "[0.9,0.999]"}),
    "G betas .9, .95": ("G", {"optim_args.betas": "[0.9,0.95]"}),
    "G betas 0, .99": ("G", {"optim_args.betas": "[0,0.99]"}),
    **{f"{config} dropout {rate}": (config, {"network.dropout": rate})
       for config in "CEG" for rate in (0.0, 0.13)},
    "G warm-up none": ("G", {"warm_epoch": 0}),
    "G warm-up long": ("G", {"warm_epoch": 0.2}),
    "G no decay": ("G", {"tref_epoch": "null"}),
    "G gain from 1": ("G", {"gain": 1.0}),
    "G heads half as wide": ("G", {"network.attn_channels_per_head": 0.5}),
    "G one head": ("G", {"network.attn_channels_per_head": "null"}),
}

def main():
    """Train and score what is missing, print the table."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", choices=list(DATA), default="digits")
    p.add_argument("--data_root", default="data")
    p.add_argument("--save_dir", default="runs/sweep")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--samples", type=int, default=500, help="of FD(pixels)")
    p.add_argument("--only", nargs="+", metavar="NAME",
                   help="variants that are so called or begin so (default: all)")
    p.add_argument("--jobs", type=int, default=cores(), help="runs at a time")
    p.add_argument("--amp_dtype", choices=["float16", "bfloat16"])
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                   help="override a key in all runs")
    args = p.parse_args()
    if args.data == "cifar10":
        args.data_root = as_folders(args.data_root, Path(args.save_dir) / "images")
    chosen = [name for name in VARIANTS if changes_something(name, args) and (not args.only or any(
        name == word or (len(word) > 1 and name.startswith(word)) for word in args.only))]
    runs = [(name, seed) for seed in range(args.seeds) for name in chosen]
    found = {run: kept(*run, args) for run in runs}
    context = multiprocessing.get_context("spawn")
    slots = context.Queue()
    for slot in range(args.jobs):
        slots.put(slot)
    with ProcessPoolExecutor(args.jobs, context, own_cores, (slots, args.jobs)) as pool:
        futures = {pool.submit(score, *run, args): run for run in runs if not found[run]}
        for future in as_completed(futures):
            name, seed = futures[future]
            try:
                found[name, seed] = future.result()
                print(f"{name}, seed {seed}: {found[name, seed]['plain']}", file=sys.stderr,
                      flush=True)
            except UserError as e:          # Such as of NaN gradients.
                print(f"{name}, seed {seed}, is left out: {e}", file=sys.stderr, flush=True)
    print(f"`{shlex.join(['python', *sys.argv])}`, {machine()}\n")
    print(table({name: [found[name, seed] for seed in range(args.seeds) if found[name, seed]]
                 for name in chosen}))

def as_folders(data_root, out):
    """Write CIFAR-10 to a folder as PNGs, for a data set that can have another size, unless that is
    done. Return it."""
    if not (out / "done").exists():
        config = load_config(ROOT / "config" / "cifar10" / "C.yaml", [f"data_root={data_root}"])
        for part in ("train", "val"):
            images, labels = data.load(config, train=part == "train")
            for label in range(config.classes):
                (out / part / str(label)).mkdir(parents=True, exist_ok=True)
            for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(
                    out / part / str(label) / f"{i:05d}.png")
        (out / "done").touch()
    return out

# ----------------------------------------------------------------------------------------------
# A run.

def own_cores(slots, jobs):
    """Take this process's share of the cores, which distributed.init() counts."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[slots.get() % len(cores)::jobs])

def kept(name, seed, args):
    """What score() has returned, None where it has not. Raises UserError where that was of another
    config."""
    config_path, overrides, _ = described(name, seed, args)
    config = load_config(config_path, overrides)
    path = Path(config.save_dir) / "scores.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    if found["config"] != config.model_dump():
        raise UserError(f"{path} is of another config: remove its folder, or choose another "
                        f"--save_dir")
    return found

def score(name, seed, args):
    """Train a variant with a seed and score it. Return what scores.json holds then:
    {"plain": {metric: value}, "0.05": ..., "activations": [least, most], "Mimg": ...,
    "config": ...}."""
    config_path, overrides, gain = described(name, seed, args)
    config = load_config(config_path, overrides)
    folder = Path(config.save_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (open(folder / "output.txt", "a") as out, contextlib.redirect_stdout(out),
          contextlib.redirect_stderr(out)):
        words = [word for override in [*overrides, "eval.fid=0"] for word in ("--set", override)]
        words += ["--amp_dtype", args.amp_dtype] if args.amp_dtype else []
        argv = ["train.py", "--config", str(config_path), *words]
        build = diffusion.build if gain is None else begun_at(gain, diffusion.build)
        with mock.patch.object(sys, "argv", argv), mock.patch.object(diffusion, "build", build):
            train.main()
        found = scores(config, args)
    (folder / "scores.json").write_text(json.dumps(found))
    return found

def described(name, seed, args):
    """The YAML of a variant, the overrides, and where the gains begin (None: as the network says).
    """
    letter, changes = VARIANTS[name]
    path = ROOT / "config" / args.data / f"{letter}.yaml"
    folder = Path(args.save_dir) / args.data / "-".join(name.replace(",", "").split()) / str(seed)
    overrides = [*COMMON, *DATA[args.data], *OWN[args.data][letter], f"data_root={args.data_root}",
                 f"eval.fid={args.samples}", f"save_dir={folder}", f"seed={seed}", *args.set]
    base = load_config(path, overrides)
    for key, value in changes.items():
        if key == "lrate":
            value *= base.lrate
        if key == "warm_epoch":
            value *= base.n_epoch
        if key.endswith("per_head") and value != "null":
            value = round(value * base.network.attn_channels_per_head)
        if key != "gain":
            overrides.append(f"{key}={value}")
    return path, overrides, changes.get("gain")

def changes_something(name, args):
    """Whether a variant differs from its config: a base does not, but counts."""
    letter, _ = VARIANTS[name]
    (path, overrides, gain), (_, base, _) = (described(n, 0, args) for n in (name, letter))
    config, base = (load_config(path, [*o, "save_dir=any"]) for o in (overrides, base))
    return name == letter or gain is not None or config != base

def begun_at(gain, build):
    """diffusion.build, but of networks whose conditioning gains begin at `gain`."""
    def built(*arguments, **named):
        denoiser = build(*arguments, **named)
        for name, p in denoiser.net.named_parameters():
            if name.endswith(".gain"):
                p.data.fill_(gain)
        return denoiser
    return built

def scores(config, args):
    """What score() returns, of a run that is done."""
    device, (images, labels) = distributed.init(), data.load(config)
    dtype = args.amp_dtype and getattr(torch, args.amp_dtype)
    evaluator = evaluation.Evaluator(config, images, labels, device)
    n_steps = config.n_epoch * (len(images) // config.batch_size)
    found = {"Mimg": n_steps * config.batch_size / 1e6}
    for length in (None, *LENGTHS):
        denoiser = load_denoiser(config, checkpoint.find(config), "ema", length, dtype)
        found["plain" if length is None else f"{length:g}"] = evaluator.measure(
            diffusion.deploy(denoiser, device))
    lines = (Path(config.save_dir) / "dynamics.jsonl").read_text().splitlines()
    values = [value if value is not None else math.inf for line in lines
              for blocks in json.loads(line)["activation"].values() for value in blocks.values()]
    return found | {"activations": [min(values), max(values)], "config": config.model_dump()}

# ----------------------------------------------------------------------------------------------
# The table.

def table(found):
    """Markdown: a row per variant of {variant: [scores of each seed]}."""
    head = ["variant", "seeds", "Mimg", "held-out loss, plain EMA", "held-out loss, best EMA",
            "FD(pixels), plain EMA", "FD(pixels), best EMA", "activations (RMS), least to most"]
    lines = [head, ["---"] * len(head)]
    for name, runs in found.items():
        if not runs:
            lines.append([name, "0", *["-"] * (len(head) - 2)])
            continue
        distance = next(key for key in runs[0]["plain"] if key.startswith("FD"))
        cells = [name, str(len(runs)), f"{runs[0]['Mimg']:.3g}"]
        for metric in ("heldout_loss", distance):
            cells.append(mean_and_deviation([run["plain"][metric] for run in runs]))
            # The length that is best on average.
            best = min(map("{:g}".format, LENGTHS),
                       key=lambda key: sum(run[key][metric] for run in runs))
            cells.append(f"{mean_and_deviation([run[best][metric] for run in runs])} at {best}")
        least, most = zip(*(run["activations"] for run in runs), strict=True)
        lines.append([*cells, f"{min(least):.2f} to {max(most):.3g}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

def mean_and_deviation(values):
    """Such as "0.7571 ± 0.0021"."""
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{spread}"

if __name__ == "__main__":
    command(main)()
