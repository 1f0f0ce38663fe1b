"""fid.py against torch-fidelity, pytorch-fid and closed forms; as users run it; and what it refuses."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA, ROOT, needs_cifar10, run, succeed, tiny_config
from PIL import Image
from torch.utils.data import Dataset

import data
import features
import fid
import runtime
from runtime import UserError

# Images a set. The real size, FID_PARITY_N=2000, takes ten minutes on 2 CPU cores.
N = int(os.environ.get("FID_PARITY_N", 64))


class Tensors(Dataset):
    """Images as torch-fidelity takes them."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return torch.from_numpy(self.images[i])


def figures(stdout):
    """{figure: value} of what fid.py prints."""
    return {name: float(value) for name, value in re.findall(r"^(\S+) ([-\d.e]+): ", stdout, re.M)}


@needs_cifar10
@pytest.mark.slow
def test_figures_are_torch_fidelitys(tmp_path, inception_weights):
    """The same random weights on the same real images, each tool on its own from the pixels on."""
    from torch_fidelity import calculate_metrics
    path, sha256 = inception_weights
    images, _ = data.load_cifar10(DATA, train=True)
    sets = {"a": images[:N], "b": images[N:2 * N]}
    for name, part in sets.items():
        np.savez(tmp_path / f"{name}.npz", part.transpose(0, 2, 3, 1))
    out = succeed("fid.py", tmp_path / "a.npz", tmp_path / "b.npz", "--weights", path, "--weights_sha256", sha256,
                  "--metrics", "kid,is,precision,recall", timeout=3600)
    label = f"(inception-{sha256[:8]})"
    ours = {name.removesuffix(label): value for name, value in figures(out).items()}
    theirs = calculate_metrics(input1=Tensors(sets["a"]), input2=Tensors(sets["b"]), fid=True, kid=True, isc=True,
                               prc=True, kid_subset_size=min(N, 1000), feature_extractor="inception-v3-compat",
                               feature_extractor_weights_path=str(path),
                               cuda=False, batch_size=32, verbose=False, cache=False)
    print(ours, theirs)
    assert theirs["frechet_inception_distance"] > 1e-3
    assert ours["FD"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert ours["KD"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3, abs=1e-7)
    assert ours["IS"] == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    assert ours["precision"] == pytest.approx(theirs["precision"], abs=1.01 / N)
    assert ours["recall"] == pytest.approx(theirs["recall"], abs=1.01 / N)


# ----------------------------------------------------------------------------------------------------------------------
# The distance.

def moments(x):
    return x.mean(0), np.cov(x, rowvar=False)


def low_rank_distance(x, y):
    """The distance of two small sets without any root of a matrix: Tr (S1 S2)^1/2 = the singular values of X Yᵀ."""
    (mu1, s1), (mu2, s2) = moments(x), moments(y)
    X, Y = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y))
    return np.square(mu1 - mu2).sum() + s1.trace() + s2.trace() - 2 * np.linalg.svd(X @ Y.T, compute_uv=False).sum()


def test_distance_of_commuting_gaussians_is_the_closed_form():
    """Tr (S1 + S2 - 2 (S1 S2)^1/2) = sum (√a - √b)² where S1, S2 share their eigenvectors."""
    rng = np.random.default_rng(0)
    d = 2048
    Q = np.linalg.qr(rng.standard_normal((d, d)))[0]
    a = np.geomspace(10, 1e-7, d)
    b = rng.permutation(a)
    mu1, mu2 = rng.standard_normal((2, d)) / 10
    s1, s2 = ((Q * values) @ Q.T for values in (a, b))
    expected = np.square(mu1 - mu2).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert fid.frechet_distance(mu1, (s1 + s1.T) / 2, mu2, (s2 + s2.T) / 2) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n", [100, 3000])
def test_distance_of_a_set_to_itself_and_of_few_images(n):
    """n = 100 in 2048 dimensions leaves the covariances singular: still a real number, and the right one."""
    rng = np.random.default_rng(n)
    scale = np.geomspace(3, 1e-2, 2048)
    x, y = rng.standard_normal((2, n, 2048)) * scale + 0.4
    assert abs(fid.frechet_distance(*moments(x), *moments(x))) < 1e-4
    found = fid.frechet_distance(*moments(x), *moments(y))
    assert isinstance(found, float) and found == fid.frechet_distance(*moments(x), *moments(y))
    if n < 2048:
        assert found == pytest.approx(low_rank_distance(x, y), rel=1e-8)
        assert fid.frechet_distance(*moments(y), *moments(x)) == pytest.approx(found, rel=1e-8)


@needs_cifar10
def test_distance_is_pytorch_fids():
    """On the same pixel features of real images: 3 x 8 x 8 averages of CIFAR-10."""
    from pytorch_fid.fid_score import calculate_frechet_distance
    images, _ = data.load_cifar10(DATA, train=False)
    x = torch.nn.functional.avg_pool2d(torch.from_numpy(images).double(), 4).flatten(1).numpy() / 127.5 - 1
    a, b = moments(x[:2000]), moments(x[2000:4000])
    theirs = calculate_frechet_distance(*a, *b)
    assert theirs > 0.01 and fid.frechet_distance(*a, *b) == pytest.approx(theirs, rel=1e-5)


def test_a_constant_feature_does_no_harm():
    x = np.random.default_rng(0).standard_normal((500, 20))
    x[:, 7] = 3
    y = x * 1.5
    assert fid.frechet_distance(*moments(x), *moments(y)) == pytest.approx(
        np.square(moments(x)[0] - moments(y)[0]).sum() + 0.25 * moments(x)[1].trace(), rel=1e-9)
    assert np.linalg.matrix_rank(fid.factor(np.zeros((3, 3)))) == 0


# ----------------------------------------------------------------------------------------------------------------------
# Statistics.

@pytest.fixture
def one_process():
    return runtime.Runtime(0, 1, 0, 1, torch.device("cpu"))


def test_statistics_are_numpys(one_process):
    images = np.random.default_rng(0).integers(0, 256, (333, 3, 5, 4), np.uint8)
    found = fid.compute(features.array_images("x", images), features.Extractor("pixels", one_process), one_process,
                        batch_size=50, keep=True)
    x = images.reshape(333, -1) / 127.5 - 1
    assert found.n == 333 and np.abs(found.features.numpy() - x).max() < 1e-6
    assert np.abs(found.mu - x.mean(0)).max() < 1e-7 and np.abs(found.sigma - np.cov(x, rowvar=False)).max() < 1e-7


def test_features_that_are_not_finite_are_refused(one_process):
    extractor = features.Extractor("pixels", one_process)
    extractor.network = lambda images: (features.pixels(images) * np.inf,)
    with pytest.raises(UserError, match="NaN or Inf"):
        fid.compute(features.array_images("x", np.ones((9, 1, 2, 2), np.uint8)), extractor, one_process)


def test_large_images_are_averaged_down():
    x = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    expected = torch.nn.functional.avg_pool2d(x.float() / 127.5 - 1, 2).flatten(1)
    assert (features.pixels(x) - expected).abs().max() < 1e-6


MEMORY = """
import re
import numpy as np, torch
import features, fid, runtime
rt = runtime.Runtime(0, 1, 0, 1, torch.device("cpu"))
def peak():     # Not ru_maxrss, which begins with that of the process that started this one.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
class Cheap:
    weight = torch.randn(48, 2048)
    def __call__(self, images): return (images.flatten(1).float() @ self.weight,)
pixels = np.random.default_rng(0).integers(0, 256, (1000, 3, 4, 4), np.uint8)
torch.linalg.eigvalsh(torch.eye(64, dtype=torch.float64) @ torch.eye(64, dtype=torch.float64))
before = peak()
stats = fid.compute(features.Images("x", 50_000, lambda i: pixels[i % 1000]), Cheap(), rt)
assert stats.n == 50_000 and np.isfinite(fid.distance(stats, stats))
print("MB:", peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read memory from")
def test_statistics_of_50000_images_need_less_than_a_gigabyte():
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 30 < float(done.stdout.split("MB:")[1]) < 1000


# ----------------------------------------------------------------------------------------------------------------------
# As users run it.

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny digits run with samples of two epochs and two seeds, its config and save_dir."""
    folder = tmp_path_factory.mktemp("fid")
    path = tiny_config(folder, save_every=1)
    succeed("train.py", "--config", path)
    for args in (["--epoch", 0], ["--epoch", 1], ["--epoch", 1, "--seed", 1]):
        succeed("sample.py", "--config", path, "--n_samples", 30, *args)
    return path, folder / "run"


def lines(save_dir):
    return [json.loads(line) for line in (save_dir / "results.jsonl").read_text().splitlines()]


def test_scores_a_run(trained):
    """Epochs, seeds and metrics; the figures kept in results.jsonl and TensorBoard; the reference statistics once."""
    path, save_dir = trained
    (save_dir / "results.jsonl").unlink(missing_ok=True)
    args = ("fid.py", "--config", path, "--features", "pixels")
    first = run(*args)
    assert first.returncode == 0 and "n = 30 and n = 1,437" in first.stderr and "1/n" in first.stderr, first.stderr
    cache = path.parent / "cache" / "fid" / "digits-train-pixels.npz"
    about = json.loads(str(np.load(cache)["metadata"]))
    assert (about["n"], about["split"], about["features"]) == (1437, "train", "pixels")
    written = cache.stat().st_mtime_ns
    both = succeed(*args, "--epoch", "0,2", "--repeat", 1, "--metrics", "kid,precision,recall")
    assert figures(both)["FD(pixels)"] == figures(first.stdout)["FD(pixels)"]
    assert succeed(*args, "--epoch", "all").count("FD(pixels)") == 2
    out = succeed(*args, "--repeat", 2)
    assert "2 seeds" in out and cache.stat().st_mtime_ns == written
    kept = lines(save_dir)
    assert [(line["figure"], line["epoch"]) for line in kept] == [
        ("FD(pixels)", 1),
        *((f"{name}(pixels)", epoch) for epoch in (0, 1) for name in ("FD", "KD", "precision", "recall")),
        ("FD(pixels)", 0), ("FD(pixels)", 1), ("FD(pixels)", 1)]
    last = kept[-1]
    assert last["seeds"] == [0, 1] and len(set(last["values"])) == 2
    assert last["value"] == min(last["values"]) and last["mean"] == pytest.approx(sum(last["values"]) / 2)
    assert (last["n"], last["n_reference"], last["Mimg"], last["net_type"]) == (30, 1437, 2 * 1400 / 1e6, "UNetC")
    assert "fid.py --config" in last["command"] and last["device"].startswith("CPU") and last["seconds"] > 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(save_dir / "tensorboard" / "scores")).Reload().Scalars("FD(pixels)")
    assert {event.step for event in events} == {0, 1}


def test_two_processes_and_any_two_sets(trained, tmp_path):
    """The same statistics to 1e-8; folder, .npz of images and .npz of statistics compare with each other."""
    path, save_dir = trained
    values = []
    for processes in (None, 2):
        root = tmp_path / f"cache{processes}"
        succeed("fid.py", "--config", path, "--features", "pixels", "--set", f"cache_dir={root}", processes=processes)
        values.append(np.load(root / "fid" / "digits-train-pixels.npz"))
    for key in ("mu", "sigma"):
        assert np.abs(values[0][key] - values[1][key]).max() < 1e-8 * np.abs(values[0][key]).max()
    one, two = lines(save_dir)[-2:]
    assert one["processes"] == 1 and two["processes"] == 2 and two["value"] == pytest.approx(one["value"], rel=1e-8)
    samples = save_dir / "samples" / "1" / "images"
    pixels = [np.asarray(Image.open(p))[..., None] for p in sorted(samples.iterdir())]
    np.savez(tmp_path / "images.npz", np.stack(pixels))
    reference = tmp_path / "cache2" / "fid" / "digits-train-pixels.npz"
    for a, b in ((samples, reference), (tmp_path / "images.npz", reference), (reference, samples.parent)):
        found = figures(succeed("fid.py", a, b, "--features", "pixels"))
        assert found["FD(pixels)"] == pytest.approx(one["value"], rel=1e-5)
    same = figures(succeed("fid.py", samples, tmp_path / "images.npz", "--features", "pixels"))
    assert abs(same["FD(pixels)"]) < 1e-6


def test_a_cache_that_does_not_match_is_computed_again(trained, tmp_path):
    path, _ = trained
    args = ("fid.py", "--config", path, "--features", "pixels", "--set", f"cache_dir={tmp_path}")
    first = figures(succeed(*args))
    cache = tmp_path / "fid" / "digits-train-pixels.npz"
    arrays = dict(np.load(cache))
    assert run(*args).stderr.count("computing them again") == 0
    about = json.loads(str(arrays["metadata"]))
    changes = {"images_sha256": {"images_sha256": "0" * 64}, "version": {"version": "0"}, "whole": None}
    for word, change in changes.items():
        if change:
            np.savez(cache, **arrays | {"mu": arrays["mu"] + 9, "metadata": json.dumps(about | change)})
        else:
            cache.write_bytes(cache.read_bytes()[:1000])
        done = run(*args)
        assert "computing them again" in done.stderr and word in done.stderr
        assert figures(done.stdout) == first
    assert run(*args).stderr.count("computing them again") == 0


@pytest.mark.slow
def test_inception_in_two_processes(inception_weights, tmp_path):
    """Statistics of random-weight features, of 40 images, agree between 1 and 2 processes to 1e-8."""
    path, sha256 = inception_weights
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (40, 3, 32, 32), np.uint8))
    script = tmp_path / "stats.py"
    script.write_text(f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import numpy as np, features, fid, runtime
def main():
    rt = runtime.start()
    extractor = features.Extractor("inception", rt, {str(path)!r}, {sha256!r})
    stats = fid.compute(features.array_images("x", np.load({str(tmp_path / 'images.npy')!r})), extractor, rt)
    if rt.is_main:
        np.savez({str(tmp_path)!r} + f"/{{rt.world_size}}.npz", mu=stats.mu, sigma=stats.sigma)
runtime.command(main)()
""")
    for processes in (None, 2):
        succeed(script, processes=processes)
    one, two = (np.load(tmp_path / f"{n}.npz") for n in (1, 2))
    for key in ("mu", "sigma"):
        assert np.abs(one[key] - two[key]).max() <= 1e-8 * np.abs(one[key]).max()


# ----------------------------------------------------------------------------------------------------------------------
# What it refuses: one line, exit code 2, nothing written.

def refused(*args, words):
    done = run("fid.py", *args)
    message = [line for line in done.stderr.splitlines() if line.strip() and "img/s" not in line]
    assert done.returncode == 2 and len(message) == 1 and message[0].startswith("fid.py: error: "), done.stderr
    for word in words:
        assert str(word) in message[0], message[0]


def pngs(folder, n=4, size=(8, 8), mode="RGB"):
    folder.mkdir()
    for i in range(n):
        Image.new(mode, size, i).save(folder / f"{i}.png")
    return folder


def test_weights_are_refused(inception_weights, trained, tmp_path):
    path, sha256 = inception_weights
    config, save_dir = trained
    before = sorted(save_dir.rglob("*"))
    refused("--config", config, "--weights", path, words=[path, sha256, features.WEIGHTS["inception"][2], "SHA-256"])
    refused("--config", config, "--weights", tmp_path / "no.pth", words=["no.pth", "no such file"])
    evil = tmp_path / "evil.pth"
    torch.save(Evil(tmp_path / "ran"), evil)
    digest = hashlib.sha256(evil.read_bytes()).hexdigest()
    refused("--config", config, "--weights", evil, "--weights_sha256", digest, words=["cannot load", evil])
    assert not (tmp_path / "ran").exists() and sorted(save_dir.rglob("*")) == before


class Evil:
    """What runs code where a pickle is loaded without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", list(features.WEIGHTS))
def test_neither_file_nor_network(tmp_path, name, monkeypatch):
    """The file, its address, its checksum and where to put it; nothing left behind."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    a = pngs(tmp_path / "a")
    files, url, sha256, _ = features.WEIGHTS[name]
    refused(a, a, "--features", name, words=[files[0], url, sha256, tmp_path / "torch" / "hub" / "checkpoints"])
    assert [p for p in tmp_path.rglob("*") if p.is_file() and p.parent != a] == []


def test_a_download_is_checked(tmp_path, monkeypatch):
    """A file that arrives damaged is refused and not kept."""
    (tmp_path / "weights.pth").write_bytes(b"not these")
    with pytest.raises(UserError, match="invalid hash"):
        features.download("inception", (tmp_path / "weights.pth").as_uri(), tmp_path / "cache" / "w.pth", "6726825d")
    assert list((tmp_path / "cache").iterdir()) == []


def test_images_are_refused(tmp_path):
    a, pixels = pngs(tmp_path / "a"), ("--features", "pixels")
    refused(a, tmp_path / "no", *pixels, words=["no", "no such file or folder"])
    refused(a, pngs(tmp_path / "empty", 0), *pixels, words=["empty", "no images"])
    refused(a, pngs(tmp_path / "one", 1), *pixels, words=["one", "covariance"])
    damaged = pngs(tmp_path / "damaged")
    (damaged / "2.png").write_bytes((damaged / "2.png").read_bytes()[:50])
    refused(a, damaged, *pixels, words=[damaged / "2.png", "not a whole image"])
    Image.new("RGB", (9, 8)).save(damaged / "2.png")
    refused(a, damaged, *pixels, words=[damaged / "2.png", "one size"])
    refused(a, pngs(tmp_path / "large", size=(16, 16)), *pixels, words=["192 dimensions", "768", "large"])
    refused(a, a, *pixels, "--metrics", "kid,recall", "--n_samples", 3, words=["4 images"])
    (damaged / "2.png").write_bytes(b"")
    done = run("fid.py", a, damaged, *pixels, processes=2)
    assert done.returncode != 0 and "damaged/2.png is not a whole image" in done.stderr
    assert 'fid.py", line' not in done.stderr


def test_npz_are_refused(tmp_path):
    a, pixels = pngs(tmp_path / "a"), ("--features", "pixels")
    path = tmp_path / "b.npz"
    np.savez(path, np.zeros((9, 8, 8, 3), np.uint8))
    whole = path.read_bytes()
    for content, word in ((whole[:-200], "not a whole"), (whole[:40], "not a whole"), (b"", "not a whole"),
                          (b"PK" + bytes(500), "not a whole"), (b"mu", "not a whole")):
        path.write_bytes(content)
        refused(a, path, *pixels, words=[path, word])
    for arrays, word in (({"x": np.zeros((9, 8, 8, 3))}, "float64"), ({"x": np.array([{}])}, "not a whole"),
                         ({"mu": np.zeros(5), "sigma": np.zeros((5, 4))}, "covariance"),
                         ({"mu": np.zeros(5), "sigma": np.full((5, 5), np.nan)}, "covariance"),
                         ({"mu": np.zeros(5), "sigma": np.triu(np.ones((5, 5)))}, "covariance"),
                         ({"mu": np.zeros(5), "sigma": np.eye(5)}, "5")):
        np.savez(path, **arrays)
        refused(a, path, *pixels, words=[path, word])
    np.savez(path, mu=np.zeros(5), sigma=np.diag([1.0, 1, 1, 1, -1]))
    refused(path, path, words=["negative eigenvalue"])
    refused(a, path, "--metrics", "kid", words=[path, "images themselves"])


def test_flipped_bytes_of_an_npz_are_found(tmp_path):
    """Each of 200 damages is read as what it was or refused; none ends otherwise."""
    path, rng = tmp_path / "b.npz", np.random.default_rng(0)
    arrays = {"mu": np.zeros(3), "sigma": np.eye(3), "metadata": np.array('{"n": 7}')}
    np.savez(path, **arrays)
    whole, refusals = path.read_bytes(), 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            found = features.read_npz(path)
            assert all(np.array_equal(found[name], array) for name, array in arrays.items() if name in found)
        except UserError as e:
            assert str(path) in str(e)
            refusals += 1
    assert refusals > 100


def test_no_images_of_a_checkpoint(trained, tmp_path):
    """The error is the command to run, and it runs."""
    config, save_dir = trained
    done = run("fid.py", "--config", config, "--features", "pixels", "--repeat", 3, "--n_samples", 2)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    command = done.stderr.partition("make them with: ")[2].split()
    assert " ".join(command) == f"python sample.py --config {config} --epoch 1 --seed 2 --n_samples 2"
    succeed(*command[1:])
    assert "3 seeds" in succeed("fid.py", "--config", config, "--features", "pixels", "--repeat", 3, "--n_samples", 2)
    refused("--config", config, "--n_samples", "40", "--features", "pixels",
            words=["30 images", "000030.png", "--n_samples 40"])
    refused("--config", config, "--set", "net_type=UNetE", "--features", "pixels", words=["net_type", "UNetE"])
    refused("--config", config, "--epoch", "7", "--features", "pixels", words=["no checkpoint of epoch 7", "0, 1"])
    refused("--config", config, "--images", tmp_path, "--features", "pixels", words=["settings.json"])
    shutil.copytree(save_dir / "samples" / "1_seed1", tmp_path / "few")
    (save_dir / "samples" / "1_seed1" / "images" / "000000.png").unlink()
    refused("--config", config, "--features", "pixels", "--repeat", 2, words=["29 images", "000000.png", "--seed 1"])
    out = succeed("fid.py", "--config", config, "--images", tmp_path / "few", "--features", "pixels")
    assert "epoch 1" in out and lines(save_dir)[-1]["seeds"] == [1]


def test_images_of_another_checkpoint(trained, tmp_path):
    config, save_dir = trained
    copy = tmp_path / "run"
    shutil.copytree(save_dir, copy)
    shutil.copy(copy / "ckpts" / "model_0.pth", copy / "ckpts" / "model_1.pth")
    refused("--config", config, "--set", f"save_dir={copy}", "--features", "pixels", words=["another checkpoint"])


@pytest.mark.parametrize("args", [[], ["a"], ["a", "b", "c"], ["a", "b", "--metrics", "fid"],
                                  ["a", "b", "--features", "pixels", "--metrics", "is"], ["a", "b", "--repeat", "0"],
                                  ["a", "b", "--epoch", "3"], ["a", "b", "--set", "n_epoch=3"]])
def test_arguments_are_refused(args):
    done = run("fid.py", *args)
    assert done.returncode == 2 and "error: " in done.stderr and "Traceback" not in done.stderr
