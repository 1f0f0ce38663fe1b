"""Is a run right? Its held-out losses against those of runs that anyone can repeat on a CPU.

    make check-run RUN=runs/cifar10_small/G
    python benchmarks/expected.py --run runs/cifar10_small/G

The exit code is 0 where all are inside of the band, 1 where one is not, 2 of what is not known.
docs/expected.jsonl has a line per config: the command, and of each mark the loss of every seed. How
a line is written anew, from folders of runs that differ in their seeds alone, and the picture:

    python benchmarks/expected.py --add NAME COMMAND runs/seed0 runs/seed1 runs/seed2
    python benchmarks/expected.py --draw docs/expected.png
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from scipy.stats import t
from sides import ROOT, machine
from edm2 import checkpoint
from edm2.config import FREE, Config
from edm2.errors import UserError, command
from edm2.evaluation import LEVELS

PATH = ROOT / "docs" / "expected.jsonl"
CHANCE = 0.01           # That a right run is outside of the band at a mark.
MIDDLE = slice(2, 6)    # Of LEVELS: sigma 0.144, 0.386, 1.04, 2.78.
PARTS = {"0.02 and 0.054": slice(0, 2), "0.14 to 2.8": MIDDLE}

def main():
    """Check a run, add a line, or draw all."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", help="the save_dir of a run with eval_every")
    p.add_argument("--add", nargs="+", metavar=("NAME", "COMMAND"), help="then the runs' folders")
    p.add_argument("--draw", metavar="PNG")
    args = p.parse_args()
    if args.run is None and not args.add and not args.draw:
        raise UserError("say --run, --add or --draw")
    known = [json.loads(line) for line in PATH.read_text().splitlines()] if PATH.exists() else []
    if args.add:
        name, *how = args.add
        known = [line for line in known if line["name"] != name] + [described(name, *how)]
        PATH.write_text("".join(json.dumps(line) + "\n" for line in known))
    if args.draw:
        draw(known, args.draw)
    if args.run is not None and not check(known, *read(args.run), args.run):
        sys.exit(1)

def read(run):
    """A run's config and SHA-256 of the images, and its losses, {Mimg: [of each of LEVELS]}; None
    is NaN. Raises UserError where the folder has no checkpoint or no evaluation."""
    path = run and checkpoint.newest(SimpleNamespace(save_dir=run))
    if not path:
        raise UserError(f"{run!r} holds no run: say the save_dir of one that train.py has saved")
    state = checkpoint.load(path, keys := ("config", "images_sha256"))
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    losses = {str(row["Mimg"]): [row[f"heldout_loss/{level:.3g}"] for level in LEVELS]
              for row in map(json.loads, lines) if "heldout_loss" in row}
    if not losses:
        raise UserError(f"{run} has no held-out loss: train with eval_every")
    return {key: state[key] for key in keys}, losses

def decisive(about):
    """What of a run decides its losses, {key: value}. A key that is newer has its default."""
    config = Config.model_validate(about["config"])
    found = {"images_sha256": about["images_sha256"], "eval.images": config.eval.images}
    for key, value in config.model_dump().items():
        if key not in FREE | {"seed", "posthoc_ema"}:
            found |= ({f"{key}.{name}": one for name, one in value.items()}
                      if isinstance(value, dict) else {key: value})
    return found

def mean_loss(losses, levels=MIDDLE):
    """The mean of the losses of some levels. The middle ones differ least from seed to seed."""
    return statistics.mean(math.nan if loss is None else loss for loss in losses[levels])

def described(name, shell="", *runs):
    """A line of expected.jsonl."""
    if len(found := [read(run) for run in runs]) < 2:
        raise UserError("--add NAME COMMAND: then two runs or more, of different seeds")
    about = found[0][0]
    if any(decisive(other) != decisive(about) for other, _ in found):
        raise UserError(f"{', '.join(runs)} differ in more than their seeds")
    if len({str(losses) for _, losses in found}) < len(found):
        raise UserError(f"{', '.join(runs)}: one of them is there twice")
    marks = sorted(set.intersection(*(set(losses) for _, losses in found)), key=float)
    return {"name": name, "command": shell, "machine": machine(), **about,
            "heldout_loss": {mark: [losses[mark] for _, losses in found] for mark in marks}}

def bands(known, levels=MIDDLE):
    """{name: {"0.05": (mean, half of the band)}}: Student's prediction interval of one run more.
    The standard deviation, relative to the mean, is that of all configs of the data set; beyond the
    last mark that all of them have, the one there, for it falls in training."""
    losses = {line["name"]: {mark: [mean_loss(loss, levels) for loss in of_seeds]
                             for mark, of_seeds in line["heldout_loss"].items()} for line in known}

    def band(name, mark, own):
        """Of a config, at a mark, where its losses are own."""
        data_set = [one for other, one in losses.items()
                    if other.rpartition(", ")[0] == name.rpartition(", ")[0]]
        _, _, shared = max((sum(before in one for one in data_set), float(before), before)
                           for before in losses[name] if float(before) <= float(mark))
        others = [one[shared] for one in data_set if shared in one]
        freedom = sum(len(one) - 1 for one in others)
        squares = sum((loss / statistics.mean(one) - 1) ** 2 for one in others for loss in one)
        half = t.ppf(1 - CHANCE / 2, freedom) * math.sqrt(squares / freedom * (1 + 1 / len(own)))
        return statistics.mean(own), statistics.mean(own) * half

    return {name: {mark: band(name, mark, own) for mark, own in one.items()}
            for name, one in losses.items()}

def check(known, about, losses, run):
    """Print, mark by mark, whether a run's losses are inside of the band; return whether all are.
    Raises UserError where its config is not among those that are known."""
    here = decisive(about)

    def differences(line):
        """Such as "lrate (0.04 there, 0.02 here)"."""
        there = decisive(line)
        return [f"{key} ({there.get(key)} there, {here.get(key)} here)"
                for key in there | here if there.get(key) != here.get(key)]

    if not known:
        raise UserError(f"{PATH} is missing, or empty")
    nearest = min(known, key=lambda line: len(differences(line)))
    if different := differences(nearest):
        raise UserError(f"{run} is of no config that {PATH.name} knows; the nearest, "
                        f"{nearest['name']}, differs in {'; '.join(different)}")
    marks = [mark for mark in nearest["heldout_loss"] if mark in losses]
    if not marks:
        raise UserError(f"{run} was not evaluated at {', '.join(nearest['heldout_loss'])} Mimg, "
                        f"which are known of {nearest['name']}")
    found = []
    for name, levels in PARTS.items():
        band = bands(known, levels)[nearest["name"]]
        for mark in marks:
            loss, (mean, half) = mean_loss(losses[mark], levels), band[mark]
            found.append(abs(loss - mean) <= half)
            print(f"{float(mark):.3g} Mimg: held-out loss, sigma {name}: {loss:.4f}, expected "
                  f"{mean:.4f} ± {half:.4f}: {'inside' if found[-1] else 'OUTSIDE'}")
    print(f"{run}, {nearest['name']}: {sum(found)} of {len(found)} losses inside")
    return all(found)

def draw(known, path):
    """Draw the means and bands over the marks, a panel per data set and size."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator
    panels = {}
    for line in known:
        if len(line["heldout_loss"]) > 1:
            panels.setdefault(line["name"].rpartition(", ")[0], []).append(line)
    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained", dpi=150)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, lines) in zip(grid, panels.items(), strict=True):
        for line in lines:
            marks, values = zip(*bands(known)[line["name"]].items(), strict=True)
            marks = list(map(float, marks))
            low, high = ([mean + sign * half for mean, half in values] for sign in (-1, 1))
            label = line["name"].rpartition(", ")[2]
            axes.plot(marks, [mean for mean, _ in values], ".-", label=label)
            axes.fill_between(marks, low, high, alpha=0.25)
        axes.set(title=title, xlabel="Mimg", xscale="log",
                 ylabel="held-out loss, sigma 0.14 to 2.8")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.savefig(path)

if __name__ == "__main__":
    command(main)()
