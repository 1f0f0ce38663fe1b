"""fid.py --neighbours: the samples nearest to training images, and how many are too near."""

import re
import shutil
import numpy as np
import pytest
import torch
from conftest import refused, results, succeed
from PIL import Image
from edm2 import data, features
from edm2.config import load_config
from edm2.features import Extractor
from edm2.neighbours import Training

N = 24
CPU = torch.device("cpu")

@pytest.fixture
def sampled(trained, tmp_path):
    """The flags for a copy of the trained run, which flips, and its folder of N samples."""
    copy = shutil.copytree(trained / "run", tmp_path / "run")
    flags = ("--config", trained / "config.yaml", "--set", f"save_dir={copy}")
    succeed("sample.py", *flags, "--n_samples", N)
    return flags, copy / "samples" / "3"

def distances(a, b):
    """How far each of a (n,...) is from the nearest of b, by definition."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) / 127.5 for x in (a, b))
    return np.sqrt(np.square(a[:, None] - b[None]).sum(-1).min(1))

def test_copies_are_found_and_shown(trained, sampled):
    """A training image and a mirrored one among the samples: at distance 0, first in the picture,
    their neighbour the image itself; the share is that of all pairs."""
    (flags, folder), config = sampled, load_config(trained / "config.yaml")
    train, test = (data.load(config, train=which)[0].numpy() for which in (True, False))
    for i, image in ((5, train[100]), (11, train[200, :, :, ::-1])):
        Image.fromarray(image[0]).save(features.sample_path(folder, i))
    out = succeed("fid.py", *flags, "--features", "pixels", "--neighbours", 4)
    assert "2 samples are training images" in out
    samples = np.stack([np.asarray(Image.open(features.sample_path(folder, i)))[None]
                        for i in range(N)])
    both = np.concatenate([train, train[..., ::-1]])
    of_samples, of_test = distances(samples, both), distances(test, both)
    assert sorted(np.argsort(of_samples)[:2]) == [5, 11]
    less, equal = (np.mean(f(of_samples[:, None], of_test[None])) for f in (np.less, np.equal))
    line = results(folder.parents[1])[-1]
    assert line["figure"] == "nearer(pixels)" and line["n"] == N
    assert line["value"] == pytest.approx(100 * (less + equal / 2), abs=0.05)
    assert f"nearer(pixels) {line['value']:.4g} %" in out

    # Rows of a distance, the sample, a gap, neighbours; enlarged fourfold.
    path = re.search(r"the nearest: (\S+)", out)[1]
    picture = np.asarray(Image.open(path))[:, -(8 * 34 + 2):, 0]
    tiles = [[picture[2 + 34 * row:34 * row + 34, 2 + 34 * column:34 * column + 34:][:32:4, :32:4]
              for column in range(8)] for row in range(4)]
    assert picture.shape[0] == 4 * 34 + 2
    for row, i in zip(tiles, np.argsort(of_samples, kind="stable"), strict=False):
        assert np.array_equal(row[0], samples[i, 0]) and (row[1] == 128).all()
        nearest = distances(row[2][None], samples[i:i + 1])
        assert nearest == pytest.approx(of_samples[i], abs=1e-4)
        beside = [distances(tile[None], samples[i:i + 1])[0] for tile in row[2:]]
        assert beside == sorted(beside)
    assert all(np.array_equal(row[0], row[2]) for row in tiles[:2])
    assert not np.array_equal(tiles[3][0], tiles[3][2])

def test_an_image_is_its_own_neighbour(trained):
    """Also a mirrored one, at distance 0; the second nearest is another."""
    config, extractor = load_config(trained / "config.yaml"), Extractor("pixels", CPU)
    images, _ = data.load(config)
    training = Training(config, images, extractor)
    assert len(training.features) == 2 * len(images) and len(training.test_distances) == 360
    found, numbers = training.nearest(training.features[[3, 1440]], 2)
    assert numbers[:, 0].tolist() == [3, 1440] and (found[:, 0] == 0).all()
    assert (found[:, 1] > 0).all()

def test_a_network_of_features_knows_an_image_again(inception_weights):
    """Elsewhere in a batch: its features are as good as equal."""
    extractor = Extractor("inception", CPU, *inception_weights)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), np.uint8))
    a, b = (extractor(images[order])[0] for order in ([0, 1, 2, 3], [4, 5, 3, 0]))
    apart = (a[1:3] - b[:2]).norm(dim=1).median()
    assert (a[0] - b[3]).norm() < 1e-4 * apart and (a[3] - b[2]).norm() < 1e-4 * apart

@pytest.mark.slow
def test_two_processes_find_the_same(sampled):
    flags, folder = sampled
    for processes in (None, 2):
        succeed("fid.py", *flags, "--features", "pixels", "--neighbours", 4, processes=processes)
    one, two = [line for line in results(folder.parents[1]) if line["figure"] == "nearer(pixels)"]
    assert one["value"] == two["value"] and (one["processes"], two["processes"]) == (1, 2)

def test_what_cannot_be(trained, sampled, tmp_path):
    flags, folder = sampled
    refused("fid.py", folder, folder, "--neighbours", 4, words=["needs --config"])
    refused("fid.py", *flags, "--neighbours", 0, words=["neighbours"])
