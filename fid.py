"""Score samples: Fréchet distance of their features to the training set's (FID with Inception's).

Images made by sample.py:     python fid.py --config config/cifar10/C.yaml --epoch 500,1000 (or all)
Three seeds, mean and least:  python fid.py --config config/cifar10/C.yaml --epoch 1000 --repeat 3
Several GPUs:                 torchrun --nproc_per_node=4 fid.py --config config/cifar10/C.yaml
Without weights:              python fid.py --config config/digits/G.yaml --features pixels
Any two sets (image folders, .npz of uint8 images or of mu and sigma):  python fid.py A B"""

import math
import re
import shlex
import statistics
import time
from edm2 import checkpoint, data, distributed, features, files, flags, frechet, guidance, results
from edm2.config import Count, load_config
from edm2.errors import UserError, command, warn
from edm2.image_files import some
from edm2.neighbours import Training, compare

def main():
    """Parse the command line, score what it names."""
    p = flags.parser(__doc__, sigma_rel=True, config_required=False)
    add, count = p.add_argument, flags.flag(Count)
    add("paths", nargs="*", metavar="A B", help="without --config: the two sets to compare")
    add("--epoch", type=flags.epochs, help="such as 500,1000, or all (default: the newest)")
    add("--repeat", type=count, default=1, help="sets of samples, of seeds 0, 1, ... (default: 1)")
    add("--images", metavar="DIR", help="score this folder, made by sample.py with other flags")
    add("--n_samples", type=count, help="images of a set at most (default: 50000; of A and B: all)")
    add("--features", choices=[*features.NETWORKS, "pixels"], default="inception")
    add("--weights", metavar="FILE", help="weights of the features (default: torch's hub cache)")
    add("--weights_sha256", metavar="HEX", help="of other weights, whose score is not called FID")
    add("--neighbours", type=count, metavar="N",
        help="draw the N samples nearest to training images, beside these; are they too near?")
    add("--metrics", type=lambda s: s.split(","), default=[], help=",".join(frechet.METRICS))
    guidance.add_flags(p)
    args = p.parse_args()
    which = args.epoch or args.repeat > 1 or args.sigma_rel or guidance.words(args)
    for wrong, message in (
            (len(args.paths) != (0 if args.config else 2), "say --config YAML, or two sets A B"),
            (set(args.metrics) - set(frechet.METRICS), f"--metrics {args.metrics}: not known"),
            ("is" in args.metrics and args.features != "inception", "is: of --features inception"),
            (args.images and which, "--images says which: no --epoch, --repeat, --sigma_rel, "
                                    "--guidance, --guide"),
            ((args.weights or args.weights_sha256) and args.features == "pixels",
             "--weights: not of --features pixels"),
            (args.paths and (args.set or args.images or args.neighbours or which),
             "what is of a run needs --config")):
        if wrong:
            p.error(message)

    config = load_config(args.config, args.set) if args.config else None
    device = distributed.init()
    if config:
        with distributed.rank0_first():
            images, _ = data.load(config)
        sha256 = data.digest(images)
        sets = distributed.on_rank0(find_sets, config, args, (len(images), sha256))
    pair = [frechet.open_set(path, args.n_samples) for path in args.paths]
    known = pair and all(isinstance(one, frechet.Statistics) for one in pair)
    extractor = None if known else features.Extractor(args.features, device, args.weights,
                                                      args.weights_sha256)
    if config:
        keep = bool(set(args.metrics) - {"is"} or args.neighbours)
        reference = frechet.reference(config, images, extractor, args.batch_gpu, keep)
        training = args.neighbours and Training(config, images, reference, extractor,
                                                args.batch_gpu)
        for epoch, folders in sets.items():
            score_epoch(config, args, epoch, folders, (reference, training), extractor)
    else:
        a, b = (frechet.compute(one, extractor, args.batch_gpu, bool(args.metrics)) for one in pair)
        score(a, b, extractor, args.metrics)

def score(samples, reference, extractor, metrics, of=""):
    """Print, and return as {metric: value}, the scores of two Statistics; in rank 0."""
    if distributed.rank() > 0:
        return {}
    name = extractor.metric("FID") if extractor else "Fréchet distance"
    found = {name: frechet.distance(samples, reference),
             **frechet.other_metrics(metrics, samples, reference, extractor)}
    a, b = (f"n = {one.n:,}" if one.n else "n unknown" for one in (samples, reference))
    if bad := [name for name, value in found.items() if not math.isfinite(value)]:
        raise UserError(f"{samples.name}: {bad[0]} is {found[bad[0]]}")
    for name, value in found.items():
        print(f"{name} {value:.6g}: {of}{samples.name} ({a}) against {reference.name} ({b})")
    if any(one.n and one.n < frechet.N_FID for one in (samples, reference)):
        warn(f"{a} and {b}: from under {frechet.N_FID:,} images the distance comes out too high "
             f"(its bias grows as 1/n): compare it only with scores of the same n")
    return found

def score_epoch(config, args, epoch, folders, references, extractor):
    """Score a checkpoint's samples against the training set; append the scores to results.jsonl."""
    start, scores, lines, (reference, training) = time.perf_counter(), [], [], references
    for folder, made in folders.items():
        images, keep = features.open_samples(folder, range(made["n"])), args.metrics or training
        samples = frechet.compute(images, extractor, args.batch_gpu, bool(keep))
        scores.append(score(samples, reference, extractor, args.metrics, f"epoch {epoch}, "))
        if training:
            scores[-1] |= compare(images, samples.features, training, extractor, args.neighbours)
    if distributed.rank() == 0:
        made = next(iter(folders.values()))
        common = {"seeds": [one.get("seed") for one in folders.values()],
            "sampling": {key: made.get(key) for key in (*results.STANDARD, "precision")},
            "n": samples.n, "n_reference": reference.n, "images_sha256": made["images_sha256"],
            "epoch": epoch, "features": extractor.name, "weights_sha256": extractor.sha256,
            "features_version": extractor.version, "seconds": time.perf_counter() - start}
        length = f" sigma_rel={made['sigma_rel']:g}" if made.get("sigma_rel") else ""
        length += guidance.variant(made)
        for name in scores[0]:
            values = [found[name] for found in scores]
            best = (max if re.match("IS|precision|recall|neare", name) else min)(values)
            several = {"values": values, "mean": statistics.mean(values)} if values[1:] else {}
            if several:
                print(f"{name} of {len(values)} seeds: best {best:.6g}, mean {several['mean']:.6g}")
            lines.append((name + length, {"figure": name, "value": best} | common | several))
        results.record(config, lines, extractor.device)

def find_sets(config, args, trained_on):
    """{epoch: {each seed's folder: its settings, and the n to score}}, of checkpoints trained on
    images of this number and SHA-256. Raises UserError with the command for missing ones."""
    asked, sets = checkpoint.epochs(config) if args.epoch == "all" else args.epoch, {}
    if args.images:
        asked = [features.read_settings(args.images).get("epoch")]
    for epoch in dict.fromkeys(checkpoint.find(config, epoch) for epoch in asked or [None]):
        path, n = checkpoint.path_of(config, epoch), args.n_samples
        try:
            guided, _ = guidance.find(args, config, epoch)
        except UserError as e:
            if args.epoch != "all":         # Of which one may be the guide.
                raise
            warn(f"epoch {epoch} is left out: {e}")
            continue
        for seed in range(args.repeat):
            variant = (f"_seed{seed}" if seed else "") + guidance.variant(guided)
            folder = args.images or features.samples_folder(config, epoch, variant, args.sigma_rel)
            settings = features.read_settings(folder)
            if args.epoch == "all" and seed == 0 and not settings:
                warn(f"epoch {epoch} is left out: no samples")
                break
            n = n or min(settings.get("n_samples", frechet.N_FID), frechet.N_FID)   # Of all seeds.
            words = ["--config", args.config, "--epoch", epoch, "--seed", seed, "--n_samples", n]
            words += ["--sigma_rel", args.sigma_rel] if args.sigma_rel else []
            words += guidance.words(args)
            words += ["--out", args.images] if args.images else []
            words += [word for item in args.set for word in ("--set", item)]
            make = f"make them with: python sample.py {shlex.join(map(str, words))}"
            if not settings:
                raise UserError(f"no images of epoch {epoch} in {folder}, no settings.json: {make}")
            checkpoint.check_images(path, checkpoint.load_epoch(config, epoch), *trained_on)
            if settings.get("checkpoint_sha256") != files.sha256(path):
                raise UserError(f"{folder} is of another checkpoint: remove it, then {make}")
            names = (features.sample_path(folder, i) for i in range(n))
            if missing := [path.name for path in names if not path.exists()]:
                raise UserError(f"{folder} lacks images, {some(missing)}: {make}")
            settings |= {"n": n, "images_sha256": trained_on[1]}
            sets.setdefault(epoch, {})[str(folder)] = settings
    if not sets:
        raise UserError(f"no epoch of {config.save_dir} has samples: make some with sample.py")
    return sets

if __name__ == "__main__":
    command(main)()
