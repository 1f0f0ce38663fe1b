"""Fréchet distance: mean and covariance of features, their distance, the training set's, others."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
import numpy as np
import torch
from edm2 import data, distributed, features, files, image_files
from edm2.errors import UserError
from edm2.features import ImageSet

N_FID = 50_000      # Samples of an FID that can be compared with published ones.
METRICS = ("kid", "is", "precision", "recall")

@dataclass
class Statistics:
    """mu (d,), sigma (d,d) of n images (None: unknown); features (n,d), logits (n,1008) if kept."""
    name: str
    mu: np.ndarray
    sigma: np.ndarray
    n: int | None
    features: torch.Tensor | None = None
    logits: torch.Tensor | None = None

class Moments:
    """Sums for mean and covariance of features (B,d), in batches and on several processes."""
    def __init__(self, d, device):
        self.n, self.sum, self.outer = (torch.zeros(shape, dtype=torch.float64, device=device)
                                        for shape in ([], [d], [d, d]))

    def add(self, x):
        """Take in a batch (B,d)."""
        x = x.double()
        self.n += len(x)
        self.sum += x.sum(0)
        self.outer.addmm_(x.T, x)

    def statistics(self, name):
        """The Statistics, with unbiased sigma, over all processes. Raises UserError for NaN."""
        mu = distributed.all_reduce(self.sum) / distributed.all_reduce(self.n)
        sigma = distributed.all_reduce(self.outer).addr_(self.sum, mu, alpha=-1).div_(self.n - 1)
        if not (torch.isfinite(mu).all() and torch.isfinite(sigma).all()):
            raise UserError(f"{name}: the features are NaN or Inf")
        return Statistics(name, mu.cpu().numpy(), sigma.cpu().numpy(), int(self.n))

def compute(images, extractor, batch_size=None, keep=False):
    """An ImageSet's Statistics, by all processes; `keep`: with features. UserError: one image."""
    if isinstance(images, Statistics):
        if keep:
            raise UserError(f"{images.name} holds statistics: --metrics needs the images")
        return images
    if (n := len(images.items)) < 2:
        raise UserError(f"{images.name}: one image has no covariance")
    widths = [x.shape[1] for x in extractor(torch.tensor(images.first[None]))]
    moments = Moments(widths[0], extractor.device)
    kept = [torch.zeros(n, width, device=extractor.device) for width in widths] if keep else []
    mine = range(distributed.rank(), n, distributed.world_size())
    size = batch_size or (256 if extractor.device.type == "cuda" else 16)
    with distributed.progress(len(mine), "img", desc=images.name[-40:]) as bar:
        for part, batch in images.batches(mine, size):
            found = [x[:len(part)] for x in extractor(batch)]
            moments.add(found[0])
            for store, x in zip(kept, found, strict=False):
                store[list(part)] = x.float()
            bar.update(len(part))
    kept = zip(("features", "logits"), map(distributed.all_reduce, kept), strict=False)
    return replace(moments.statistics(images.name), **{name: x.cpu() for name, x in kept})

def read_statistics(name, arrays, n=None):
    """Statistics of arrays mu (d,) and sigma (d,d), of n images. UserError: they are none."""
    mu, sigma = (np.asarray(arrays.get(key)) for key in ("mu", "sigma"))
    if not (mu.dtype.kind == sigma.dtype.kind == "f" and mu.ndim == 1 and len(mu)
            and sigma.shape == (len(mu), len(mu)) and np.isfinite(mu).all()
            and np.allclose(sigma, sigma.T)):       # NaN and Inf are not close either.
        raise UserError(f"{name}: mu {mu.dtype} {list(mu.shape)} and sigma {sigma.dtype} "
                        f"{list(sigma.shape)} are no finite mean and symmetric covariance (d,d)")
    return Statistics(str(name), mu.astype(np.float64), sigma.astype(np.float64), n)

def open_set(path, limit=None):
    """The ImageSet of a folder, sample.py's too, or an .npz; or the Statistics that it holds."""
    if Path(path).is_dir():
        folder = Path(path).parent if Path(path).name == "images" else path     # Of sample.py?
        if (made := features.read_settings(folder).get("n_samples")) and isinstance(made, int):
            return features.open_samples(folder, range(min(made, limit or made)))
        return ImageSet(str(path), image_files.find_images(path), limit)
    if {"mu", "sigma"} <= set(arrays := files.read_npz(path)):
        return read_statistics(path, arrays)
    return ImageSet(str(path), image_files.images_in(path, arrays), limit)

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1-mu2|² + Tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) of two Gaussians (Heusel 2017).
    sigma1 sigma2 has the eigenvalues of the symmetric Lᵀ sigma2 L where L Lᵀ = sigma1: the trace of
    the root is the sum of their roots. All float64. Raises UserError for what is no covariance."""
    try:
        L = np.linalg.cholesky(sigma1)
    except np.linalg.LinAlgError:           # n <= d leaves sigma singular: L (d,r) of its rank r.
        values, vectors = np.linalg.eigh(sigma1)
        values = not_negative(values)
        keep = values > values[-1] * len(values) * np.finfo(float).eps
        L = vectors[:, keep] * np.sqrt(values[keep])
    root = np.sqrt(not_negative(np.linalg.eigvalsh(L.T @ sigma2 @ L))).sum()
    found = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root
    return max(float(found), 0.0)           # Rounding may leave less.

def not_negative(values):
    """Rising eigenvalues, those that rounding brought below 0 at 0. UserError for negative ones."""
    if len(values) and values[0] < -1e-3 * abs(values[-1]):
        raise UserError(f"sigma has a negative eigenvalue, {values[0]:.3g}, and is no covariance")
    return values.clip(min=0)

def distance(a, b):
    """frechet_distance of two Statistics. Raises UserError where their dimensions differ."""
    if a.mu.shape != b.mu.shape:
        raise UserError(f"{a.name} has statistics of {len(a.mu)} dimensions, {b.name} of "
                        f"{len(b.mu)}: both must be of the same features, shape and colours")
    try:
        return frechet_distance(a.mu, a.sigma, b.mu, b.sigma)
    except (UserError, np.linalg.LinAlgError) as e:
        raise UserError(f"{a.name} against {b.name}: {e}") from None

def other_metrics(names, samples, reference, extractor):
    """{metric: value} of METRICS, by torch-fidelity, on the kept features of two Statistics."""
    if not names:
        return {}
    from torch_fidelity import metric_isc, metric_kid, metric_prc
    found, pair, n = {}, (samples.features, reference.features), min(samples.n, reference.n)
    if "kid" in names:
        kid = metric_kid.kid_features_to_metric(*pair, kid_subset_size=min(1000, n), verbose=False)
        found["KID"] = kid["kernel_inception_distance_mean"]
    if "is" in names:
        if samples.n < 10:
            raise UserError("the Inception score is the mean of 10 parts: it needs 10 images")
        found["IS"] = metric_isc.isc_features_to_metric(samples.logits)["inception_score_mean"]
    if "precision" in names or "recall" in names:
        if n < 4:
            raise UserError("precision and recall look at the 3rd neighbour: they need 4 images")
        both = metric_prc.prc_features_to_metric(*pair, save_cpu_ram=True, verbose=False)
        found |= {name: both[name] for name in ("precision", "recall") if name in names}
    return {extractor.metric(name): value for name, value in found.items()}

def reference(config, images, extractor, batch_size=None, keep=False):
    """The Statistics of a training set, images (N,C,H,W) uint8: those in cache_dir/fid, named by a
    hash of all that they are of; else, or to `keep` features, computed and left there."""
    about = {"dataset": config.dataset, "split": "train", "n": len(images),
             "images_sha256": data.digest(images), "features": extractor.name,
             "weights_sha256": extractor.sha256, "version": extractor.version}
    name, digest = f"{config.dataset} train", hashlib.sha256(json.dumps(about).encode()).hexdigest()
    file = f"{config.dataset}-train-{extractor.name}-{digest[:16]}.npz"
    path = Path(config.cache_dir) / "fid" / file if config.cache_dir else None
    known = distributed.on_rank0(files.read_cache, path, "mu", "sigma", "metadata")
    if known and not keep:
        return read_statistics(name, known, len(images))
    stats = compute(ImageSet(name, images), extractor, batch_size, keep)
    if not known and distributed.rank() == 0:
        files.write_cache(path, mu=stats.mu, sigma=stats.sigma, metadata=json.dumps(about))
    return stats
