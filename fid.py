"""Score samples: Fréchet distance of their features to the training set's (FID with Inception's).

The images of sample.py:      python fid.py --config config/cifar10/C.yaml --epoch 1000
Several checkpoints:          python fid.py --config config/cifar10/C.yaml --epoch 500,1000 (or all)
Three seeds, mean and least:  python fid.py --config config/cifar10/C.yaml --epoch 1000 --repeat 3
Several GPUs:                 torchrun --nproc_per_node=4 fid.py --config config/cifar10/C.yaml
Without weights:              python fid.py --config config/digits/G.yaml --features pixels
Any two sets:                 python fid.py A B
A and B are image folders, .npz of uint8 images, or .npz of statistics (mu, sigma). Scores of a
config are appended to save_dir/results.jsonl and written to TensorBoard.
"""

import json
import shlex
import statistics
import time
from pathlib import Path

from edm2 import checkpoint, data, distributed, features, files, flags, frechet, results
from edm2.config import Count, load_config
from edm2.errors import UserError, command, warn
from edm2.frechet import N_FID, Statistics


def main():
    """Parse the command line, score what it names."""
    args = parse_arguments()
    config = load_config(args.config, args.set) if args.config else None
    device = distributed.init()
    sets = distributed.on_rank0(find_sets, config, args) if config else None
    pair = [frechet.open_set(path, args.n_samples) for path in args.paths]
    extractor = None if pair and all(isinstance(one, Statistics) for one in pair) else (
        features.Extractor(args.features, device, args.weights, args.weights_sha256,
                           logits="is" in args.metrics))
    if config:
        score_run(config, args, sets, extractor)
    else:
        a, b = (frechet.compute(one, extractor, args.batch_gpu, bool(args.metrics)) for one in pair)
        score(a, b, extractor, args.metrics)


def parse_arguments():
    """The command line."""
    p = flags.parser(__doc__, sigma_rel=True, config_required=False)
    add, count = p.add_argument, flags.flag(Count)
    add("paths", nargs="*", metavar="A B", help="without --config: the two sets to compare")
    add("--epoch", type=flags.epochs, help="such as 500,1000, or all (default: the newest)")
    add("--repeat", type=count, default=1, help="sets of samples, of seeds 0, 1, ... (default: 1)")
    add("--images", metavar="DIR", help="score this folder, made by sample.py with other flags")
    add("--n_samples", type=count, help="images of a set at most (default: 50000; of A and B: all)")
    add("--features", choices=[*features.WEIGHTS, "pixels"], default="inception")
    add("--weights", metavar="FILE", help="weights of the features (default: torch's hub cache)")
    add("--weights_sha256", metavar="HEX",
        help="of other weights than the published ones; the score is then not called FID")
    add("--metrics", type=lambda names: names.split(","), default=[],
        help="these too, with commas between: " + ", ".join(frechet.METRICS))
    args = p.parse_args()
    which = args.epoch or args.repeat > 1 or args.sigma_rel
    for wrong, message in (
            (bool(args.config) == bool(args.paths), "say --config YAML, or two sets A B"),
            (len(args.paths) not in (0, 2), "say two sets A B"),
            (set(args.metrics) - set(frechet.METRICS), f"--metrics {args.metrics}: not known"),
            ("is" in args.metrics and args.features != "inception", "is: of --features inception"),
            (args.images and which, "--images says which: no --epoch, --repeat, --sigma_rel"),
            (args.features == "pixels" and (args.weights or args.weights_sha256),
             "--features pixels has no weights"),
            (args.paths and (args.set or args.images or which), "what is of a run needs --config")):
        if wrong:
            p.error(message)
    return args


def score(samples, reference, extractor, metrics, of=""):
    """Print, and return as {metric: value}, the scores of two Statistics, in rank 0; say why those
    of few images are not the published kind."""
    if distributed.rank() > 0:
        return {}
    name = extractor.metric("FID") if extractor else "Fréchet distance"
    found = {name: frechet.distance(samples, reference),
             **frechet.other_metrics(metrics, samples, reference, extractor)}
    counts = [f"n = {stats.n:,}" if stats.n else "n unknown" for stats in (samples, reference)]
    for name, value in found.items():
        print(f"{name} {value:.6g}: {of}{samples.name} ({counts[0]}) against {reference.name} "
              f"({counts[1]})", flush=True)
    if any(stats.n and stats.n < N_FID for stats in (samples, reference)):
        warn(f"{counts[0]} and {counts[1]}: from under {N_FID:,} images the distance comes out too "
             f"high (its bias grows as 1/n): compare it only with scores of the same n")
    return found


def score_run(config, args, sets, extractor):
    """Score samples of a run's checkpoints against its training set; keep the scores."""
    with distributed.rank0_first():
        images, _ = data.load(config)
    keep = bool(set(args.metrics) - {"is"})
    reference = frechet.reference(config, images, extractor, args.batch_gpu, keep)
    for epoch, folders in sets:
        start, values = time.perf_counter(), []
        for folder in folders:
            samples = features.open_images(folder, args.n_samples or N_FID)
            samples = frechet.compute(samples, extractor, args.batch_gpu, bool(args.metrics))
            values.append(score(samples, reference, extractor, args.metrics, f"epoch {epoch}, "))
        if distributed.rank() == 0:
            values = {name: [found[name] for found in values] for name in values[0]}
            report(config, folders, values, {
                "n": samples.n, "n_reference": reference.n, "epoch": epoch,
                "features": extractor.name, "weights_sha256": extractor.sha256,
                "features_version": extractor.version,
                "seconds": round(time.perf_counter() - start, 2)}, extractor.device)


def report(config, folders, values, common, device):
    """Append {metric: [value of each seed]} of a checkpoint to results.jsonl: best and mean."""
    settings, lines = [read_settings(folder) for folder in folders], []
    made = settings[0]
    length = f" sigma_rel={made['sigma_rel']:g}" if made.get("sigma_rel") else ""
    for name, found in values.items():
        best = (max if name.split("(")[0] in ("IS", "precision", "recall") else min)(found)
        line = {"figure": name, "value": best, "seeds": [one.get("seed") for one in settings],
                "sampling": {key: made.get(key) for key in (
                    "weights", "sigma_rel", "steps", "eta", "clip_denoised", "precision")}}
        if len(found) > 1:
            line |= {"values": found, "mean": statistics.mean(found)}
            print(f"{name} of {len(found)} seeds: best {best:.6g}, mean {line['mean']:.6g}")
        lines.append((name + length, line | common))
    results.record(config, lines, device)


def find_sets(config, args):
    """[(epoch, [folder of each seed])] that the command line asks for. Raises UserError with the
    command that makes what is missing, and for images or a checkpoint of something else."""
    if args.images:
        settings = read_settings(args.images)
        if not settings:
            raise UserError(f"{args.images} holds no settings.json of sample.py; for any two sets: "
                            f"python fid.py A B")
        if checkpoint.path_of(config, settings["epoch"]).exists():
            check_origin(config, args.images, settings, settings["epoch"])
        return [(settings["epoch"], [args.images])]
    asked = [checkpoint.find(config, epoch) for epoch in args.epoch or [None]
             ] if args.epoch != "all" else checkpoint.epochs(config)
    sets = []
    for epoch in dict.fromkeys(asked or [checkpoint.find(config)]):
        if args.epoch == "all" and not features.samples_folder(
                config, epoch, "", args.sigma_rel).is_dir():
            warn(f"epoch {epoch} is left out: no samples")
        else:
            sets.append((epoch, find_folders(config, args, epoch)))
    return sets


def find_folders(config, args, epoch):
    """The folder of each seed's samples of a checkpoint. Raises UserError as find_sets does."""
    folders, n = [], args.n_samples
    for seed in range(args.repeat):
        folder = features.samples_folder(config, epoch, f"_seed{seed}" * (seed > 0), args.sigma_rel)
        settings, images = read_settings(folder), features.image_files(folder / "images")
        n = n or settings.get("n_samples")              # As many as were to be made, of every seed.
        make = ["python", "sample.py", "--config", args.config, "--epoch", str(epoch)]
        make += ["--sigma_rel", str(args.sigma_rel)] * (args.sigma_rel is not None)
        make += ["--seed", str(seed)] * (seed > 0)
        make += [word for item in args.set for word in ("--set", item)]
        make += ["--n_samples", str(n)] * (n not in (None, N_FID))
        remedy, names = f"make them with: {shlex.join(make)}", {path.stem for path in images}
        missing = [i for i in range(n or 1) if f"{i:06d}" not in names]
        if not settings or not images:
            raise UserError(f"no images of epoch {epoch} in {folder}: {remedy}")
        check_origin(config, folder, settings, epoch, f", then {remedy}")
        if missing:
            raise UserError(f"{folder} holds {len(images):,} images, but not {missing[0]:06d}.png: "
                            f"{remedy}")
        folders.append(str(folder))
    return folders


def check_origin(config, folder, settings, epoch, remedy=""):
    """Raise UserError where images are not of the run's checkpoint, or that not of the config."""
    path = checkpoint.path_of(config, epoch)
    checkpoint.check_same(config, checkpoint.load(path)["config"], checkpoint.NETWORK)
    if settings.get("checkpoint_sha256") != files.sha256(path):
        raise UserError(f"{folder} is of another checkpoint than {path}: remove it{remedy}")


def read_settings(folder):
    """What sample.py wrote about a folder's images, {} where it did not or the file is damaged."""
    try:
        settings = json.loads((Path(folder) / "settings.json").read_text())
        return settings if isinstance(settings, dict) and isinstance(settings["epoch"], int) else {}
    except (OSError, ValueError, KeyError):
        return {}


if __name__ == "__main__":
    command(main)()
