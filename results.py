"""The results table of scored runs, in Markdown, and their curves: what fid.py and probe.py left in results.jsonl.

Some runs:            python results.py runs/cifar10/C runs/cifar10/E
All that lie in runs: python results.py
"""

import argparse
import json
import math
import sys
from pathlib import Path

import files
import runtime
from runtime import UserError

NAMES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "tinyimagenet": "Tiny ImageNet", "digits": "digits",
         "folder": "folder"}
STANDARD = {"weights": "ema", "steps": 18, "eta": 0, "clip_denoised": False}    # The samples that the table compares.


def main():
    """Parse the command line, print the table, draw the curves."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="*", metavar="RUN", help="save_dir of a run, or a folder of several (default: ./runs)")
    p.add_argument("--out", default="results.png", metavar="PNG", help="the curves (default: results.png)")
    args = p.parse_args()
    runs = []
    for folder in args.runs or ["runs"]:
        below = sorted(str(path.parent) for path in Path(folder).rglob("results.jsonl"))
        if not below:
            raise UserError(f"no results.jsonl in or below {folder}: score a run with fid.py or probe.py, or name its "
                            f"save_dir")
        runs += below
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
            else:
                raise ValueError
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


def curve(lines, figure):
    """The lines of a figure that can be compared, the best of each epoch by rising epoch, and a remark on them.

    They are of one n (50,000 or more count as one) or, of the probe, of one timestep and block: the one with the most
    epochs; among equals the largest n, or the best accuracy.
    """
    groups = {}
    for line in lines:
        if line["figure"] == figure:
            kind = (min(line["n"], runtime.FULL),) if is_distance(figure) else (line.get("timestep"), line["features"])
            groups.setdefault(kind, []).append(line)
    if not groups:
        return [], ""
    sign = 1 if is_distance(figure) else -1
    best = {kind: {line["epoch"]: line for line in sorted(group, key=lambda line: -sign * line["value"])}
            for kind, group in groups.items()}

    def rank(kind):
        return len(best[kind]), kind[0] if is_distance(figure) else max(line["value"] for line in best[kind].values())

    chosen = max(groups, key=rank)
    if is_distance(figure):
        remark = f"n={chosen[0]:,}" * (chosen[0] < runtime.FULL)
    else:
        equal = sum(len(best[kind]) == len(best[chosen]) for kind in groups)
        remark = f"t={chosen[0]} {chosen[1]}" * (len(groups) > 1) + f", best of {equal}" * (equal > 1)
    return [best[chosen][epoch] for epoch in sorted(best[chosen])], remark


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
        cells = [cell(*curve(results[runs[config]], figure), figure) if config in runs else "-"
                 for figure, config in columns]
        table.append("| " + " | ".join([NAMES.get(dataset, dataset) + f" ({', '.join(runs.values())})" * several,
                                        *cells]) + " |")
    return "\n".join(table)


def cell(lines, remark, figure):
    """The best of a figure's lines as it stands in the table, such as "3.03 @ 999"."""
    if not lines:
        return "-"
    best = (min if is_distance(figure) else max)(lines, key=lambda line: line["value"])
    return f"{best['value']:.2f} @ {best['epoch']}" + f" ({remark})" * bool(remark)


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
        for i, (label, lines) in enumerate(zip(labels, results.values(), strict=True)):
            best, remark = curve(lines, name)
            if best:                        # A run has one colour in all panels.
                axes.plot([line["Mimg"] for line in best], [line["value"] for line in best], "o-", color=f"C{i}",
                          label=label + f" ({remark})" * bool(remark))
        axes.set_title(name if is_distance(name) else "linear probe")
        axes.set_xlabel("training images seen (millions)")
        axes.set_ylabel(f"{name}, less is better" if is_distance(name) else "test accuracy (%), more is better")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    files.check_writable(Path(out).parent)
    with files.atomic(out) as temporary:
        figure.savefig(temporary, format="png")


if __name__ == "__main__":
    runtime.command(main)()
