"""The results table of scored runs, in Markdown, and their curves: what fid.py and probe.py left in results.jsonl.

Some runs:            python results.py runs/cifar10/C runs/cifar10/E
All that lie in runs: python results.py
"""

import argparse
import json
import math
import sys
from pathlib import Path

import runtime
from runtime import UserError

NAMES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "tinyimagenet": "Tiny ImageNet", "digits": "digits",
         "folder": "folder"}
STANDARD = {"weights": "ema", "steps": 18, "eta": 0, "clip_denoised": False}    # The samples that the table compares.


def main():
    """Parse the command line, print the table, draw the curves."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="*", metavar="RUN", help="save_dir of a run (default: all below ./runs)")
    p.add_argument("--out", default="results.png", metavar="PNG", help="the curves (default: results.png)")
    args = p.parse_args()
    runs = args.runs or sorted(str(path.parent) for path in Path("runs").rglob("results.jsonl"))
    if not runs:
        raise UserError("no results.jsonl below ./runs: score a run with fid.py or probe.py, or name its save_dir")
    results = {run: read(run) for run in dict.fromkeys(runs)}
    figures = shown_figures(results)
    if not figures:
        raise UserError(f"{', '.join(results)}: no FID and no probe accuracy there yet")
    print(table(results, figures))
    draw(results, figures, args.out)
    print(f"\ncurves: {args.out}")


# ----------------------------------------------------------------------------------------------------------------------
# Reading.

def read(run):
    """The results of a run, the later of two of the same thing. Raises UserError where there are none; says how many
    lines are damaged and left out."""
    path = Path(run) / "results.jsonl"
    try:
        rows = path.read_text(errors="replace").splitlines()
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}; score the run with fid.py or probe.py first") from None
    found = {}
    for row in rows:
        try:
            line = json.loads(row)
            key = (line["figure"], line["epoch"], line["n"], line["features"], line.get("timestep"),
                   json.dumps([line["seeds"], line.get("sampling")]))
            if any((line.get("sampling") or {}).get(name, value) != value for name, value in STANDARD.items()):
                print(f"{path}: left out, of other sampling settings: {line['figure']} {line['value']:.6g} @ "
                      f"{line['epoch']}, {line['sampling']}", file=sys.stderr)
                continue
            if all(math.isfinite(line[name]) for name in ("value", "Mimg", "epoch", "n")):
                found[key] = line | {"config": line["net_type"][-1], "dataset": str(line["dataset"])}
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            if row.strip():
                print(f"{path}: a damaged line is left out: {row[:60]}", file=sys.stderr)
    if not found:
        raise UserError(f"{path} holds no results")
    return list(found.values())


def is_distance(figure):
    """True for FID, FD(pixels), ...: the less the better."""
    return figure.startswith(("FID", "FD("))


def shown_figures(results):
    """The figures of table and curves: the distances and the probe's accuracy, as far as there are any."""
    present = {line["figure"] for lines in results.values() for line in lines}
    return sorted((f for f in present if is_distance(f)), reverse=True) + ["probe"] * ("probe" in present)


def best_by_epoch(lines, figure):
    """The best line of a figure at each epoch, by rising epoch; of distances, those of the most images alone (50,000
    are enough)."""
    lines = [line for line in lines if line["figure"] == figure]
    if is_distance(figure):
        n = min(max((line["n"] for line in lines), default=0), runtime.FULL)
        lines = sorted((line for line in lines if line["n"] >= n), key=lambda line: line["value"])
    else:
        lines = sorted(lines, key=lambda line: -line["value"])
    best = {}
    for line in lines:
        best.setdefault(line["epoch"], line)
    return [best[epoch] for epoch in sorted(best)]


# ----------------------------------------------------------------------------------------------------------------------
# Table and curves.

def table(results, figures):
    """Markdown: a row per data set, a column per figure and config, the best value @ its epoch.

    A second run of the same data set and config needs a row of its own; the rows then name their folders.
    """
    rows = []                               # (data set, {config: run})
    for run, lines in results.items():
        dataset, config = lines[-1]["dataset"], lines[-1]["config"]
        row = next((runs for name, runs in rows if name == dataset and config not in runs), None)
        if row is None:
            rows.append((dataset, row := {}))
        row[config] = run
    columns = [(figure, config) for figure in figures for config in sorted({c for _, runs in rows for c in runs})]
    table = ["| | " + " | ".join(f"{figure} {config}" for figure, config in columns) + " |",
             "|---" * (len(columns) + 1) + "|"]
    for dataset, runs in rows:
        several = sum(name == dataset for name, _ in rows) > 1
        cells = [cell(best_by_epoch(results[runs[config]], figure), figure) if config in runs else "-"
                 for figure, config in columns]
        table.append("| " + " | ".join([NAMES.get(dataset, dataset) + f" ({', '.join(runs.values())})" * several,
                                        *cells]) + " |")
    return "\n".join(table)


def cell(lines, figure):
    """The best of a figure's lines as it stands in the table, such as "3.03 @ 999"."""
    if not lines:
        return "-"
    best = (min if is_distance(figure) else max)(lines, key=lambda line: line["value"])
    remark = f" (n={best['n']:,})" * (is_distance(figure) and best["n"] < runtime.FULL)
    return f"{best['value']:.2f} @ {best['epoch']}{remark}"


def draw(results, figures, out):
    """Draw each figure against the training images seen, in Mimg, a line per run, as a PNG."""
    from matplotlib.figure import Figure  # Slow to import: only where it is used.
    labels = [f"{NAMES.get(lines[-1]['dataset'], lines[-1]['dataset'])} {lines[-1]['config']}"
              for lines in results.values()]
    labels = [f"{label} ({run})" if labels.count(label) > 1 else label
              for label, run in zip(labels, results, strict=True)]
    figure = Figure(figsize=(5 * len(figures), 4.2), layout="constrained", dpi=150)
    panels = figure.subplots(1, len(figures), squeeze=False)[0]
    for axes, name in zip(panels, figures, strict=True):
        for label, lines in zip(labels, results.values(), strict=True):
            best = best_by_epoch(lines, name)
            remark = f", n={best[0]['n']:,}" if best and is_distance(name) and best[0]["n"] < runtime.FULL else ""
            axes.plot([line["Mimg"] for line in best], [line["value"] for line in best], "o-", label=label + remark)
        axes.set_title(name if is_distance(name) else "linear probe")
        axes.set_xlabel("training images (Mimg)")
        axes.set_ylabel(f"{name}, less is better" if is_distance(name) else "test accuracy (%)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    runtime.check_writable(Path(out).parent)
    with runtime.atomic(out) as temporary:
        figure.savefig(temporary, format="png")


if __name__ == "__main__":
    runtime.command(main)()
