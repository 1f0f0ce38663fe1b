"""Variants of runs at equal Mimg, each with several seeds, trained and scored: what a key does.

    python benchmarks/sweep.py --config config/digits/C.yaml config/digits/G.yaml
    python benchmarks/sweep.py --config config/digits/G.yaml --vary lrate=1e-2,2e-2,4e-2
    python benchmarks/sweep.py --config config/digits/G.yaml \\
        --vary diffusion.p_mean,diffusion.p_std=[-1.2,1.2],[-0.8,1.6]

Trains with train.py, on the CPU one run per core, the variants in turns, seed by seed; the same
command goes on where it was stopped, or only prints. What it prints: the command, and tables of
means and standard deviations over the seeds, at equal Mimg and at equal time. --out has the scores
themselves; what --set changes needs a --save_dir and --out of its own.
"""

import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import shlex
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from unittest import mock
import judge
import torch
import yaml
from sides import machine
import blockC
import train
from edm2 import checkpoint, data, diffusion, distributed, evaluation, features, frechet
from edm2 import linear_probe as probe
from edm2.config import FREE, load_config, to_number
from edm2.errors import UserError, command
from edm2.machine import cores
from edm2.posthoc_ema import load_denoiser

def with_mean(self, x):
    """GroupNorm's forward with the mean subtraction that the paper leaves out (Eq. 29)."""
    x = x.unflatten(1, (self.groups, -1))
    x = x - x.mean((2, 3, 4), keepdim=True)
    return blockC.normalize(x, dim=(2, 3, 4)).flatten(1, 2)

# What no key can say: {name: (a class, its function, what takes its place)}.
CHANGES = {"mean": (blockC.GroupNorm, "forward", with_mean)}

@dataclass(frozen=True)
class Variant:
    """A run but for its seed: its name, its YAML, and the overrides beside --set's."""
    name: str
    path: str
    overrides: tuple = ()

    def config(self, seed, args):
        """Its Config, and all overrides."""
        folder = Path(args.save_dir, "-".join(self.name.replace("/", " ").split()), str(seed))
        overrides = [*args.set, *self.overrides, f"seed={seed}", f"save_dir={folder}"]
        return load_config(self.path, overrides), overrides

def main():
    """Train and score what is missing, print the tables."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--config", nargs="+", required=True, help="YAML files; they need eval_every")
    add("--vary", action="append", default=[], metavar="KEY=A,B,C",
        help="values of a key, or of keys together; given twice: all pairs")
    add("--change", choices=list(CHANGES), help="local: mean: of Config C's group norms, kept")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key in all")
    add("--seeds", type=int, default=3)
    add("--epochs", type=lambda text: [int(word) for word in text.split(",")],
        help="score after so many epochs, such as 2,4 (default: the last alone)")
    add("--features", choices=["pixels", judge.NAME], default="pixels", help="of the FD")
    add("--samples", type=int, default=1000, help="of the FD")
    add("--floor", action="store_true", help="the FD of as many real test images, too")
    add("--probe", type=int, default=0, metavar="N", help="linear probe on N training images")
    add("--save_dir", default="runs/sweep")
    add("--out", type=Path, metavar="JSONL", help="scores (default: scores.jsonl in save_dir)")
    add("--jobs", type=int, default=cores(), help="runs at a time")
    add("--amp_dtype", choices=["float16", "bfloat16"])
    args = p.parse_args()
    args.out = args.out or Path(args.save_dir) / "scores.jsonl"
    chosen = variants(args)
    runs = [(variant, seed) for seed in range(args.seeds) for variant in chosen]
    known = [json.loads(line) for line in args.out.read_text().splitlines()
             ] if args.out.exists() else []
    found = {run: kept(*run, args, known) for run in runs}
    missing = [run for run in runs if not found[run]]
    for config in {v.path: v.config(0, args)[0] for v, _ in missing}.values():
        Scorer(config, args)                # What all runs share is computed by all cores.
    context = multiprocessing.get_context("spawn")
    slots = context.Queue()
    for slot in range(args.jobs):
        slots.put(slot)
    with ProcessPoolExecutor(args.jobs, context, own_cores, (slots, args.jobs)) as pool:
        futures = {pool.submit(score, *run, args): run for run in missing}
        for future in as_completed(futures):
            variant, seed = run = futures[future]
            try:
                found[run] = future.result()
                with open(args.out, "a") as file:
                    file.writelines(json.dumps(line) + "\n" for line in found[run])
                said = "done"
            except UserError as e:          # Such as of NaN gradients.
                said = f"left out: {e}"
            print(f"{variant.name}, seed {seed}: {said}", file=sys.stderr, flush=True)
    print(f"`{shlex.join(['python', *sys.argv])}`\n")
    by_variant = {v.name: [line for seed in range(args.seeds) for line in found[v, seed]]
                  for v in chosen if any(found[v, seed] for seed in range(args.seeds))}
    if not by_variant:
        raise UserError("no run came to its end: see output.txt in their folders")
    rows = {(name, mark): [line for line in lines if line["Mimg"] == mark]
            for mark in sorted({line["Mimg"] for lines in by_variant.values() for line in lines})
            for name, lines in by_variant.items() if any(line["Mimg"] == mark for line in lines)}
    print(table(rows), table(rows, "heldout_loss/"), curves(by_variant, "heldout"),
          curves(by_variant, "training"), at_equal_time(by_variant), sep="\n\n")
    if args.floor:
        print(f"\n{floor(chosen[0].config(0, args)[0], args)}")

def variants(args):
    """The Variants that the command line names. One that --vary leaves as it is has no values in
    its name: it is the same run, with or without --vary."""
    axes, found = [], {}
    for text in args.vary:
        keys, _, values = text.partition("=")
        keys, values = keys.split(","), yaml.safe_load(f"[{values}]")
        values = values if keys[1:] else [[to_number(value)] for value in values]
        if not all(isinstance(value, list) and len(value) == len(keys) for value in values):
            raise UserError(f"--vary {text}: say KEY=A,B,C, or KEY,KEY=[A,B],[C,D]")
        axes.append([tuple(f"{key}={json.dumps(one)}" for key, one in zip(keys, value, strict=True))
                     for value in values])
    for path, parts in itertools.product(args.config, itertools.product(*axes)):
        overrides, name = tuple(itertools.chain(*parts)), "/".join(Path(path).parts[-2:])[:-5]
        name += f" {args.change}" * bool(args.change)
        base = Variant(name, path).config(0, args)[0]
        words = [name]
        for override in overrides:
            key, _, value = override.partition("=")
            if Variant(name, path, (override,)).config(0, args)[0] != base:
                words.append(f"{key.rpartition('.')[2]}={value}")
        found[" ".join(words)] = Variant(" ".join(words), path, overrides)
    return list(found.values())

# ----------------------------------------------------------------------------------------------
# A run.

def own_cores(slots, jobs):
    """Take this process's share of the cores, which distributed.init() counts."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[slots.get() % len(cores)::jobs])

def kept(variant, seed, args, known):
    """What score() has returned, [] where not all of it is known. Raises UserError where that was
    of another config."""
    config, _ = variant.config(seed, args)
    wanted = {n: about(variant, seed, n, args) for n in args.epochs or [config.n_epoch]}
    found = {n: [line for line in known if line | one == line] for n, one in wanted.items()}
    for line in itertools.chain(*found.values()):
        checkpoint.check_same(config, line["config"], dict(config).keys() - FREE)
    return [lines[-1] for lines in found.values()] if all(found.values()) else []

def about(variant, seed, n_epochs, args):
    """What a score is of."""
    return {"variant": variant.name, "seed": seed, "epochs": n_epochs, "features": args.features,
            "samples": args.samples, "probe": args.probe}

def score(variant, seed, args):
    """Train a variant with a seed, and score it after each of --epochs: a line for each."""
    config, overrides = variant.config(seed, args)
    folder = Path(config.save_dir)
    folder.mkdir(parents=True, exist_ok=True)
    words = [word for override in [*overrides, "save_every=1"] for word in ("--set", override)]
    words += ["--amp_dtype", args.amp_dtype] if args.amp_dtype else []
    argv = ["train.py", "--config", variant.path, *words]
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(open(folder / "output.txt", "a"))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(out))
        stack.enter_context(mock.patch.object(sys, "argv", argv))
        if args.change:
            stack.enter_context(mock.patch.object(*CHANGES[args.change]))
        train.main()
        scorer = Scorer(config, args)
        found = {n: scorer.measure(n) for n in args.epochs or [config.n_epoch]}
    dynamics, metrics = ([json.loads(line) for line in (folder / f"{name}.jsonl").read_text()
                          .splitlines()] for name in ("dynamics", "metrics"))
    values = [value if value is not None else math.inf for row in dynamics
              for blocks in row["activation"].values() for value in blocks.values()]
    speed = statistics.median(row["img_per_s"] for row in metrics if "img_per_s" in row)
    of_run = {"activations": [min(values), max(values)], "img_per_s": speed, "machine": machine(),
              "config": config.model_dump()}
    for name, key in (("training", "loss_unweighted"), ("heldout", "heldout_loss")):
        curve = [[row["Mimg"], row[key]] for row in metrics if key in row]
        of_run[name] = [curve[2 ** k - 1] for k in range(len(curve).bit_length())]
    return [about(variant, seed, n, args) | {"Mimg": scorer.mimg(n), "scores": scores} | of_run
            for n, scores in found.items()]

class Scorer:
    """Scores a run's checkpoints: held-out loss, FD, linear probe."""
    def __init__(self, config, args):
        self.config, self.amp_dtype = config, args.amp_dtype and getattr(torch, args.amp_dtype)
        self.device, (images, labels) = distributed.init(), data.load(config)
        self.steps = len(images) // config.batch_size
        self.evaluator = one = evaluation.Evaluator(
            config.model_copy(update={"eval": config.eval.model_copy(
                update={"fid": 0, "probe": False})}), images, labels, self.device)
        one.config = config.model_copy(update={"eval": config.eval.model_copy(
            update={"fid": args.samples, "probe": args.probe > 0})})
        one.extractor = features.Extractor(*([args.features, self.device] if args.features ==
            "pixels" else [judge.NAME, self.device, judge.register()[1]]))
        one.reference = frechet.reference(config, images, one.extractor)
        one.sets[probe.TRAIN] = images[:args.probe], labels[:args.probe]

    def measure(self, n_epochs):
        """{metric: value} of the plain EMA after so many epochs."""
        config = self.config
        denoiser = load_denoiser(config, checkpoint.find(config, n_epochs - 1), "ema", None,
                                 self.amp_dtype)
        found = self.evaluator.measure(diffusion.deploy(denoiser, self.device))
        return {key: value for key, value in found.items() if not key.startswith("u/")}

    def mimg(self, n_epochs):
        """Million images seen after so many epochs."""
        return n_epochs * self.steps * self.config.batch_size / 1e6

def floor(config, args):
    """The FD of as many real images: of --seeds parts of the test set."""
    one = Scorer(config, args).evaluator
    parts = one.sets[probe.TEST][0].split(args.samples)[:args.seeds]
    found = [frechet.distance(frechet.compute(features.ImageSet("real test images", part),
                                              one.extractor), one.reference) for part in parts]
    return f"{one.extractor.metric('FID')} n={args.samples} of real test images: " + \
        mean_and_deviation(found)

# ----------------------------------------------------------------------------------------------
# The tables.

def table(rows, metrics=None):
    """Markdown: a row per {(variant, Mimg): lines of score()}: the main scores of each, or those
    that begin so."""
    lines = []
    for (variant, mark), runs in rows.items():
        cells = {"variant": variant, "seeds": str(len(runs)), "Mimg": f"{mark:.3g}"}
        cells |= {key.removeprefix(metrics or ""):
                  mean_and_deviation([run["scores"][key] for run in runs])
                  for key in runs[0]["scores"]
                  if (key.startswith(metrics) if metrics else "/" not in key)}
        if not metrics:
            least, most = zip(*(run["activations"] for run in runs), strict=True)
            cells["activations (RMS)"] = f"{min(least):.2f} to {max(most):.3g}"
            cells["img/s"] = mean_and_deviation([run["img_per_s"] for run in runs])
        lines.append(cells)
    return markdown(lines)

def curves(by_variant, name):
    """Markdown: held-out losses, or unweighted training losses since the record before (of the same
    images and noise with one seed), at the records 1, 2, 4, ... that all have."""
    kept = {variant: list({run["seed"]: dict(run[name]) for run in runs}.values())
            for variant, runs in by_variant.items()}
    common = set.intersection(*(set(one) for runs in kept.values() for one in runs))
    return markdown([{f"{name} loss": variant} | {
        f"{mark:.3g} Mimg": mean_and_deviation([one[mark] for one in runs])
        for mark in sorted(common)} for variant, runs in kept.items()])

def at_equal_time(by_variant):
    """Markdown: the scores of {variant: lines of score()} when the fastest had been trained to the
    last mark that all have: the others' between two of their marks, linear in log(Mimg)."""
    speeds = {name: statistics.mean(run["img_per_s"] for run in runs)
              for name, runs in by_variant.items()}
    common = set.intersection(*({run["Mimg"] for run in runs} for runs in by_variant.values()))
    lines, most = [], max(speeds.values())
    for name, runs in by_variant.items():
        marks = sorted({run["Mimg"] for run in runs} & common)
        reached = marks[-1] * (speeds[name] / most) if marks else 0
        if len(marks) < 2 or not marks[0] <= reached:
            continue                        # It would be extrapolated.
        before, after = next(pair for pair in itertools.pairwise(marks) if reached <= pair[1])
        share = math.log(reached / before) / math.log(after / before)
        cells = {"at equal time": name, "Mimg": f"{reached:.3g}"}
        for key in (key for key in runs[0]["scores"] if "/" not in key):
            pair = [{run["seed"]: run["scores"][key] for run in runs if run["Mimg"] == mark}
                    for mark in (before, after)]
            cells[key] = mean_and_deviation([
                (1 - share) * value + share * pair[1][seed] for seed, value in pair[0].items()])
        lines.append(cells)
    return markdown(lines)

def markdown(lines):
    """A table of dicts with the same keys."""
    rows = [list(lines[0]), ["---"] * len(lines[0]), *(line.values() for line in lines)
            ] if lines else []
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)

def mean_and_deviation(values):
    """Such as "0.7571 ± 0.0021"."""
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{spread}"

if __name__ == "__main__":
    command(main)()
