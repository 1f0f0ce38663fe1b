"""Labels, guidance and augmentation on the digits: do samples show the digit that was asked for?

    python benchmarks/guidance.py --seeds 3 --epochs 10
    python benchmarks/guidance.py --seeds 3 --weights 1 --set augment=0.12 --save_dir runs/augmented
    python benchmarks/guidance.py --seeds 1 --n_samples 500 --picture docs/guided.png

The last is of make guidance; docs/guidance.md has the results of the others.

Trains config/digits/G_cond.yaml with each seed, samples with every weight of classifier-free
guidance and of autoguidance by the run's own epochs, by train.py, sample.py and fid.py, which make
only what is missing. A support vector machine, trained on three quarters of the real digits, names
the digit; another one, trained on digits and their mirror images, says which are mirrored.
"""

import argparse
import itertools
import json
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
import numpy as np
from PIL import Image, ImageDraw
from sides import ROOT, machine
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

def main():
    """Make what is missing, print the table, draw the picture."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--config", default="config/digits/G_cond.yaml")
    p.add_argument("--save_dir", default="runs/guidance", help="each seed's run goes below")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--n_samples", type=int, default=1000)
    p.add_argument("--weights", type=float, nargs="+", default=[1, 1.5, 2, 3, 4])
    p.add_argument("--epochs", type=int, nargs="*", default=[], help="of autoguidance")
    p.add_argument("--picture", metavar="PNG", help="the first seed's grids side by side")
    args = p.parse_args()
    guides = [(w, epoch) for w, epoch in itertools.product(args.weights, [None, *args.epochs])
              if w != 1 or epoch is None]
    guides.sort(key=lambda guide: guide[1] or 0)
    judges, rows = [judge(mirrored) for mirrored in (False, True)], {}
    for seed in range(args.seeds):
        call("train.py", args, seed)
    for seed, (w, epoch) in itertools.product(range(args.seeds), guides):
        rows.setdefault((w, epoch), []).append(measure(args, seed, w, epoch, judges))
    print(f"`{shlex.join(['python', *sys.argv])}`, {machine()}; {args.n_samples} samples, the mean "
          f"of {args.seeds} seeds ± their standard deviation. The judges are right on "
          f"{judges[0][1]:.2%} of the real digits held out and {judges[1][1]:.2%} of them mirrored "
          f"or not.\n\n| guidance | w | evaluations: network, guide | the digit asked for (%) "
          f"| mirrored (%) | FD(pixels) |\n" + "|---" * 6 + "|")
    for (w, epoch), found in rows.items():
        kind = "none" if w == 1 else "classifier-free" if epoch is None else f"by epoch {epoch}"
        cells = [mean([row[key] for row in found]) for key in ("right", "mirrored", "FD")]
        print(f"| {kind} | {w:g} | {found[0]['evaluations']} | {' | '.join(cells)} |")
    if args.picture:
        draw({f"w = {w:g}": rows[w, None][0]["folder"] for w in args.weights if w in (1, 2, 4)},
             args.picture)

def call(script, args, seed, *more):
    """Run a command of the project on a seed's run; its output."""
    words = ["--config", args.config, "--set", f"save_dir={args.save_dir}/{seed}"]
    words += [word for item in (f"seed={seed}", "save_every=10", *args.set)
              for word in ("--set", item)]
    done = subprocess.run([sys.executable, ROOT / script, *words, *map(str, more)],
                          stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout

def measure(args, seed, w, epoch, judges):
    """Sample and score with one weight and guide. Return the figures and the folder."""
    flags = ["--n_samples", args.n_samples] + ["--guidance", f"{w:g}"] * (w != 1)
    flags += ["--guide", f"{args.save_dir}/{seed}:{epoch}"] if epoch is not None else []
    said = call("sample.py", args, seed, *flags)
    folder = Path(said.partition("images: ")[2].split("  ")[0])
    evaluations = re.search(r"each of (\d+) evaluations(?: and (\d+))?", said).groups("0")
    call("fid.py", args, seed, "--features", "pixels", *flags)
    line = (Path(args.save_dir, str(seed)) / "results.jsonl").read_text().splitlines()[-1]
    images = np.stack([np.asarray(Image.open(folder / f"{i:06d}.png"))
                       for i in range(args.n_samples)]).reshape(args.n_samples, -1) / 255
    asked = np.arange(args.n_samples) % 10
    (digit, _), (mirror, _) = judges
    return {"right": 100 * (digit.predict(images) == asked).mean(),
            "mirrored": 100 * (mirror.predict(images) >= 10).mean(),
            "FD": json.loads(line)["value"], "folder": folder.parent,
            "evaluations": ", ".join(evaluations)}

def judge(mirrored):
    """A classifier of digits, or of digits and, as classes 10 to 19, their mirror images: of those
    that look different (not 0, 1 and 8). Trained on three quarters; its accuracy on the rest."""
    digits = load_digits()
    images, labels = digits.images / 16, digits.target
    parts = train_test_split(images, labels, random_state=0, stratify=labels)
    sets = []
    for images, labels in zip(parts[:2], parts[2:], strict=True):
        if mirrored:
            sided = ~np.isin(labels, (0, 1, 8))
            images = np.concatenate([images, images[sided, :, ::-1]])
            labels = np.concatenate([labels, labels[sided] + 10])
        sets.append((images.reshape(len(images), -1), labels))
    found = SVC(C=10, gamma=0.1).fit(*sets[0])
    return found, found.score(*sets[1])

def mean(values):
    """Such as "97.1 ± 0.4"."""
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{spread}"

def draw(folders, path):
    """The grids of folders of sample.py side by side, under their titles."""
    grids = [Image.open(folder / "grid.png") for folder in folders.values()]
    picture = Image.new("RGB", (sum(grid.width + 16 for grid in grids), grids[0].height + 20))
    left = 0
    for title, grid in zip(folders, grids, strict=True):
        ImageDraw.Draw(picture).text((left + 24, 2), title, font_size=14)
        picture.paste(grid, (left, 20))
        left += grid.width + 16
    picture.save(path)

if __name__ == "__main__":
    main()
