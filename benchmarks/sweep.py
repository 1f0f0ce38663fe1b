"""Variants of runs at equal Mimg, each with several seeds, trained and scored: what a key does.

    python benchmarks/sweep.py --config config/digits/C.yaml config/digits/G.yaml
    python benchmarks/sweep.py --config config/digits/G.yaml --vary lrate=1e-2,2e-2,4e-2
    python benchmarks/sweep.py --config config/digits/G.yaml \\
        --vary diffusion.p_mean,diffusion.p_std=[-1.2,1.2],[-0.8,1.6]

Trains with train.py, on the CPU one run per core, the variants in turns, seed by seed. The same
command goes on where it was stopped; once all is done, it only prints: the command, and tables of
means and standard deviations over the seeds, at equal Mimg and at equal time. The scores themselves
are lines of --out. Sweeps that --set makes differ need a --save_dir and --out of their own.
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
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from unittest import mock
import judge
import torch
from expected import MIDDLE, mean_loss
from sides import machine
import blockC
import train
from edm2 import checkpoint, data, diffusion, distributed, evaluation, features, flags, frechet
from edm2 import linear_probe as probe
from edm2.config import FREE, Count, Index, load_config, parse_yaml, to_number
from edm2.errors import UserError, command
from edm2.evaluation import LEVELS
from edm2.machine import cores
from edm2.posthoc_ema import load_denoiser

def with_mean(self, x):
    """GroupNorm's forward with the mean subtraction that the paper leaves out (Eq. 29)."""
    x = x.unflatten(1, (self.groups, -1))
    x = x - x.mean((2, 3, 4), keepdim=True)
    return blockC.normalize(x, dim=(2, 3, 4)).flatten(1, 2)

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
    add, count = p.add_argument, flags.flag(Count)
    add("--config", nargs="+", required=True, help="YAML files with eval_every")
    add("--vary", action="append", default=[], metavar="KEY=A,B,C",
        help="values of a key, or of keys together; given twice: all pairs")
    add("--mean", action="store_true", help="group norms of Config C subtract the mean")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key in all")
    add("--seeds", type=count, default=3)
    add("--epochs", type=lambda text: [count(word) for word in text.split(",")],
        help="score after so many epochs, such as 2,4 (default: n_epoch)")
    add("--features", choices=["pixels", judge.NAME], default="pixels", help="of the FD")
    add("--samples", type=count, default=1000, help="of the FD")
    add("--probe", type=flags.flag(Index), default=0, metavar="N",
        help="linear probe on the first N training images")
    add("--floor", action="store_true",
        help="print the FD of as many real test images, too, for the first config")
    add("--save_dir", default="runs/sweep")
    add("--out", type=Path, metavar="JSONL", help="scores (default: scores.jsonl in save_dir)")
    add("--img_per_s", type=lambda text: [float(word) for word in text.split(",")],
        help="speeds of the variants for the scores at equal time, as benchmarks/train_step.py "
             "measures them in turns (default: of the fastest seed, whatever else ran beside it)")
    add("--jobs", type=count, default=cores(), help="runs at a time")
    add("--amp_dtype", choices=["float16", "bfloat16"])
    args = p.parse_args()
    args.out = args.out or Path(args.save_dir) / "scores.jsonl"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    chosen = variants(args)
    if args.img_per_s and (len(args.img_per_s) != len(chosen) or min(args.img_per_s) <= 0):
        raise UserError(f"--img_per_s needs a speed of each: {', '.join(v.name for v in chosen)}")
    found = score_all([(variant, seed) for seed in range(args.seeds) for variant in chosen], args)
    print(f"`{shlex.join(['python', *sys.argv])}`\n")
    by_variant = {v.name: lines for v in chosen if (lines := [
        line for seed in range(args.seeds) for line in found[v, seed]])}
    if not by_variant:
        raise UserError(f"no run came to its end: see output.txt in the folders of {args.save_dir}")
    print(*sorted({line["machine"] for lines in by_variant.values() for line in lines}), sep="\n")
    speeds = dict(zip((v.name for v in chosen), args.img_per_s or [], strict=False))
    print("", table(by_variant), table(by_variant, "heldout_loss/"), curves(by_variant, "heldout"),
          curves(by_variant, "training"), at_equal_time(by_variant, speeds), sep="\n\n")
    if args.floor:
        print(f"\n{floor(chosen[0].config(0, args)[0], args)}")

def variants(args):
    """The Variants that the command line names, each by the keys that make it another run than its
    YAML and --set. Raises UserError for what cannot be run or scored."""
    axes, found = [], {}
    for text in args.vary:
        keys, _, values = text.partition("=")
        keys, values = keys.split(","), parse_yaml(f"[{values}]", f"--vary {keys}")
        values = values if keys[1:] else [[value] for value in values]
        if not values or {"seed", "save_dir"} & set(keys) or not all(
                isinstance(value, list) and len(value) == len(keys) for value in values):
            raise UserError(f"--vary {text}: say KEY=A,B,C, or KEY,KEY=[A,B],[C,D]; not seed, "
                            f"save_dir")
        axes.append([[(key, to_number(one)) for key, one in zip(keys, value, strict=True)]
                     for value in values])
    for path, parts in itertools.product(args.config, itertools.product(*axes)):
        name = "/".join(Path(path).with_suffix("").parts[-2:]) + " mean" * args.mean
        name += f" {args.amp_dtype}" if args.amp_dtype else ""
        pairs, base = list(itertools.chain(*parts)), Variant(name, path).config(0, args)[0]
        overrides = tuple(f"{key}={json.dumps(value)}" for key, value in pairs)
        config, _ = Variant(name, path, overrides).config(0, args)
        words = [word for word, (key, _) in zip(overrides, pairs, strict=True)
                 if value_of(config, key) != value_of(base, key)]
        one = Variant(" ".join([name, *words]), path, overrides)
        if found.setdefault(one.name, one).config(0, args)[0] != one.config(0, args)[0]:
            raise UserError(f"two different runs would be called {one.name}")
        for wrong, message in (
                (not config.eval_every, "needs eval_every"),
                (max(args.epochs or [1]) > config.n_epoch, f"has {config.n_epoch} epochs"),
                (args.samples < 2, "needs two samples or more for an FD"),
                (args.mean and config.net_type != "UNetC", "is not Config C: no --mean")):
            if wrong:
                raise UserError(f"{one.name} {message}")
        if args.probe:
            probe.check_blocks(config, [config.linear.blockname])
    return list(found.values())

def value_of(config, key):
    """The value of a dotted key."""
    for name in key.split("."):
        config = getattr(config, name)
    return config

# ----------------------------------------------------------------------------------------------
# Runs.

def score_all(runs, args):
    """{run: its lines, [] where it failed}: those of --out, and the others trained and scored."""
    known = []
    for i, line in enumerate(args.out.read_text().splitlines() if args.out.exists() else [], 1):
        try:
            known.append(json.loads(line))
        except ValueError:
            raise UserError(f"{args.out}: line {i} is damaged: remove it") from None
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
        try:
            for future in as_completed(futures):
                variant, seed = run = futures[future]
                try:
                    found[run], said = future.result(), "done"
                    with open(args.out, "a") as file:
                        file.writelines(json.dumps(line) + "\n" for line in found[run])
                except UserError as e:      # Such as of NaN gradients.
                    said = f"left out: {e}"
                print(f"{variant.name}, seed {seed}: {said}", file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return found

def own_cores(slots, jobs):
    """Take this process's share of the cores, which distributed.init() counts; end with the sweep,
    however that ends."""
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)),
                     daemon=True).start()
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[slots.get() % len(cores)::jobs])

def kept(variant, seed, args, known):
    """What score() has returned, [] where not all of it is known. Raises UserError where that was
    of another config or data."""
    config, _ = variant.config(seed, args)
    wanted = {n: about(variant, seed, n, args) for n in args.epochs or [config.n_epoch]}
    found = {n: [line for line in known if line | one == line] for n, one in wanted.items()}
    keys = (dict(config).keys() - FREE) | {"eval.", "linear.", "data_root"}
    for line in itertools.chain(*found.values()):
        try:
            checkpoint.check_same(config, line["config"], keys)
        except UserError as e:
            raise UserError(f"{args.out}: {e} and --out") from None
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
    words = [word for override in [*overrides, "save_every=1", "save_model=true"]
             for word in ("--set", override)]
    words += ["--amp_dtype", args.amp_dtype] if args.amp_dtype else []
    argv = ["train.py", "--config", variant.path, *words]
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(open(folder / "output.txt", "a"))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(out))
        stack.enter_context(mock.patch.object(sys, "argv", argv))
        if args.mean:
            stack.enter_context(mock.patch.object(blockC.GroupNorm, "forward", with_mean))
        train.main()
        scorer = Scorer(config, args)
        found = {n: scorer.measure(n) for n in args.epochs or [config.n_epoch]}
    return [about(variant, seed, n, args) | {"scores": scores, "config": config.model_dump()}
            | figures(folder, scorer.mimg(n)) for n, scores in found.items()]

def figures(folder, mimg):
    """What of a run's metrics.jsonl and dynamics.jsonl goes into its line of a mark."""
    dynamics, metrics = ([json.loads(line) for line in path.read_text().splitlines()]
                         if (path := folder / f"{name}.jsonl").exists() else []
                         for name in ("dynamics", "metrics"))
    values = [value if value is not None else math.inf for row in dynamics if row["Mimg"] <= mimg
              for blocks in row["activation"].values() for value in blocks.values()]
    curve = {name: [[row["Mimg"], row[key]] for row in metrics if key in row] for name, key in (
        ("training", "loss_unweighted"), ("heldout", "heldout_loss"))}
    return {"Mimg": mimg, "machine": machine(),
            "activations": [min(values), max(values)] if values else None,
            "img_per_s": statistics.median(row["img_per_s"] for row in metrics
                                           if "img_per_s" in row),
            **{name: [rows[2 ** k - 1] for k in range(len(rows).bit_length())]
               for name, rows in curve.items()}}

class Scorer:
    """Scores a run's checkpoints: held-out loss, FD, linear probe."""
    def __init__(self, config, args):
        self.config, self.amp_dtype = config, args.amp_dtype and getattr(torch, args.amp_dtype)
        self.device, (images, labels) = distributed.init(), data.load(config)
        self.steps, self.n_wanted = len(images) // config.batch_size, 2 + (args.probe > 0)
        plain, asked = (config.model_copy(update={"eval": config.eval.model_copy(update=update)})
                        for update in ({"fid": 0, "probe": False},
                                       {"fid": args.samples, "probe": args.probe > 0}))
        self.evaluator = one = evaluation.Evaluator(plain, images, labels, self.device)
        weights = judge.register()[1] if args.features == judge.NAME else None
        one.config, one.extractor = asked, features.Extractor(args.features, self.device, weights)
        one.reference = frechet.reference(config, images, one.extractor)
        one.sets[probe.TRAIN] = images[:args.probe], labels[:args.probe]

    def measure(self, n_epochs):
        """{metric: value} of the plain EMA after so many epochs. UserError: one cannot be had."""
        epoch = checkpoint.find(self.config, n_epochs - 1)
        denoiser = load_denoiser(self.config, epoch, amp_dtype=self.amp_dtype)
        found = self.evaluator.measure(diffusion.deploy(denoiser, self.device))
        found = {key: value for key, value in found.items() if not key.startswith("u/")}
        if sum("/" not in key and math.isfinite(value) for key, value in found.items()
               ) != self.n_wanted:
            raise UserError(f"epoch {epoch} cannot be scored, see output.txt in "
                            f"{self.config.save_dir}")
        return found

    def mimg(self, n_epochs):
        """Million images seen after so many epochs."""
        return n_epochs * self.steps * self.config.batch_size / 1e6

def floor(config, args):
    """The FD of as many real images: of up to --seeds parts of the test set."""
    one = Scorer(config, args).evaluator
    images = one.sets[probe.TEST][0]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts = [images[part] for part in order.split(args.samples) if len(part) == args.samples]
    if not parts:
        raise UserError(f"--floor: the test set has no {args.samples} images")
    found = [frechet.distance(frechet.compute(features.ImageSet("real test images", part),
                                              one.extractor), one.reference)
             for part in parts[:args.seeds]]
    name = one.extractor.metric("FID")
    return f"{name} n={args.samples} of real test images: {mean_and_deviation(found)}"

# ----------------------------------------------------------------------------------------------
# The tables, of {variant: lines of score()}.

def table(by_variant, metrics=None):
    """A row per variant and mark: the main scores, or the metrics that begin so."""
    rows = []
    for mark in sorted({line["Mimg"] for lines in by_variant.values() for line in lines}):
        for variant, lines in by_variant.items():
            if not (runs := [line for line in lines if line["Mimg"] == mark]):
                continue
            cells = {"variant": variant, "seeds": str(len(runs)), "Mimg": f"{mark:.3g}"}
            scores = [{key.removeprefix(metrics): value for key, value in run["scores"].items()
                       if key.startswith(metrics)} if metrics else main_scores(run) for run in runs]
            cells |= {key: mean_and_deviation([one[key] for one in scores]) for key in scores[0]}
            if not metrics:
                ranges = [run["activations"] for run in runs if run["activations"]]
                cells["activations until then (RMS)"] = ranges and (
                    f"{min(low for low, _ in ranges):.2f} to {max(high for _, high in ranges):.3g}")
                cells["img/s"] = mean_and_deviation([run["img_per_s"] for run in runs])
            rows.append(cells)
    return markdown(rows)

def main_scores(line):
    """The scores but for those of single levels; of these the mean of the middle ones, too."""
    scores, (first, *_, last) = line["scores"], LEVELS[MIDDLE]
    losses = [scores[f"heldout_loss/{level:.3g}"] for level in LEVELS]
    return {"heldout_loss": None, f"of {first:.2g} to {last:.2g}": mean_loss(losses)} | {
        key: value for key, value in scores.items() if "/" not in key}

def curves(by_variant, name):
    """Held-out losses, or unweighted training losses since the record before (of the same images
    and noise with one seed), at the records 1, 2, 4, ... that all have."""
    runs_of = {variant: list({run["seed"]: dict(run[name]) for run in lines}.values())
               for variant, lines in by_variant.items()}
    common = set.intersection(*(set(one) for runs in runs_of.values() for one in runs))
    return markdown([{f"{name} loss": variant, "seeds": str(len(runs))} | {
        f"{mark:.3g} Mimg": mean_and_deviation([one[mark] for one in runs])
        for mark in sorted(common)} for variant, runs in runs_of.items()])

def at_equal_time(by_variant, speeds):
    """The scores when the fastest had been trained to the last mark that all have: the others'
    between two of their marks, linear in log(Mimg). Speeds, {variant: img/s}; where there are none,
    of the fastest seed: what else ran on the machine has only slowed the others down."""
    every = list(itertools.chain(*by_variant.values()))
    marks = sorted(set.intersection(*({line["Mimg"] for line in lines}
                                      for lines in by_variant.values())))
    if len(marks) < 2 or len({line["machine"].rpartition(", ")[0] for line in every}) > 1:
        return "(At equal time: needs two marks that all have, on one machine.)"
    speeds = {variant: speeds.get(variant) or max(line["img_per_s"] for line in lines)
              for variant, lines in by_variant.items()}
    rows = []
    for variant, lines in by_variant.items():
        reached = marks[-1] * (speeds[variant] / max(speeds.values()))
        cells = {"at equal time": variant, "seeds": str(len({line["seed"] for line in lines})),
                 "Mimg": f"{reached:.3g}"}
        rows.append(cells)
        if reached < marks[0]:              # It would be extrapolated.
            continue
        before, after = next(pair for pair in itertools.pairwise(marks) if reached <= pair[1])
        share = math.log(reached / before) / math.log(after / before)
        for key in main_scores(lines[0]):
            first, last = ({line["seed"]: main_scores(line)[key] for line in lines
                            if line["Mimg"] == mark} for mark in (before, after))
            cells[key] = mean_and_deviation([(1 - share) * value + share * last[seed]
                                             for seed, value in first.items()])
    return markdown(rows)

def markdown(rows):
    """A table of dicts, of which one may lack what another has."""
    head = dict.fromkeys(key for row in rows for key in row)
    lines = [list(head), ["---"] * len(head), *([row.get(key) or "-" for key in head]
                                                for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

def mean_and_deviation(values):
    """Such as "0.7571 ± 0.0021"; None is NaN."""
    if not all(value is not None and math.isfinite(value) for value in values):
        return "nan"
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{spread}"

if __name__ == "__main__":
    command(main)()
