"""The training images that samples come nearest to: has the network learned them by heart?"""

from pathlib import Path
import numpy as np
import torch
from edm2 import data, distributed, frechet, image_files
from edm2.errors import UserError, warn
from edm2.features import ImageSet

N_BESIDE = 6    # Training images that are shown beside a sample.
CHUNK = 256     # Images whose distances to all training images are in memory together.

class Training:
    """The training images of a Config, (N,C,H,W) uint8, by their features (N,d), those that their
    Statistics keep; where it flips, those of mirrored ones, too. test_distances: how far test
    images are from them, (m,), or None without a test set. All processes take part."""
    def __init__(self, config, images, statistics, extractor, batch_size=None):
        def features_of(kind, images):
            images = ImageSet(f"{config.dataset} {kind}", images)
            return frechet.compute(images, extractor, batch_size, keep=True).features

        self.images, self.test_distances = images, None
        features, mirrored = [statistics.features], config.flip or config.augment
        features += [features_of("train, mirrored", images.flip(-1))] if mirrored else []
        self.features = torch.cat(features).to(extractor.device)
        try:
            with distributed.rank0_first():
                test, _ = data.load(config, train=False)
            self.test_distances = self.nearest(features_of("test", test))[0][:, 0]
        except UserError as e:
            if distributed.rank() == 0:
                warn(f"{e}; --neighbours draws the picture, without a test set to compare with")

    def nearest(self, features, k=1):
        """How far features (n,d) are from those of the k nearest images, (n,k), rising, and which
        these are, (n,k); on the CPU."""
        features = features.to(self.features.device)
        distances = features.new_zeros(len(features), k)
        numbers = torch.zeros_like(distances, dtype=torch.int64)
        for start in range(distributed.rank() * CHUNK, len(features),
                           distributed.world_size() * CHUNK):
            part, rows = features[start:start + CHUNK], slice(start, start + CHUNK)
            numbers[rows] = torch.cdist(part, self.features).topk(k, largest=False).indices
            # Anew: cdist expands the square, which leaves more than 0 of equal ones.
            distances[rows] = (self.features[numbers[rows]] - part[:, None]).norm(dim=2)
        return [distributed.all_reduce(found).cpu() for found in (distances, numbers)]

def compare(samples, features, training, extractor, n_shown):
    """Draw the n_shown samples of an ImageSet of sample.py, of these features (n,d), that are
    nearest to training images, beside these. Print, and return as {metric: per cent}, how often a
    sample is nearer to a training image than a test image is: "nearer", of all pairs (Mann-Whitney;
    arXiv 2004.05675), and "nearest", the share of samples that are nearer than 99 % of the test
    images. All processes take part."""
    from scipy.stats import mannwhitneyu
    distances = training.nearest(features)[0][:, 0]
    shown = distances.argsort(stable=True)[:n_shown]
    beside = training.nearest(features[shown], min(N_BESIDE, len(training.features)))[1]
    if distributed.rank() > 0:
        return {}
    copies = (distances <= 1e-5 * features.norm(dim=1)).sum()
    path = draw(samples, training.images, distances, shown, beside, extractor.label)
    print(f"{copies:,} of {len(features):,} samples are training images (distance 0); the nearest "
          f"samples beside their nearest training images: {path}")
    if (of_test := training.test_distances) is None:
        return {}
    pairs, bound = len(distances) * len(of_test), np.quantile(of_test, 0.01)
    nearer = mannwhitneyu(of_test, distances, method="asymptotic").statistic / pairs
    found = {extractor.metric("nearer"): 100 * float(nearer),
             extractor.metric("nearest"): 100 * float((distances.numpy() < bound).mean())}
    meant = ("in pairs of a sample and a test image the sample is nearer; 50: as new images",
             "of the samples are nearer than 99 % of the test images; 1: as new images")
    for (metric, value), words in zip(found.items(), meant, strict=True):
        print(f"{metric} {value:.4g} %: {words} (n = {len(distances):,} and {len(of_test):,})")
    return found

def draw(samples, images, distances, shown, beside, label):
    """Write a picture of rows: distance, sample, a gap, training images; return its path."""
    rows = []
    for i, numbers in zip(shown.tolist(), beside.tolist(), strict=True):
        sample = torch.tensor(samples.read(samples.items[i]))
        rows += [sample, torch.full_like(sample, 128)]
        rows += [images[n] if n < len(images) else images[n - len(images)].flip(-1)
                 for n in numbers]
    path = Path(samples.name) / f"neighbours-{label}.png"
    names = [f"{distance:.3g}" for distance in distances[shown].tolist()]
    image_files.save_png(image_files.grid(torch.stack(rows), beside.shape[1] + 2, names), path)
    return path
