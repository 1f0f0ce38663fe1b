"""results.jsonl: what fid.py and probe.py record; as a Markdown table and curves, of all runs.

Some runs:            python -m edm2.results runs/cifar10/C runs/cifar10/E
All that lie in runs: python -m edm2.results
Training dynamics:    python -m edm2.results --dynamics runs/cifar10/C runs/cifar10/E runs/cifar10/G
Scores by EMA length: python -m edm2.results --ema runs/cifar10/G
Scores by guidance:   python -m edm2.results --guidance runs/cifar10/G_cond
Scores by evaluations of the network: python -m edm2.results --steps runs/cifar10/G
Held-out loss and u(sigma) by noise level: python -m edm2.results --levels runs/cifar10/G"""

import argparse
import json
import math
import shlex
import sys
from datetime import datetime
from importlib import metadata
from pathlib import Path
from edm2 import distributed, dynamics, files, frechet, guidance, machine
from edm2.errors import UserError, command, warn
from edm2.evaluation import LEVELS
from edm2.image_files import some

NAMES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "tinyimagenet": "Tiny ImageNet"}
# The samples that the table compares.
STANDARD = {"weights": "ema", "sigma_rel": None, "steps": 18, "eta": 0, "clip_denoised": False,
            "classes": None, "guidance": None, "guidance_interval": None, "guide": None}
# What scores are drawn against: {flag: (axis, settings that may differ, flags that make more)}.
AXES = {"ema": ("relative EMA length, sigma_rel", ["sigma_rel"], "--sigma_rel 0.05, ..."),
        "guidance": ("weight of guidance", ["guidance", "guidance_interval", "guide"],
                     "--guidance 2, ..."),
        "steps": ("evaluations of the network for an image", ["steps", "eta"],
                  "sample.py --steps 9, fid.py --images, ...")}

def main():
    """Parse the command line, print the table, draw the curves."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("results", nargs="*", metavar="RUN", help="save_dir of a run or several (default: ./runs)")
    add("--out", metavar="PNG", help="default: results.png, dynamics.png, ema.png, ...")
    add("--dynamics", nargs="+", metavar="RUN", help="draw the training dynamics")
    add("--levels", metavar="RUN", help="draw held-out loss and u(sigma) by noise level")
    for axis, (words, *_) in AXES.items():
        add(f"--{axis}", metavar="RUN", help=f"draw scores by {words}")
    add("--figure", help="with these three: the score, such as FID or probe (default: all)")
    args = p.parse_args()
    kinds = [kind for kind in ("results", "dynamics", "levels", *AXES) if getattr(args, kind)]
    if len(kinds) > 1:
        p.error("name runs alone, or after --dynamics, or one after --levels, --ema, ...")
    name, x_label = (kinds or ["results"])[0], "training images seen (millions)"
    if args.figure and name not in AXES:
        p.error(f"--figure needs one of --{', --'.join(AXES)}")
    if name == "dynamics":
        records = dynamics.read(args.dynamics)
        text, rows = dynamics.table(records), dynamics.curves(records)
    elif name == "levels":
        text, rows = levels(args.levels)
    elif name in AXES:
        x_label, text = AXES[name][0], ""
        rows = {"score": along(getattr(args, name), name, args.figure)}
    else:
        runs = [run for folder in args.results or ["runs"] for run in scored(folder)]
        results = {run: lines for run in runs if (lines := read(run))}
        shown = {line["figure"] for lines in results.values() for line in lines}
        metrics = sorted(filter(is_distance, shown), reverse=True) + ["probe"] * ("probe" in shown)
        if not metrics:
            raise UserError(f"{', '.join(runs)}: no FID and no probe accuracy there yet")
        text, rows = table(results, metrics), {"score": by_images(results, metrics)}
    print(text)
    alike, out = name in ("dynamics", "levels"), args.out or f"{name}.png"
    figure = draw(rows, x_label, lambda title: alike or (name == "steps" and is_distance(title)),
                  shared=alike)
    with files.atomic(out) as temporary:
        figure.savefig(temporary, format="png")
    print(f"curves: {out}")

def record(config, results, device):
    """Append results, (name in TensorBoard, {figure, value, epoch, ...}), to results.jsonl too."""
    from torch.utils.tensorboard import SummaryWriter  # Slow to import.
    common = {"dataset": config.dataset, "net_type": config.net_type,
              "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
              "versions": {name: metadata.version(name)
                           for name in ("torch", "torchvision", "torch-fidelity", "numpy")},
              "processes": distributed.world_size(), "device": machine.device_name(device),
              "date": datetime.now().astimezone().isoformat(timespec="seconds")}
    folder, B = Path(config.save_dir), config.batch_size
    # TensorBoard's in a folder of their own: training may still write its own.
    with (open(folder / "results.jsonl", "a") as file,
          SummaryWriter(folder / "tensorboard" / "scores") as board):
        for name, line in results:
            mimg = (line["epoch"] + 1) * (line["n_reference"] // B) * B / 1e6
            file.write(json.dumps(line | {"Mimg": mimg} | common) + "\n")
            board.add_scalar(name, line["value"], line["epoch"])

def scored(folder):
    """The runs in or below a folder. Raises UserError where there are none."""
    if found := sorted(str(path.parent) for path in Path(folder).rglob("results.jsonl")):
        return found
    raise UserError(f"no results.jsonl in or below {folder}: use fid.py or probe.py first")

def read(run, standard=STANDARD):
    """A run's results of the `standard` settings, the latest of each thing."""
    def check(line):
        made = {"sigma_rel": line.get("sigma_rel")} | (line.get("sampling") or {})
        line["sampling"] = STANDARD | made
        line["key"] = str([*(line.get(key) for key in (
            "timestep", "passes", "linear", "images_sha256", "weights_sha256")), *(
            line[key] for key in ("figure", "epoch", "n", "features", "seeds", "sampling"))])
        name, line["net_type"] = str(line["dataset"]), str(line["net_type"])
        line["dataset"] = NAMES.get(name, name), line.get("images_sha256")
        if not all(math.isfinite(line[name]) for name in ("value", "Mimg", "epoch", "n")):
            raise ValueError

    path, found, left_out = Path(run) / "results.jsonl", {}, []
    for line in dynamics.read_lines(path, check, "score the run with fid.py or probe.py first"):
        made = line["sampling"]
        if other := {name: made[name] for name, value in standard.items()
                     if made.get(name, value) != value}:
            left_out.append(f"{line['figure']} {line['value']:.6g} @ {line['epoch']}, {other}")
        else:
            found[line["key"]] = line
    if left_out:
        warn(f"{path}: left out, of other sampling settings: {some(left_out, 1)}")
    return list(found.values())

def is_distance(metric):
    """True for FID, FD_DINOv2, FD(pixels), ...: the less the better."""
    return metric.startswith(("FID", "FD(", "FD_"))

def curve(lines, metric):
    """The lines of a metric that compare, the best of each epoch by rising epoch, and a remark: of
    one n (50,000 or more count as one) or, of the probe, of one timestep and block: the one with
    the most epochs; among equals the largest n, or the best accuracy."""
    groups, less = {}, is_distance(metric)
    for line in sorted(lines, key=lambda line: line["value"], reverse=less):    # The best last.
        if line["figure"] == metric:
            kind = ((min(line["n"], frechet.N_FID),) if less else
                    (line.get("timestep"), line["features"]))
            groups.setdefault(kind, {})[line["epoch"]] = line
    if not groups:
        return [], ""
    chosen = max(groups, key=lambda kind: (len(groups[kind]), kind[0] if less else max(
        line["value"] for line in groups[kind].values())))
    equal = sum(len(group) == len(groups[chosen]) for group in groups.values())
    if less:
        remark = f" (n={chosen[0]:,})" * (chosen[0] < frechet.N_FID)
    else:
        remark = f" (t={chosen[0]} {chosen[1]}" + f", best of {equal}" * (equal > 1) + ")"
        remark *= len(groups) > 1
    return [groups[chosen][epoch] for epoch in sorted(groups[chosen])], remark

def table(results, metrics):
    """Markdown: a row per data set, a column per metric and net_type, the best value @ its epoch. A
    second run of a data set and net_type, or other images of a data set's name, have a row of their
    own; rows then name their folders."""
    rows, seen = {}, []     # {(data set, how many runs of its net were before): {net_type: run}}
    for run, lines in results.items():
        dataset, net = lines[-1]["dataset"], lines[-1]["net_type"]
        rows.setdefault((dataset, seen.count((dataset, net))), {})[net] = run
        seen.append((dataset, net))
    nets = sorted({net for _, net in seen})
    names = [name for (name, _), _ in rows]
    columns = [(metric, net) for metric in metrics for net in nets]
    text = ["| | " + " | ".join(f"{metric} {net}" for metric, net in columns) + " |",
            "|---" * (len(columns) + 1) + "|"]
    for ((name, _), _), runs in rows.items():
        cells = [name + f" ({', '.join(runs.values())})" * (names.count(name) > 1)]
        for metric, net in columns:
            found, remark = curve(results.get(runs.get(net), []), metric)
            best = (min if is_distance(metric) else max)(
                found, key=lambda line: line["value"], default=None)
            cells.append(f"{best['value']:.2f} @ {best['epoch']}{remark}" if best else "-")
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"

def by_images(results, metrics):
    """{metric: {label: [(Mimg, value)]}}, a curve per run."""
    last = {run: lines[-1] for run, lines in results.items()}
    names = {run: f"{line['dataset'][0]} {line['net_type']}" for run, line in last.items()}
    panels = {metric: {} for metric in metrics}
    for metric, (run, lines) in ((m, item) for m in metrics for item in results.items()):
        best, remark = curve(lines, metric)
        name = names[run] + f" ({run})" * (list(names.values()).count(names[run]) > 1)
        panels[metric][name + remark] = [(line["Mimg"], line["value"]) for line in best]
    return {titled(metric): curves for metric, curves in panels.items()}

def levels(run):
    """A table and panels of a run: the held-out loss at LEVELS over training, and e^u(sigma), the
    training loss that the network expects there."""
    lines = dynamics.read_lines(Path(run) / "metrics.jsonl", lambda line: line["Mimg"] + 0,
                                "name the save_dir of a run with eval_every")
    panels = {title: {f"sigma {level:.3g}": [
        (line["Mimg"], value(line[name])) for line in lines
        if line.get(name := f"{key}/{level:.3g}") is not None] for level in LEVELS}
        for title, key, value in (("held-out loss", "heldout_loss", float),
                                  ("e^u(sigma), the training loss expected", "u", math.exp))}
    panels = {title: panel for title, panel in panels.items() if all(panel.values())}
    if "held-out loss" not in panels:
        raise UserError(f"{run} holds no held-out loss: train with eval_every")
    rows = [f"| first to last | {' | '.join(panels)} |", "|---" * (1 + len(panels)) + "|"]
    for label in panels["held-out loss"]:
        ends = [(panel[label][0][1], panel[label][-1][1]) for panel in panels.values()]
        rows.append(f"| {label} | " + " | ".join(f"{a:.3g} to {b:.3g}" for a, b in ends) + " |")
    return "\n".join(rows) + "\n", {"loss per pixel, weighted by λ(sigma)": panels}

def along(run, axis, name):
    """{metric: {label: [(x, score)]}} of a run, of all metrics or `name`; x, as AXES says, of its
    samples: sigma_rel, weight of guidance (1: unguided), or evaluations (Heun: 2·steps - 1)."""
    _, (setting, *others), flags = AXES[axis]
    kinds, plain = {}, {}       # {metric: {what it is of: {(epoch, how): [(x, score)]}}}
    for line in read(run, {k: v for k, v in STANDARD.items() if k not in (setting, *others)}):
        of = (f" t={line.get('timestep')} {line['features']}" if line["figure"] == "probe" else
              f" n={line['n']:,}, seeds {line['seeds']}")
        made, kind = line["sampling"], line["figure"] + of
        x = made[setting]
        if x is None:
            plain[kind, line["epoch"]] = [(1, line["value"])] if axis == "guidance" else []
        elif axis != "steps" or line["figure"] != "probe":
            how = guidance.variant(made | {"guidance": None}).replace("_", ", ")
            how += ", classifier-free" * (axis == "guidance" and "guide" not in how)
            if axis == "steps":
                x, how = 2 * x - 1, f", eta {made['eta']:g}"
            curves = kinds.setdefault(line["figure"], {}).setdefault(kind, {})
            curves.setdefault((line["epoch"], how), []).append((x, line["value"]))
    if axis == "steps":                     # One number of steps, as of other epochs, is no curve.
        kinds = {metric: {kind: {label: points for label, points in curves.items() if points[1:]}
                          for kind, curves in found.items()} for metric, found in kinds.items()}
        kinds = {metric: found for metric, found in kinds.items() if any(found.values())}
    if not kinds or name not in (None, *kinds):
        raise UserError(f"{run} holds no such score by {setting}, only {', '.join(kinds) or '-'}: "
                        f"make some with {flags}")
    best = [max(found.items(), key=lambda item: sum(map(len, item[1].values())))
            for metric, found in kinds.items() if name in (None, metric)]
    return {titled(kind): {f"epoch {epoch}{how}": points + plain.get((kind, epoch), [])
                           for (epoch, how), points in curves.items()} for kind, curves in best}

def titled(metric):
    """The title of a metric's panel."""
    less = is_distance(metric) or metric.startswith(("KID", "KD(", "KD_"))
    if metric.startswith("neare"):
        return f"{metric} (%), of new images {50 if metric.startswith('nearer') else 1}"
    unit = " (test accuracy, %)" * metric.startswith("probe")
    return f"{metric}{unit}, {'less' if less else 'more'} is better"

def draw(rows, x_label, is_log, shared=False):
    """A matplotlib Figure of {y label: {title: {label: [(x, y)]}}}, a row of panels per y label;
    is_log(title): with a logarithmic y axis; shared: with one for the row."""
    from matplotlib.figure import Figure  # Slow to import: only where it is used.
    columns = max(map(len, rows.values()))
    figure = Figure(figsize=(5 * columns, 3.6 * len(rows)), layout="constrained", dpi=150)
    grid = figure.subplots(len(rows), columns, squeeze=False, sharey="row" if shared else False)
    for panels, (y_label, titles) in zip(grid, rows.items(), strict=True):
        for axes, (title, curves) in zip(panels, titles.items(), strict=True):
            log = is_log(title)
            for i, (label, points) in enumerate(curves.items()):
                style = {"decoder": "--", "embedding": ":"}.get(label.partition(" ")[0], "-")
                if points := sorted(point for point in points if point[1] or not log):
                    axes.plot(*zip(*points, strict=True), style, color=f"C{i}", label=label,
                              marker="." * (len(points) < 30))
            axes.set(title=title, xlabel=x_label, ylabel=y_label, yscale="log" if log else "linear")
            axes.grid(alpha=0.3, which="both")
            axes.legend(fontsize=7)
        low, high = panels[0].get_ylim()
        if shared and high < 4 * low:       # What hardly changes is to look like that.
            panels[0].set_ylim(math.sqrt(low * high) / 2, math.sqrt(low * high) * 2)
    return figure

if __name__ == "__main__":
    command(main)()
