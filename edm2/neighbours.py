"""The training images that samples come nearest to: has the network learned them by heart?"""

from pathlib import Path
import numpy as np
import torch
from edm2 import data, distributed, frechet, image_files
from edm2.features import ImageSet

N_BESIDE = 6    # Training images that are shown beside a sample.

class Training:
    """The training images of a Config, (N,C,H,W) uint8, mirrored ones too where it flips, with
    their features (N,d), and how far test images are from them, (m,). Raises UserError: there is
    no test set. All processes take part."""
    def __init__(self, config, images, extractor, batch_size=None):
        with distributed.rank0_first():
            test, _ = data.load(config, train=False)
        mirrored = [images.flip(-1)] if config.flip or config.augment else []
        self.images = torch.cat([images, *mirrored])
        sets = (ImageSet(f"{config.dataset} {name}", part) for name, part in (
            ("train, mirrored too" if mirrored else "train", self.images), ("test", test)))
        self.features, of_test = (frechet.compute(one, extractor, batch_size, keep=True).features
                                  for one in sets)
        self.test_distances = self.nearest(of_test)[0][:, 0] if distributed.rank() == 0 else None

    def nearest(self, features, k=1):
        """How far features (n,d) are from those of the k nearest images, (n,k), rising, and which
        these are, (n,k)."""
        from sklearn.neighbors import NearestNeighbors  # Slow to import.
        search = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(self.features)
        numbers = search.kneighbors(features, return_distance=False)
        columns = [(self.features[i] - features).norm(dim=1) for i in numbers.T]
        return torch.stack(columns, dim=1).numpy(), numbers     # Anew: of equal ones exactly 0.

def compare(samples, features, training, extractor, n_shown):
    """Draw the n_shown samples of an ImageSet of sample.py that are nearest to training images,
    beside these; print, and return as {metric: value}, how often a sample is nearer to a training
    image than a test image is, in per cent of all pairs (Mann-Whitney; arXiv 2004.05675)."""
    from scipy.stats import mannwhitneyu
    distances, of_test = training.nearest(features)[0][:, 0], training.test_distances
    pairs = len(distances) * len(of_test)
    share = float(100 * mannwhitneyu(of_test, distances).statistic / pairs)
    shown, k = np.argsort(distances, kind="stable")[:n_shown], min(N_BESIDE, len(training.images))
    _, numbers = training.nearest(features[shown], k)
    rows = [torch.tensor(samples.read(samples.items[i])) for i in shown]
    gap = torch.full_like(rows[0], 128)
    rows = torch.stack([image for row, beside in zip(rows, numbers, strict=True)
                        for image in (row, gap, *training.images[beside])])
    picture = image_files.grid(rows, k + 2, [f"{distances[i]:.3g}" for i in shown])
    path = Path(samples.name) / f"neighbours-{extractor.label}.png"
    image_files.save_png(picture, path)
    metric, copies = extractor.metric("nearer"), (distances <= 1e-4 * np.median(of_test)).sum()
    print(f"{metric} {share:.4g} %: of the pairs of one of {len(distances):,} samples and one of "
          f"{len(of_test):,} test images, those whose sample is nearer to a training image (50: as "
          f"near); {copies:,} samples are training images (distance 0); the nearest: {path}")
    return {metric: share}
