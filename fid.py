"""Score samples: the Fréchet distance of their features to those of the training set (FID with Inception's features).

The images of sample.py:      python fid.py --config config/cifar10/C.yaml --epoch 1000
Several checkpoints:          python fid.py --config config/cifar10/C.yaml --epoch 500,1000     (or: --epoch all)
Three seeds, mean and least:  python fid.py --config config/cifar10/C.yaml --epoch 1000 --repeat 3
Several GPUs:                 torchrun --nproc_per_node=4 fid.py --config config/cifar10/C.yaml --epoch 1000
Without weights:              python fid.py --config config/digits/G.yaml --features pixels
Any two sets:                 python fid.py A B
A and B are image folders, .npz of uint8 images, or .npz of statistics (mu, sigma). Figures of a config are appended to
save_dir/results.jsonl and written to TensorBoard.
"""

import hashlib
import json
import shlex
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import checkpoint
import data
import features
import files
import logs
import options
import runtime
from runtime import UserError

METRICS = ("kid", "is", "precision", "recall")


def main():
    """Parse the command line, score what it names."""
    args = parse_arguments()
    config = options.load_config(args.config, args.set) if args.config else None
    rt = runtime.start()
    if config:
        score_run(config, args, rt)
    else:
        score_pair(args, rt)


def parse_arguments():
    """The command line."""
    p = options.parser(__doc__, config_required=False)
    count = options.argument(options.integer(1))
    p.add_argument("paths", nargs="*", metavar="A B", help="without --config: the two sets to compare")
    p.add_argument("--epoch", type=options.epochs, help="checkpoints, such as 500,1000, or all (default: the newest)")
    p.add_argument("--repeat", type=count, default=1, help="sets of samples, of seeds 0, 1, ... (default: 1)")
    options.sigma_rel_flag(p)
    p.add_argument("--images", metavar="DIR", help="score this folder of sample.py, made with other flags or --out")
    p.add_argument("--n_samples", type=count, help="images of a set at most (default: 50000; of A and B: all)")
    p.add_argument("--features", choices=[*features.WEIGHTS, "pixels"], default="inception")
    p.add_argument("--weights", metavar="FILE", help="weights of the features (default: torch's hub cache, a download)")
    p.add_argument("--weights_sha256", metavar="HEX", help="for other weights than the published ones: their SHA-256; "
                                                          "the figure is then not called FID")
    p.add_argument("--metrics", type=options.comma_list(options.one_of(*METRICS)), default=[],
                   help="also these, with commas between: " + ", ".join(METRICS))
    args = p.parse_args()
    if bool(args.config) == bool(args.paths) or len(args.paths) not in (0, 2):
        p.error("say --config YAML, or two sets A B")
    if "is" in args.metrics and args.features != "inception":
        p.error("the Inception score (is) needs --features inception")
    if args.images and (args.epoch or args.repeat > 1 or args.sigma_rel):
        p.error("--images says which samples: leave out --epoch, --repeat and --sigma_rel")
    if args.features == "pixels" and (args.weights or args.weights_sha256):
        p.error("--features pixels has no weights")
    if args.paths and (args.set or args.epoch or args.images or args.repeat > 1 or args.sigma_rel):
        p.error("--set, --epoch, --repeat, --sigma_rel and --images need --config")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Statistics: mean and covariance of features, in float64.

@dataclass
class Statistics:
    """mu (d,) and sigma (d,d) float64 of n images (None: not known); features (n,d) and logits (n,1008) where kept."""
    name: str
    mu: np.ndarray
    sigma: np.ndarray
    n: int | None
    features: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class Moments:
    """Sums for mean and covariance of features (B,d) that come in batches and on several processes."""

    def __init__(self, d, device):
        self.n = torch.zeros([], dtype=torch.float64, device=device)
        self.sum = torch.zeros(d, dtype=torch.float64, device=device)
        self.outer = torch.zeros(d, d, dtype=torch.float64, device=device)

    def add(self, x):
        """Take in a batch (B,d)."""
        x = x.double()
        self.n += len(x)
        self.sum += x.sum(0)
        self.outer.addmm_(x.T, x)

    def finish(self, rt):
        """mu (d,) and unbiased sigma (d,d) over all processes, as float64 arrays."""
        for total in (self.n, self.sum, self.outer):
            rt.all_reduce(total)
        mu = self.sum / self.n
        sigma = self.outer.addr_(self.sum, mu, alpha=-1).div_(self.n - 1)
        return mu.cpu().numpy(), sigma.cpu().numpy()


def compute(images, extractor, rt, batch_size=None, keep=False):
    """The Statistics of features.Images, which all processes share; with `keep`, in all of them, the features too.

    Raises UserError for fewer than two images.
    """
    if images.n < 2:
        raise UserError(f"{images.name}: one image has no covariance")
    widths = [f.shape[1] for f in extractor(next(images.batches([0], 1)))]
    moments = Moments(widths[0], rt.device)
    kept = [torch.zeros(images.n, width) for width in widths] if keep else []
    mine = range(rt.rank, images.n, rt.world_size)
    size = batch_size or (256 if rt.device.type == "cuda" else 16)
    with rt.bar(len(mine), "img", images.name[-40:], shared=True) as bar:
        done = 0
        for batch in images.batches(mine, size):
            n = len(batch)
            if n < size:        # Batches of one size, so that the features' rounding does not depend on the share.
                batch = torch.cat([batch, batch[-1:].expand(size - n, -1, -1, -1)])
            out = [values[:n] for values in extractor(batch)]
            moments.add(out[0])
            for store, values in zip(kept, out, strict=False):
                store[mine[done:done + n]] = values.float().cpu()
            done += n
            bar.update(n)
    mu, sigma = moments.finish(rt)
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"{images.name}: the features are NaN or Inf: --weights {extractor.weights} are no good")
    kept = [rt.all_reduce(store.to(rt.device)).cpu() for store in kept]
    return Statistics(images.name, mu, sigma, images.n, *kept)


def read_statistics(path, arrays):
    """Statistics from the arrays of an .npz with mu (d,) and sigma (d,d). Raises UserError where they are none."""
    mu, sigma = (np.asarray(arrays[key]) for key in ("mu", "sigma"))
    if not (np.issubdtype(mu.dtype, np.floating) and np.issubdtype(sigma.dtype, np.floating) and mu.ndim == 1
            and len(mu) and sigma.shape == (len(mu), len(mu)) and np.isfinite(mu).all()
            and np.allclose(sigma, sigma.T)):       # NaN and Inf are not close either.
        raise UserError(f"{path}: mu {mu.dtype} {list(mu.shape)} and sigma {sigma.dtype} {list(sigma.shape)} are no "
                        f"finite mean (d,) and symmetric covariance (d,d)")
    try:
        n = int(json.loads(str(arrays["metadata"]))["n"])
    except (KeyError, ValueError, TypeError, OverflowError):
        n = None
    return Statistics(str(path), mu.astype(np.float64), sigma.astype(np.float64), n)


# ----------------------------------------------------------------------------------------------------------------------
# Distances.

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1-mu2|² + Tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), the squared distance of two Gaussians (Heusel 2017).

    sigma1 sigma2 has the eigenvalues of the symmetric Lᵀ sigma2 L where L Lᵀ = sigma1: the trace of the root is the sum
    of their square roots. All float64. Raises UserError for a sigma that is no covariance.
    """
    L = factor(sigma1)
    trace_root = np.sqrt(not_negative(np.linalg.eigvalsh(L.T @ sigma2 @ L))).sum()
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_root)


def factor(sigma):
    """L (d,r) with L Lᵀ = sigma (d,d): Cholesky's, or, where n <= d leaves sigma singular, of its rank r."""
    try:
        return np.linalg.cholesky(sigma)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(sigma)
        values = not_negative(values)
        keep = values > values[-1] * len(values) * np.finfo(float).eps
        return vectors[:, keep] * np.sqrt(values[keep])


def not_negative(values):
    """Rising eigenvalues with those that rounding brought below 0 at 0. Raises UserError for truly negative ones."""
    if len(values) and values[0] < -1e-3 * abs(values[-1]):
        raise UserError(f"sigma has a negative eigenvalue, {values[0]:.3g}, and is no covariance")
    return values.clip(min=0)


def distance(a, b):
    """frechet_distance of two Statistics. Raises UserError where their dimensions differ."""
    if a.mu.shape != b.mu.shape:
        raise UserError(f"{a.name} has statistics of {len(a.mu)} dimensions, {b.name} of {len(b.mu)}: both must come "
                        f"from the same features of images of one shape")
    try:
        return frechet_distance(a.mu, a.sigma, b.mu, b.sigma)
    except UserError as e:
        raise UserError(f"{a.name} against {b.name}: {e}") from None


def other_metrics(names, samples, reference, extractor):
    """{figure: value} of the METRICS asked for, by torch-fidelity's functions on the features of two Statistics."""
    if not names:
        return {}
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric
    found = {}
    if "kid" in names:
        size = min(1000, samples.n, reference.n)
        kid = kid_features_to_metric(samples.features, reference.features, kid_subset_size=size, verbose=False)
        found["KID"] = kid["kernel_inception_distance_mean"]
    if "is" in names:
        if samples.n < 10:
            raise UserError("the Inception score is the mean of 10 parts: it needs 10 images or more")
        found["IS"] = isc_features_to_metric(samples.logits)["inception_score_mean"]
    if "precision" in names or "recall" in names:
        if min(samples.n, reference.n) < 4:
            raise UserError("precision and recall look at the 3rd neighbour: they need 4 images or more")
        prc = prc_features_to_metric(samples.features, reference.features, save_cpu_ram=True, verbose=False)
        found |= {name: prc[name] for name in ("precision", "recall") if name in names}
    return {extractor.figure(name): value for name, value in found.items()}


# ----------------------------------------------------------------------------------------------------------------------
# The reference statistics of a training set, computed once.

def reference(config, images, extractor, args, rt, keep):
    """The Statistics of a training set, images (N,C,H,W) uint8: from cache_dir/fid where they are and still fit (and
    features need not be kept), else computed and left there."""
    about = {"dataset": config["dataset"], "split": "train", "n": len(images),
             "images_sha256": hashlib.sha256(images.numpy()).hexdigest(), "features": extractor.name,
             "weights_sha256": extractor.sha256, "version": extractor.version}
    name = f"{about['dataset']}-train-{extractor.name}" + f"-{(extractor.sha256 or '')[:8]}" * bool(extractor.sha256)
    path = Path(config["cache_dir"]) / "fid" / f"{name}.npz" if config["cache_dir"] else None
    stats = read_cache(path, about) if rt.is_main and path else None
    known = rt.agree(stats is not None)
    if keep or not known:
        stats = compute(features.array_images(f"{config['dataset']} train", images), extractor, rt, args.batch_gpu,
                        keep)
    if rt.is_main and path and not known:
        write_cache(path, stats, about)
    return stats


def read_cache(path, about):
    """Statistics from a cache file, None where there is none or, said aloud, where it is damaged or of something else.
    """
    try:
        if not path.exists():
            return None
        arrays = features.read_npz(path)
        known = json.loads(str(arrays.get("metadata", "{}")))
        differences = [key for key in about if known.get(key) != about[key]]
        if not differences:
            return replace(read_statistics(path, arrays), name=f"{about['dataset']} train")
        reason = "it differs in " + ", ".join(f"{key} ({known.get(key)} there, {about[key]} now)"
                                              for key in differences)
    except (UserError, OSError, ValueError, AttributeError, KeyError) as e:
        reason = str(e)
    print(f"the cached statistics {path} do not fit: {reason}; computing them again", file=sys.stderr)
    return None


def write_cache(path, stats, about):
    """Leave statistics for the next time; where that fails, say so and go on."""
    try:
        files.clean(files.make_folder(path.parent), hours=24)       # A younger one may be another run's.
        with files.atomic(path) as temporary, open(temporary, "wb") as f:
            np.savez(f, mu=stats.mu, sigma=stats.sigma, metadata=json.dumps(about))
    except UserError as e:
        print(f"the reference statistics are not kept: {e}", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# What to score.

def score_pair(args, rt):
    """Compare the two sets of the command line and print the figures."""
    pair = [open_source(path, args.n_samples) for path in args.paths]
    given = [source.name for source in pair if isinstance(source, Statistics)]
    if given and args.metrics:
        raise UserError(f"{given[0]} holds statistics: --metrics needs the images themselves")
    extractor = make_extractor(args, rt) if len(given) < 2 else None
    a, b = (source if isinstance(source, Statistics) else
            compute(source, extractor, rt, args.batch_gpu, keep=bool(args.metrics)) for source in pair)
    if rt.is_main:
        name = extractor.figure("FID") if extractor else "Fréchet distance"
        for figure, value in {name: distance(a, b), **other_metrics(args.metrics, a, b, extractor)}.items():
            print(f"{figure} {value:.6g}: {a.name} ({count(a.n)}) against {b.name} ({count(b.n)})")
        warn_small(a.n, b.n)


def open_source(path, limit):
    """features.Images of an image folder or .npz of images, or the Statistics of an .npz that holds them."""
    if Path(path).is_dir():
        return features.folder_images(path, limit)
    arrays = features.read_npz(path)
    if {"mu", "sigma"} <= set(arrays):
        return read_statistics(path, arrays)
    return features.npz_images(path, arrays, limit)


def make_extractor(args, rt):
    """The feature extractor of the command line."""
    return features.Extractor(args.features, rt, args.weights, args.weights_sha256, logits="is" in args.metrics)


def score_run(config, args, rt):
    """Score the samples of a run's checkpoints against its training set; print the figures and keep them."""
    sets = rt.on_main(find_sets, config, args)
    files.check_writable(config["save_dir"])
    extractor = make_extractor(args, rt)
    with rt.in_turns():
        images, _ = data.load(config)
    keep_reference = bool(set(args.metrics) - {"is"})
    against = reference(config, images, extractor, args, rt, keep_reference)
    for epoch, folders in sets:
        start, values = time.perf_counter(), {}
        for folder in folders:
            samples = compute(features.folder_images(folder, args.n_samples or runtime.FULL), extractor, rt,
                              args.batch_gpu, keep=bool(args.metrics))
            if rt.is_main:
                found = {extractor.figure("FID"): distance(samples, against),
                         **other_metrics(args.metrics, samples, against, extractor)}
                for figure, value in found.items():
                    values.setdefault(figure, []).append(value)
                    print(f"{figure} {value:.6g}: epoch {epoch}, {samples.name} ({count(samples.n)}) against "
                          f"{against.name} ({count(against.n)})", flush=True)
        if rt.is_main:
            warn_small(samples.n, against.n)
            report(config, epoch, folders, values, samples.n, against.n, extractor, time.perf_counter() - start, rt)


def find_sets(config, args):
    """[(epoch, [folder of each seed])] that the command line asks for. Raises UserError with the command that makes
    what is missing, and for images or a checkpoint of something else."""
    if args.images:
        settings = read_settings(args.images)
        if not settings:
            raise UserError(f"{args.images} holds no settings.json of sample.py; for any two sets: python fid.py A B")
        path = checkpoint.path_of(config, settings["epoch"])
        if path.exists():
            check_origin(config, args.images, settings, path)
        return [(settings["epoch"], [args.images])]
    length = checkpoint.sigma_rel_suffix(args.sigma_rel)
    epochs = [checkpoint.find(config, epoch) for epoch in args.epoch or [None]] if args.epoch != "all" else []
    for epoch in checkpoint.epochs(config) if args.epoch == "all" else []:
        if checkpoint.samples_folder(config, epoch, length).is_dir():
            epochs.append(epoch)
        else:
            print(f"epoch {epoch} is left out: no samples", file=sys.stderr)
    sets = []
    for epoch in dict.fromkeys(epochs or [checkpoint.find(config)]):
        folders, n = [], args.n_samples
        for seed in range(args.repeat):
            folder = checkpoint.samples_folder(config, epoch, length + f"_seed{seed}" * (seed > 0))
            settings, images = read_settings(folder), features.image_files(folder / "images")
            wanted = n or settings.get("n_samples")         # As many as sample.py was to make, of every seed.
            command = ["python", "sample.py", "--config", args.config, "--epoch", str(epoch)]
            command += ["--sigma_rel", str(args.sigma_rel)] * (args.sigma_rel is not None)
            command += ["--seed", str(seed)] * (seed > 0) + [word for item in args.set for word in ("--set", item)]
            command += ["--n_samples", str(wanted)] * (wanted not in (None, runtime.FULL))
            if not settings or not images:
                raise UserError(f"no images of epoch {epoch} in {folder}: make them with: {shlex.join(command)}")
            check_origin(config, folder, settings, checkpoint.path_of(config, epoch), command)
            names = {path.stem for path in images}
            missing = next((i for i in range(wanted or len(images)) if f"{i:06d}" not in names), None)
            if missing is not None:
                raise UserError(f"{folder} holds {len(images):,} images, but not {missing:06d}.png: make what is "
                                f"missing with: {shlex.join(command)}")
            folders.append(str(folder))
            n = wanted or len(images)
        sets.append((epoch, folders))
    return sets


def check_origin(config, folder, settings, path, command=()):
    """Raise UserError where a folder's images are not of the checkpoint `path`, or that is not of the config."""
    checkpoint.check_same_network(config, checkpoint.load(checkpoint.path_of(config, settings["epoch"]))["config"])
    if settings.get("checkpoint_sha256") != files.sha256(path):
        raise UserError(f"{folder} holds images of another checkpoint than {path}: remove it"
                        + f", then: {shlex.join(command)}" * bool(command))


def read_settings(folder):
    """What sample.py wrote about a folder's images, {} where it did not or the file is damaged."""
    try:
        settings = json.loads((Path(folder) / "settings.json").read_text())
        return settings if isinstance(settings, dict) and isinstance(settings.get("epoch"), int) else {}
    except (OSError, ValueError):
        return {}


def report(config, epoch, folders, values, n, n_reference, extractor, seconds, rt):
    """Append the figures of one checkpoint to results.jsonl: of several seeds the least and the mean."""
    made, lines = read_settings(folders[0]), []
    for figure, found in values.items():
        best = (max if figure.split("(")[0] in ("IS", "precision", "recall") else min)(found)
        line = {"figure": figure, "value": best, "n": n, "n_reference": n_reference,
                "seeds": [read_settings(folder).get("seed") for folder in folders], "epoch": epoch,
                "Mimg": logs.seen_mimg(config, epoch, n_reference),
                "features": extractor.name, "weights_sha256": extractor.sha256, "features_version": extractor.version,
                "sampling": {key: made.get(key) for key in ("weights", "sigma_rel", "steps", "eta", "clip_denoised",
                                                             "precision")},
                "seconds": round(seconds, 2)}
        if len(found) > 1:
            line |= {"values": found, "mean": statistics.mean(found)}
            print(f"{figure} of {len(found)} seeds: best {best:.6g}, mean {line['mean']:.6g}")
        length = f" sigma_rel={made['sigma_rel']:g}" if made.get("sigma_rel") else ""
        lines.append((figure + length, line))
    logs.record(config, lines, rt.device)


def count(n):
    """A number of images in words."""
    return "n unknown" if n is None else f"n = {n:,}"


def warn_small(n, n_reference):
    """Say why a figure of few images is not the published kind."""
    if any(known is not None and known < runtime.FULL for known in (n, n_reference)):
        print(f"warning: {count(n)} and {count(n_reference)}: from under {runtime.FULL:,} images the distance "
              f"comes out too high (its bias grows as 1/n): compare it only with figures of the same n",
              file=sys.stderr)


if __name__ == "__main__":
    runtime.command(main)()
