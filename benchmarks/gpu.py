"""All that a GPU must show, in one command, with nobody at hand: `make gpu`.

    python benchmarks/gpu.py --data_root ../shared/data     # at most 25 minutes on an H100
    python benchmarks/gpu.py --rehearse     # the same way on the CPU, tiny: make gpu REHEARSE=1

Runs the tests marked cuda, then the benchmarks of the training step, sampling, data, checkpoints
and the probe against the plain way, then, where CIFAR-10 is, trains C, E and G of 10M parameters at
equal Mimg for what is left of the time. Writes gpu-<name>-<date>.md, .json and pictures to --out. A
part that fails is said, and the next one goes on; started again at the same commit, it does what
failed or is missing. Exit code 1 where a part failed.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
import torch
from sides import ROOT, machine
from edm2 import diffusion, distributed, files
from edm2.config import load_config
from edm2.errors import UserError, command
from edm2.machine import device_name

TESTS = "tests"
# What a part's figures are held to: times faster than the plain way.
TARGETS = {f"step {data}/{letter}": 2.0 if letter == "C" else 2.5
           for data in ("cifar10", "tinyimagenet") for letter in "CEG"}
TARGETS |= {f"sampling cifar10/{letter}": 2.0 for letter in "CEG"}
MFU = 0.35
TRAINING = 8                    # Minutes of the time that are kept for it, a third at most.
ROUNDS, PILOT = 15, 60          # Of the training step; steps that tell how long an epoch takes.

def main():
    """Run the parts that are missing, writing the page anew after each."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny sizes")
    p.add_argument("--data_root", type=Path, default=ROOT / "data",
                   help="where CIFAR-10 is (default: data)")
    p.add_argument("--minutes", type=float, default=25, help="in all (default: 25)")
    p.add_argument("--out", type=Path, help="folder (default: benchmarks/results; rehearsing "
                                            "runs/gpu-rehearsal)")
    args = p.parse_args()
    args.end = time.monotonic() + 60 * args.minutes
    if args.rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    elif distributed.init().type == "cpu":      # Which raises for a driver that is too old.
        raise UserError("there is no GPU that PyTorch can use; --rehearse needs none")
    args.device = torch.device("cpu" if args.rehearse else "cuda")
    results = "runs/gpu-rehearsal" if args.rehearse else "benchmarks/results"
    args.out, args.data_root = (args.out or ROOT / results).resolve(), args.data_root.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    args.has_cifar10 = (args.data_root / "cifar-10-batches-py").is_dir() and not args.rehearse
    args.trains = args.rehearse or args.has_cifar10
    state, page = begin(args)
    parts = state["parts"]
    for name, limit, words in plan(args):
        if not parts.get(name, {}).get("ok"):
            kept = 60 * min(TRAINING, args.minutes / 3) if args.trains else 0
            left = args.end - kept - time.monotonic()
            print(f"{name} ...", end=" ", flush=True)
            parts[name] = call(words, min(limit, left), args) if left > 10 else {
                "ok": False, "seconds": 0, "text": "", "error": "no time was left"}
            print((parts[name]["error"] or f"{parts[name]['seconds']:.0f} s").splitlines()[-1],
                  flush=True)
            write(page, state, args)
    train(args, state, page)
    write(page, state, args)
    failed = [name for name, part in parts.items() if not part["ok"]]
    print(f"page: {page}")
    if failed:
        sys.exit(f"gpu.py: {len(failed)} of {len(parts)} parts failed: {', '.join(failed)}")

def begin(args):
    """The state to go on from, of this machine and commit, or a new one; and the page's path."""
    commit = "unknown"
    with contextlib.suppress(OSError, subprocess.SubprocessError):      # No git, or no clone.
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, check=True,
                                capture_output=True, text=True).stdout.strip()
    name = "rehearsal" if args.rehearse else device_name(args.device)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    for path in sorted(args.out.glob(f"gpu-{slug}-*.json"), reverse=True):
        state = json.loads(path.read_text())
        if state["commit"] == commit:
            return state, path.with_suffix(".md")
    shutil.rmtree(save_dir(args, ""), ignore_errors=True)       # Of another commit.
    state = {"machine": machine(), "commit": commit, "command": shlex.join(["python", *sys.argv]),
             "date": str(date.today()), "parts": {}}
    return state, args.out / f"gpu-{slug}-{date.today()}.md"

def plan(args):
    """Yield each part but the training: its name, the seconds that it may take, its command."""
    def script(name, *words):
        return [sys.executable, f"benchmarks/{name}.py", *map(str, words)]

    small = ["network.n_channels=32", "network.attn_channels_per_head=32"] if args.rehearse else []
    small = [word for setting in small for word in ("--set", setting)]
    half = [] if args.rehearse else ["--amp_dtype", "float16"]
    steps = [name for name in TARGETS if name.startswith("step ")]
    yield TESTS, 480, [sys.executable, "-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider",
                       *(["-n", "2"] if args.rehearse else []), "tests/test_cuda.py"]
    for name in steps[::5] if args.rehearse else steps:
        config = name.removeprefix("step ")
        yield name, 240, script(
            "train_step", "--configs", config, "--batch", batch(config, args), *half, *small,
            "--rounds", 2 if args.rehearse else ROUNDS, "--no_shares", "--json", args.out / "rows")
    for letter in "G" if args.rehearse else "CEG":
        yield f"sampling cifar10/{letter}", 180, script(
            "sample", "--configs", f"cifar10/{letter}", "--n", 4 if args.rehearse else 4096, *half,
            "--rounds", 1 if args.rehearse else 2, "--steps", 2 if args.rehearse else 18, *small,
            "--json", args.out / "rows")
    yield "data", 150, script("data", "--rounds", 1 if args.rehearse else 5, *(
        ["--cifar10", args.data_root] if args.has_cifar10 else []))
    yield "checkpoint", 60, script("checkpoint", "--configs",
                                   "digits/G" if args.rehearse else "cifar10/G")
    digits = ["dataset=digits", "network.image_shape=[1,8,8]", "diffusion.sigma_data=0.85",
              "linear.lrate=0.1"]
    words = [word for setting in digits for word in ("--set", setting)]
    if args.has_cifar10:
        words = ["--data_root", args.data_root, "--n_channels", 64, "--set", "linear.n_epoch=5"]
    passes = 1 if args.rehearse else "1,5"
    yield "probe", 300, script("probe", "--repeats", 1, "--passes", passes, *words)

def batch(config, args):
    """The images of a step: 512 of 32x32, 192 of 64x64, fewer where two steps do not fit."""
    if args.rehearse:
        return 2
    n, config = 192 if "tiny" in config else 512, load_config(ROOT / "config" / f"{config}.yaml")
    try:
        an_image, besides = diffusion.training_bytes(config, args.device, torch.float16)
        room = torch.cuda.get_device_properties(args.device).total_memory
        while n > 1 and 1.7 * (n * an_image + besides) > room:      # The compiled one keeps less.
            n //= 2
    except Exception as e:      # What the part itself will meet, and say.
        print(f"not counted: {e}", file=sys.stderr)
    return n

def call(words, limit, args):
    """Run a command for so many seconds at most; what became of it."""
    rows, started = args.out / "rows", time.monotonic()
    rows.unlink(missing_ok=True)
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, start_new_session=True)
    try:
        out, err = process.communicate(timeout=limit)
        said = "\n".join((out + err).splitlines()[-25:])
        error = f"{said}\nexit code {process.returncode}" if process.returncode else ""
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        error = f"{err[-2000:]}\nit ran past {limit:.0f} s"
    except BaseException:       # Ctrl-C.
        os.killpg(process.pid, signal.SIGKILL)
        raise
    part = {"ok": not error, "seconds": time.monotonic() - started, "text": out, "error": error,
            "command": shlex.join(words)}
    if rows.exists():
        part["rows"] = json.loads(rows.read_text())
        rows.unlink()
    return part

def train(args, state, page):
    """Train C, E and G for equally many epochs, as many as the time allows; add them as parts."""
    parts = state["parts"]
    if not args.trains:
        state["left out"] = f"no CIFAR-10 in {args.data_root}: nothing was trained on it"
        return
    letters = [letter for letter in "CEG" if not parts.get(f"training {letter}", {}).get("ok")]
    if letters and "epochs" not in state:
        left = args.end - time.monotonic()
        pilot = call(training("C", 1, args, "pilot", "--max_steps", 3 if args.rehearse else PILOT),
                     max(30, left / 3), args)
        rates = [row["img_per_s"] for row in lines(args, "pilot") if "img_per_s" in row]
        # Of each of three a minute and a half is for compiling, grids and evaluations.
        seconds = (args.end - time.monotonic()) / 3 - 90
        epochs = int(0.85 * seconds * rates[-1] / 50_000) if rates else 0
        if epochs < 1 and not args.rehearse:
            parts["training C"] = pilot | {
                "ok": False, "error": pilot["error"] or "no time was left: start make gpu again"}
            return
        state["epochs"] = 2 if args.rehearse else epochs
    for letter in letters:
        words = training(letter, state["epochs"], args, letter)
        parts[f"training {letter}"] = call(words, max(60, args.end - time.monotonic()), args)
        rows = lines(args, letter)
        parts[f"training {letter}"] |= {
            "losses": [(row["Mimg"], row["loss_unweighted"]) for row in rows if "lr" in row],
            "found": next((row for row in reversed(rows) if "heldout_loss" in row), {})}
        for path in sorted((save_dir(args, letter) / "grids").glob("*.png"))[-1:]:
            picture = page.with_name(f"{page.stem}-{letter}.png")
            picture.write_bytes(path.read_bytes())
        write(page, state, args)

def save_dir(args, name):
    """Where a run of the training goes."""
    return ROOT / "runs" / ("gpu-rehearsal" if args.rehearse else "gpu") / "training" / name

def training(letter, n_epoch, args, name, *words):
    """The command that trains a config for so many epochs, the schedule in proportion."""
    data = "digits" if args.rehearse else "cifar10"
    settings = {"network.n_channels": 16 if args.rehearse else 64, "data_root": args.data_root,
                "network.attn_channels_per_head": 16 if args.rehearse else 64, "n_epoch": n_epoch,
                "warm_epoch": n_epoch / 10, "ema": 0.998, "eval_every": n_epoch,
                "eval.images": 2000, "eval.probe": True, "save_every": n_epoch,
                "log_every": 1 if args.rehearse else 20, "save_dir": save_dir(args, name)}
    settings |= {} if letter == "C" else {"tref_epoch": n_epoch / 5}
    words = [*map(str, words), *([] if args.rehearse else ["--use_amp"])]
    return [sys.executable, "train.py", "--config", f"config/{data}/{letter}.yaml", *words,
            *(word for key, value in settings.items() for word in ("--set", f"{key}={value}"))]

def lines(args, name):
    """The lines of a run's metrics.jsonl."""
    path = save_dir(args, name) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

# ----------------------------------------------------------------------------------------------
# The page.

def write(page, state, args):
    """Write the JSON and the page with its pictures."""
    with files.atomic(page.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(state, indent=1, default=str) + "\n")
    parts, failed = state["parts"], [n for n, part in state["parts"].items() if not part["ok"]]
    minutes = sum(part["seconds"] for part in parts.values()) / 60
    text = [f"# {page.stem}", f"{state['machine']}; commit {state['commit']}, "
            f"`{state['command']}`, {minutes:.1f} minutes; {len(failed)} of {len(parts)} parts "
            f"failed{': ' * bool(failed)}{', '.join(failed)}."]
    if args.rehearse:
        text.append("**A rehearsal on the CPU with tiny networks: its figures mean nothing.**")
    data = "the digits, in CIFAR-10's place" if args.rehearse else "CIFAR-10"
    text += ["## Targets", targets(parts, args.rehearse), f"## Trained on {data}",
             trained(page, state)]
    for name, part in parts.items():
        words = part.get("command", "").replace(sys.executable, "python")
        text.append(f"## {name}\n\n`{words}`, {part['seconds']:.0f} s")
        is_table = name != TESTS and not name.startswith("training")    # Below its own command.
        text += [part["text"].partition("\n\n")[2].strip() if is_table else tail(part["text"], 8)]
        text += [f"**Failed.**\n\n```\n{part['error']}\n```"] if not part["ok"] else []
    with files.atomic(page) as temporary:
        temporary.write_text("\n\n".join(filter(None, text)) + "\n")

def tail(text, n):
    """The last lines of a text, as they are."""
    return "```\n" + "\n".join(text.splitlines()[-n:]) + "\n```"

def targets(parts, rehearsed):
    """A table of what was measured beside what was hoped for."""
    rows = ["| part | times faster than plain | target | batch | images/s | ms a step "
            f"| MFU (target {MFU:.0%}) | peak memory (GB) | plain's | |", "|---" * 10 + "|"]
    for name, target in TARGETS.items():
        found = parts.get(name, {}).get("rows", [])
        if len(found) < 2:
            rows.append(f"| {name} | not measured | {target} |" + " |" * 7)
            continue
        ours, plain = found[0], found[1]
        mfu, faster = ours.get("MFU"), ours["faster"]
        met = faster >= target and (mfu or MFU) >= MFU
        met = "-" if rehearsed else "met" if met else "**not met**"
        met += ", but for MFU: not known" * (mfu is None and "step" in name and met == "met")
        rows.append(f"| {name} | {faster:.2f} | {target} | {ours.get('batch', '')} "
                    f"| {ours['img_per_s']:.1f} "
                    f"| {1e3 * ours['seconds']:.1f} | {f'{mfu:.1%}' if mfu else '-'} "
                    f"| {ours['memory']:.2f} | {plain['memory']:.2f} "
                    f"| {met} |")
    return "\n".join(rows)

def trained(page, state):
    """A table and pictures of the training."""
    from matplotlib.figure import Figure
    rows = {name[-1]: part for name, part in state["parts"].items() if part.get("losses")}
    if not rows:
        return state.get("left out", "Not yet.")
    axes = Figure((7, 4), layout="constrained", dpi=120).subplots()
    text = ["| | Mimg | loss, last | held-out loss | probe (%) | s |", "|---" * 6 + "|"]
    pictures = []
    for letter, part in rows.items():
        found = part["found"]
        probe = next((value for key, value in found.items() if key.startswith("probe")), None)
        axes.plot(*zip(*part["losses"], strict=True), label=letter)
        shown = [f"{value:.4f}" if value else "-" for value in (
            part["losses"][-1][1], found.get("heldout_loss"), probe)]
        text.append(f"| {letter} | {part['losses'][-1][0]:.3f} | {' | '.join(shown)} "
                    f"| {part['seconds']:.0f} |")
        picture = page.with_name(f"{page.stem}-{letter}.png")
        if picture.exists():
            pictures.append(f"{letter}: ![samples of {letter} above real images]({picture.name})")
    axes.set(xlabel="Mimg", ylabel="loss, unweighted", yscale="log")
    axes.legend()
    with files.atomic(page.with_name(f"{page.stem}-losses.png")) as temporary:
        axes.figure.savefig(temporary, format="png")
    return "\n\n".join(["\n".join(text), f"![losses]({page.stem}-losses.png)", *pictures])

if __name__ == "__main__":
    command(main)()
