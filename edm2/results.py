"""results.jsonl: what fid.py and probe.py record; as a Markdown table and curves, of all runs.

Some runs:            python -m edm2.results runs/cifar10/C runs/cifar10/E
All that lie in runs: python -m edm2.results
Training dynamics:    python -m edm2.results --dynamics runs/cifar10/C runs/cifar10/E runs/cifar10/G
Scores by EMA length: python -m edm2.results --ema runs/cifar10/G
Scores by guidance:   python -m edm2.results --guidance runs/cifar10/G_cond"""

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
from edm2.image_files import some

NAMES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "tinyimagenet": "Tiny ImageNet"}
# The samples that the table compares.
STANDARD = {"weights": "ema", "sigma_rel": None, "steps": 18, "eta": 0, "clip_denoised": False,
            "classes": None, "guidance": None, "guidance_interval": None, "guide": None}

def main():
    """Parse the command line, print the table, draw the curves."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("runs", nargs="*", metavar="RUN", help="save_dir of a run, or of several (default: ./runs)")
    add("--out", metavar="PNG", help="default: results.png, dynamics.png, ema.png or guidance.png")
    add("--dynamics", nargs="+", metavar="RUN", help="draw the training dynamics")
    add("--ema", metavar="RUN", help="draw scores by the relative length of the EMA")
    add("--guidance", metavar="RUN", help="draw scores by the weight of guidance")
    add("--figure", help="with these two: the score, such as FID or probe (default: all)")
    args = p.parse_args()
    if sum(map(bool, (args.runs, args.dynamics, args.ema, args.guidance))) > 1:
        p.error("name runs alone, or after --dynamics, or one after --ema or --guidance")
    if args.figure and not (args.ema or args.guidance):
        p.error("--figure needs --ema or --guidance")
    name, x_label = "results", "training images seen (millions)"
    if args.dynamics:
        records = dynamics.read(args.dynamics)
        name, text, rows = "dynamics", dynamics.table(records), dynamics.curves(records)
    elif run := args.ema or args.guidance:
        name, setting = ("ema", "sigma_rel") if args.ema else ("guidance", "guidance")
        x_label = "relative EMA length, sigma_rel" if args.ema else "weight of guidance"
        text, rows = "", {"score": along(run, setting, args.figure)}
    else:
        runs = [run for folder in args.runs or ["runs"] for run in scored(folder)]
        results = {run: lines for run in runs if (lines := read(run))}
        shown = {line["figure"] for lines in results.values() for line in lines}
        metrics = sorted(filter(is_distance, shown), reverse=True) + ["probe"] * ("probe" in shown)
        if not metrics:
            raise UserError(f"{', '.join(runs)}: no FID and no probe accuracy there yet")
        text, rows = table(results, metrics), {"score": by_images(results, metrics)}
    print(text)
    figure, out = draw(rows, x_label, log=bool(args.dynamics)), args.out or f"{name}.png"
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

def along(run, setting, name):
    """{metric: {label: [(value of a setting, score)]}} of a run, of all metrics or `name`, by its
    samples' "sigma_rel" or "guidance" (unguided ones: 1)."""
    free = ["sigma_rel"] if setting == "sigma_rel" else ["guidance", "guidance_interval", "guide"]
    kinds, plain = {}, {}       # {metric: {what it is of: {(epoch, how): [(setting, score)]}}}
    for line in read(run, {key: STANDARD[key] for key in STANDARD if key not in free}):
        of = (f" t={line.get('timestep')} {line['features']}" if line["figure"] == "probe" else
              f" n={line['n']:,}, seeds {line['seeds']}")
        x, kind = line["sampling"].get(setting), line["figure"] + of
        if x is None:
            plain[kind, line["epoch"]] = [(1, line["value"])] if setting == "guidance" else []
        else:
            how = guidance.variant(line["sampling"] | {"guidance": None}).replace("_", ", ")
            how += ", classifier-free" * (setting == "guidance" and "guide" not in how)
            curves = kinds.setdefault(line["figure"], {}).setdefault(kind, {})
            curves.setdefault((line["epoch"], how), []).append((x, line["value"]))
    if not kinds or name not in (None, *kinds):
        flag = "--sigma_rel 0.05" if setting == "sigma_rel" else "--guidance 2"
        raise UserError(f"{run} holds no such score by {setting}, only {', '.join(kinds) or '-'}: "
                        f"make some with {flag}, ...")
    best = [max(found.items(), key=lambda item: sum(map(len, item[1].values())))
            for metric, found in kinds.items() if name in (None, metric)]
    return {titled(kind): {f"epoch {epoch}{how}": points + plain.get((kind, epoch), [])
                           for (epoch, how), points in curves.items()} for kind, curves in best}

def titled(metric):
    """The title of a metric's panel."""
    less = is_distance(metric) or metric.startswith(("KID", "KD(", "KD_"))
    unit = " (test accuracy, %)" * metric.startswith("probe")
    return f"{metric}{unit}, {'less' if less else 'more'} is better"

def draw(rows, x_label, log=False):
    """A matplotlib Figure of {y label: {title: {label: [(x, y)]}}}, a row of panels per y label."""
    from matplotlib.figure import Figure  # Slow to import: only where it is used.
    columns = max(map(len, rows.values()))
    figure = Figure(figsize=(5 * columns, 3.6 * len(rows)), layout="constrained", dpi=150)
    grid = figure.subplots(len(rows), columns, squeeze=False, sharey="row" if log else False)
    for panels, (y_label, titles) in zip(grid, rows.items(), strict=True):
        for axes, (title, curves) in zip(panels, titles.items(), strict=True):
            for i, (label, points) in enumerate(curves.items()):
                style = {"decoder": "--", "embedding": ":"}.get(label.partition(" ")[0], "-")
                if points := sorted(point for point in points if point[1] or not log):
                    axes.plot(*zip(*points, strict=True), style, color=f"C{i}", label=label,
                              marker="." * (len(points) < 30))
            axes.set(title=title, xlabel=x_label, ylabel=y_label, yscale="log" if log else "linear")
            axes.grid(alpha=0.3, which="both")
            axes.legend(fontsize=7)
        low, high = panels[0].get_ylim()
        if log and high < 4 * low:          # What hardly changes is to look like that.
            panels[0].set_ylim(math.sqrt(low * high) / 2, math.sqrt(low * high) * 2)
    return figure

if __name__ == "__main__":
    command(main)()
