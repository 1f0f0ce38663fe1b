"""The results table of scored runs, in Markdown, and their curves: what fid.py and probe.py left in results.jsonl.

Some runs:            python results.py runs/cifar10/C runs/cifar10/E
All that lie in runs: python results.py
Training dynamics:    python results.py --dynamics runs/cifar10/C runs/cifar10/E runs/cifar10/G
A score by the length of the EMA (sample.py, fid.py, probe.py --sigma_rel): python results.py --ema runs/cifar10/G
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
# The samples that the table compares.
STANDARD = {"weights": "ema", "sigma_rel": None, "steps": 18, "eta": 0, "clip_denoised": False}


def main():
    """Parse the command line, print the table, draw the curves."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="*", metavar="RUN", help="save_dir of a run, or a folder of several (default: ./runs)")
    p.add_argument("--out", metavar="PNG", help="the curves (default: results.png, dynamics.png or ema.png)")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--dynamics", nargs="+", metavar="RUN", help="draw how large activations, weights, updates were")
    what.add_argument("--ema", metavar="RUN", help="draw a run's scores against the relative length of its EMA")
    p.add_argument("--figure", help="with --ema: the score, such as FID or probe (default: all)")
    args = p.parse_args()
    if args.runs and (args.dynamics or args.ema):
        p.error("name the runs after --dynamics or --ema alone")
    if args.figure and not args.ema:
        p.error("--figure needs --ema")
    if args.dynamics:
        records = same_data({run: read_dynamics(run) for run in args.dynamics})
        print(dynamics_table(records))
        print()
        save_figure(draw_dynamics(records), args.out or "dynamics.png")
        return
    if args.ema:
        save_figure(draw_ema(args.ema, args.figure), args.out or "ema.png")
        return
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
    print()
    save_figure(draw(results, figures), args.out or "results.png")


# ----------------------------------------------------------------------------------------------------------------------
# Reading.

def read(run, standard=STANDARD):
    """The results of a run with the `standard` sampling settings, the later of two of the same thing. Raises UserError
    where there are none; says which lines are left out."""
    path = Path(run) / "results.jsonl"
    try:
        rows = path.read_text(errors="replace").splitlines()
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}; score the run with fid.py or probe.py first") from None
    found = {}
    for row in rows:
        try:
            line = json.loads(row)
            sampling = {"sigma_rel": line.get("sigma_rel")} | (line.get("sampling") or {})
            key = (line["figure"], line["epoch"], line["n"], line["features"], line.get("timestep"),
                   json.dumps([line["seeds"], sampling], sort_keys=True))
            if any(sampling.get(name, value) != value for name, value in standard.items()):
                print(f"{path}: left out, of other sampling settings: {line['figure']} {line['value']:.6g} @ "
                      f"{line['epoch']}, {sampling}", file=sys.stderr)
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


def draw(results, figures):
    """Draw each figure against the training images seen, in Mimg, a line per run. Return a matplotlib Figure."""
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
    return figure


def save_figure(figure, out):
    """Write a matplotlib Figure as a PNG and say where."""
    files.check_writable(Path(out).parent)
    with files.atomic(out) as temporary:
        figure.savefig(temporary, format="png")
    print(f"curves: {out}")


def draw_ema(run, name=None):
    """Draw the scores of a run against the relative length of its EMA, a line per epoch, or just the score `name`.

    Raises UserError where none was made with --sigma_rel, or there is none of that name.
    """
    from matplotlib.figure import Figure
    standard = {key: value for key, value in STANDARD.items() if key != "sigma_rel"}
    curves = {}                             # {figure: {kind: {epoch: {sigma_rel: value}}}}
    for line in read(run, standard):
        length = (line.get("sampling") or line).get("sigma_rel")
        if length is not None:
            kind = (f"{line['figure']} t={line.get('timestep')} {line['features']}" if line["figure"] == "probe" else
                    f"{line['figure']} n={line['n']:,}, seeds {line['seeds']}")
            curves.setdefault(line["figure"], {}).setdefault(kind, {}).setdefault(line["epoch"], {})[length] = (
                line["value"])
    if not curves:
        raise UserError(f"{run}/results.jsonl holds no scores by EMA length: make some with sample.py and fid.py, or "
                        f"probe.py, --sigma_rel 0.05, 0.10, ...")
    if name not in (None, *curves):
        raise UserError(f"--figure {name}: {run} has no such score by EMA length; it has {', '.join(sorted(curves))}")
    chosen = {}                             # Of several n, seeds, timesteps or blocks the one with the most scores.
    for figure, kinds in curves.items():
        if name in (None, figure):
            kind = max(kinds, key=lambda kind: sum(map(len, kinds[kind].values())))
            chosen[kind] = kinds[kind]
    figure = Figure(figsize=(5 * len(chosen), 4.2), layout="constrained", dpi=150)
    for axes, (kind, by_epoch) in zip(figure.subplots(1, len(chosen), squeeze=False)[0], chosen.items(), strict=True):
        for epoch, values in sorted(by_epoch.items()):
            axes.plot(sorted(values), [values[length] for length in sorted(values)], "o-", label=f"epoch {epoch}")
        axes.set_title(f"{run}: {kind}")
        axes.set_xlabel("relative EMA length, sigma_rel")
        less = is_distance(kind) or kind.startswith(("KID", "KD("))
        axes.set_ylabel(f"{kind}, {'less' if less else 'more'} is better")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# Training dynamics.

ROWS = {"activation": "activations (RMS)", "weight": "weights (RMS)", "update": "update / weight (RMS)"}


def same_data(records):
    """Return {run: records}. Raises UserError where the runs are of different data sets."""
    datasets = {run: found[-1]["dataset"] for run, found in records.items()}
    if len(set(datasets.values())) > 1:
        raise UserError("--dynamics compares runs of the same data, but "
                        + ", ".join(f"{run} is of {dataset}" for run, dataset in datasets.items()))
    return records


def dynamics_table(records):
    """Markdown, a row per run: how far single blocks and weights went, which the figure's means do not show."""
    def spans(found, kind):                 # {block or weight: (least, most)}
        series = {}
        for line in found:
            for values in line[kind].values():
                for name, value in values.items():
                    series.setdefault(name, []).append(math.inf if value is None else value)
        return {name: (min(values), max(values)) for name, values in series.items()}

    rows = ["| run | activations of a block (RMS), least to most | largest change of a weight's RMS | update / weight "
            "(RMS) of a layer at the end, least to most |", "|---" * 4 + "|"]
    for run, found in records.items():
        least, most = zip(*spans(found, "activation").values(), strict=True)
        change, name = max(((high - low) / low if low and math.isfinite(high) else math.inf, name)
                           for name, (low, high) in spans(found, "weight").items())
        slowest, fastest = zip(*spans(found[-1:], "update").values(), strict=True)
        rows.append(f"| {run} | {min(least):.2f} to {max(most):.3g} | {change:.3%} ({name}) | {min(slowest):.2g} to "
                    f"{max(fastest):.2g} |")
    return "\n".join(rows)


def draw_dynamics(records):
    """Draw what dynamics.Recorder left, {run: records}: a column per run, a row per kind, a line per part and
    resolution; log scale."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter
    sizes = sorted({group.partition(" ")[2] for found in records.values() for line in found for kind in ROWS
                    for group in line[kind]} - {""}, key=lambda size: -int(size.partition("x")[0]))
    figure = Figure(figsize=(4.2 * len(records) + 1.8, 8.4), layout="constrained", dpi=150)
    panels = figure.subplots(len(ROWS), len(records), squeeze=False, sharey="row", sharex=True)
    shown = {}
    for column, (run, found) in enumerate(records.items()):
        for axes, (kind, title) in zip(panels[:, column], ROWS.items(), strict=True):
            for group in dict.fromkeys(group for line in found for group in line[kind]):
                place, _, size = group.partition(" ")
                style = {"color": f"C{sizes.index(size)}" if size else "0.4",
                         "linestyle": "--" if place == "decoder" else ":" if place == "embedding" else "-"}
                points = [(line["Mimg"], mean(line[kind].get(group, {}).values())) for line in found]
                shown[group], = axes.plot(*zip(*points, strict=True), linewidth=1.6, marker="." * (len(points) < 3),
                                          **style)
            axes.set_yscale("log")
            axes.grid(alpha=0.3, which="both")
            if column == 0:
                axes.set_ylabel(title, fontsize=12)
        panels[0, column].set_title(f"Config {found[-1]['net_type'][-1]} ({run})", fontsize=12)
        panels[-1, column].set_xlabel("training images seen (millions)", fontsize=11)
    for axes in panels[:, 0]:               # What hardly changes is to look like that, with ticks that can be read.
        low, high = axes.get_ylim()
        if high < 4 * low:
            axes.set_ylim(math.sqrt(low * high) / 2, math.sqrt(low * high) * 2)
        for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            set_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.5)))      # 2 and 3, not 2·10⁰.
    figure.suptitle(f"Training dynamics on {NAMES[found[-1]['dataset']]}: mean over the layers", fontsize=13)
    figure.legend(shown.values(), shown, loc="outside right center", fontsize=11)
    return figure


def read_dynamics(run):
    """The records of a run's dynamics.jsonl. Raises UserError where there are none."""
    path, found = Path(run) / "dynamics.jsonl", []
    try:
        rows = path.read_text(errors="replace").splitlines()
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}; name the save_dir of a run that was trained with "
                        f"dynamics_every other than 0") from None
    for row in rows:
        try:
            line = json.loads(row)
            for group, values in ((group, values) for kind in ROWS for group, values in line[kind].items()):
                mean(values.values())
                int(group.partition(" ")[2].partition("x")[0] or 0)
            if not all(line[kind] and all(line[kind].values()) for kind in ROWS):
                raise ValueError
            if not math.isfinite(line["Mimg"]) or not line["net_type"][-1:].isalpha() or line["dataset"] not in NAMES:
                raise ValueError
            found.append(line)
        except (ValueError, KeyError, TypeError, AttributeError):
            print(f"{path}: a damaged line is left out: {row[:60]}", file=sys.stderr)
    if not found:
        raise UserError(f"{path} holds no records of training dynamics")
    return found


def mean(values):
    """The mean of what is known of values; NaN, which is not drawn, where nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


if __name__ == "__main__":
    runtime.command(main)()
