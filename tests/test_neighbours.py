"""fid.py --neighbours: the samples nearest to training images, and how many are too near."""

import re
import shutil
import numpy as np
import pytest
import torch
from conftest import refused, results, run, succeed, tiny_config
from PIL import Image
from edm2 import data, features, frechet
from edm2.config import load_config
from edm2.features import Extractor, ImageSet
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
    their neighbour the image itself; the shares are those of all pairs, of samples."""
    (flags, folder), config = sampled, load_config(trained / "config.yaml")
    train, test = (data.load(config, train=which)[0].numpy() for which in (True, False))
    for i, image in ((5, train[100]), (11, train[200, :, :, ::-1])):
        Image.fromarray(image[0]).save(features.sample_path(folder, i))
    out = succeed("fid.py", *flags, "--features", "pixels", "--neighbours", 4)
    assert f"2 of {N} samples are training images" in out
    samples = np.stack([np.asarray(Image.open(features.sample_path(folder, i)))[None]
                        for i in range(N)])
    both = np.concatenate([train, train[..., ::-1]])
    of_samples, of_test = distances(samples, both), distances(test, both)
    assert sorted(np.argsort(of_samples)[:2]) == [5, 11]
    less, equal = (np.mean(f(of_samples[:, None], of_test[None])) for f in (np.less, np.equal))
    fd, nearer, nearest = results(folder.parents[1])
    assert [one["figure"] for one in (fd, nearer, nearest)] == [
        f"{name}(pixels)" for name in ("FD", "nearer", "nearest")] and nearer["n"] == N
    assert nearer["value"] == pytest.approx(100 * (less + equal / 2), abs=0.05)
    assert nearest["value"] == pytest.approx(100 * np.mean(of_samples < np.quantile(of_test, 0.01)))
    assert f"nearer(pixels) {nearer['value']:.4g} %" in out and nearest["value"] > 8

    # Rows of a distance, the sample, a gap, neighbours; enlarged fourfold.
    path = re.search(r"their nearest training images: (\S+)", out)[1]
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
    statistics = frechet.compute(ImageSet("train", images), extractor, keep=True)
    training = Training(config, images, statistics, extractor)
    assert len(training.features) == 2 * len(images) and len(training.test_distances) == 360
    every, numbers = training.nearest(training.features, 2)     # In chunks.
    assert numbers[:, 0].tolist() == list(range(2 * len(images))) and (every[:, 0] == 0).all()
    assert (every[:, 1] > 0).all()

def test_a_network_of_features_knows_an_image_again(inception_weights):
    """Elsewhere in a batch: its features are as good as equal."""
    extractor = Extractor("inception", CPU, *inception_weights)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), np.uint8))
    a, b = (extractor(images[order])[0] for order in ([0, 1, 2, 3], [4, 5, 3, 0]))
    assert ((a[[0, 3]] - b[[3, 2]]).norm(dim=1) <= 1e-5 * a[[0, 3]].norm(dim=1)).all()
    assert ((a[1:3] - b[:2]).norm(dim=1) > 1e-2 * a[1:3].norm(dim=1)).all()

@pytest.mark.slow
def test_two_processes_find_the_same(sampled):
    flags, folder = sampled
    pictures = []
    for processes in (None, 2):
        succeed("fid.py", *flags, "--features", "pixels", "--neighbours", 4, processes=processes)
        pictures.append((folder / "neighbours-pixels.png").read_bytes())
    one, two = [line for line in results(folder.parents[1]) if line["figure"] == "nearer(pixels)"]
    assert one["value"] == two["value"] and (one["processes"], two["processes"]) == (1, 2)
    assert pictures[0] == pictures[1]

def test_more_seeds_and_more_than_there_are(sampled):
    """Of several seeds the worst counts; no more samples are shown than there are."""
    flags, folder = sampled
    succeed("sample.py", *flags, "--n_samples", N, "--seed", 1)
    succeed("fid.py", *flags, "--features", "pixels", "--neighbours", 99, "--repeat", 2)
    line = next(line for line in results(folder.parents[1]) if line["figure"] == "nearer(pixels)")
    assert line["value"] == max(line["values"]) and len(line["values"]) == 2
    for path in (folder, folder.with_name("3_seed1")):
        assert Image.open(path / "neighbours-pixels.png").height == N * 34 + 2

def test_without_a_test_set(tmp_path):
    """A flat set of images: the picture and the copies, and a line that says what is missing."""
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "train.npz", images)
    flags = ("--config", tiny_config(tmp_path, dataset="folder", data_root=str(tmp_path),
                                     batch_size=5, n_epoch=1, flip=False))
    succeed("train.py", *flags)
    succeed("sample.py", *flags, "--n_samples", 3)
    folder = tmp_path / "run" / "samples" / "0"
    Image.fromarray(images[4, :, :, 0]).save(features.sample_path(folder, 1))
    done = run("fid.py", *flags, "--features", "pixels", "--neighbours", 2)
    assert done.returncode == 0 and "1 of 3 samples are training images" in done.stdout
    assert "without a test set" in done.stderr and (folder / "neighbours-pixels.png").exists()
    assert [line["figure"] for line in results(tmp_path / "run")] == ["FD(pixels)"]

def test_what_cannot_be(sampled):
    flags, folder = sampled
    refused("fid.py", folder, folder, "--neighbours", 4, words=["needs --config"])
    refused("fid.py", *flags, "--neighbours", 0, words=["neighbours"])
