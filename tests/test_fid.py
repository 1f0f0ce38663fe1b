"""fid.py against torch-fidelity, pytorch-fid and closed forms; as users run it; what it refuses."""

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
import conftest
import numpy as np
import pytest
import torch
from conftest import DATA, ROOT, needs_cifar10, results, run, succeed, tiny_config
from PIL import Image
from torch.nn.functional import avg_pool2d
from torch.utils.data import Subset
from torchvision.datasets import CIFAR10
from edm2 import features, files
from edm2.errors import UserError
from edm2.frechet import compute, frechet_distance

N = int(os.environ.get("FID_PARITY_N", 64))     # Images a set; 2000 take ten minutes on 2 cores.
CPU, PIXELS = torch.device("cpu"), ("--features", "pixels")
refused = functools.partial(conftest.refused, "fid.py")

def scores(stdout):
    """{metric: value} of what fid.py prints."""
    return {name: float(value) for name, value in re.findall(r"^(\S+) ([-\d.e]+): ", stdout, re.M)}

def cifar10(train):
    """Real images (N,3,32,32) uint8."""
    return np.ascontiguousarray(CIFAR10(DATA, train).data.transpose(0, 3, 1, 2))

@needs_cifar10
@pytest.mark.slow
def test_scores_are_torch_fidelitys(tmp_path, inception_weights):
    """The same random weights on the same real images, each tool on its own from the pixels on."""
    from torch_fidelity import calculate_metrics
    (path, sha256), sets = inception_weights, [tmp_path / "a.npz", tmp_path / "b.npz"]
    images = cifar10(True)
    for file, part in zip(sets, (images[:N], images[N:2 * N]), strict=True):
        np.savez(file, part.transpose(0, 2, 3, 1))
    a, b = (Subset(torch.from_numpy(images), range(start, start + N)) for start in (0, N))
    out = succeed("fid.py", *sets, "--weights", path, "--weights_sha256", sha256,
                  "--metrics", "kid,is,precision,recall")
    ours = {name.partition("(")[0]: value for name, value in scores(out).items()}
    theirs = calculate_metrics(
        input1=a, input2=b, fid=True, isc=True, kid=True, prc=True, kid_subset_size=min(N, 1000),
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(path),
        cuda=False, batch_size=32, verbose=False, cache=False)
    print(ours, theirs)
    assert f"FD(inception-{sha256[:8]}) " in out        # Not by the published weights: no FID.
    assert theirs["frechet_inception_distance"] > 1e-3
    assert ours["FD"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert ours["KD"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3, abs=1e-7)
    assert ours["IS"] == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    for name in ("precision", "recall"):
        assert ours[name] == pytest.approx(theirs[name], abs=1.01 / N)

def test_features_are_pytorch_fids(inception_weights, monkeypatch):
    """By the same random weights; it resizes otherwise, and takes 255, not 256, for 1."""
    from pytorch_fid import inception
    monkeypatch.setattr(inception, "load_state_dict_from_url",
                        lambda *args, **how: torch.load(inception_weights[0], weights_only=True))
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 299, 299), np.uint8))
    with torch.no_grad():
        theirs = inception.InceptionV3([3]).eval()(images / 256)[0].flatten(1)
    ours, _ = features.Extractor("inception", CPU, *inception_weights)(images)
    assert ours.shape == (4, 2048) and theirs.std(0).mean() > 1e-3
    assert (ours - theirs).norm() < 1e-4 * (theirs - theirs.mean(0)).norm()

def moments(x):
    return x.mean(0), np.cov(x, rowvar=False)

@pytest.mark.slow
def test_distance_of_commuting_gaussians_is_the_closed_form():
    """Tr (S1 + S2 - 2 (S1 S2)^1/2) = sum (√a - √b)² where S1, S2 share their eigenvectors."""
    rng, d = np.random.default_rng(0), 1024
    Q = np.linalg.qr(rng.standard_normal((d, d)))[0]
    a = np.geomspace(10, 1e-7, d)
    b = rng.permutation(a)
    mu1, mu2 = rng.standard_normal((2, d)) / 10
    s1, s2 = ((Q * values) @ Q.T for values in (a, b))
    expected = np.square(mu1 - mu2).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    found = frechet_distance(mu1, (s1 + s1.T) / 2, mu2, (s2 + s2.T) / 2)
    assert found == pytest.approx(expected, rel=1e-6)
    x = rng.standard_normal((500, 20))
    x[:, 7] = 3                             # A constant feature does no harm.
    (mu, sigma), scaled = moments(x), moments(x * 1.5)
    assert frechet_distance(mu, sigma, *scaled) == pytest.approx(
        np.square(mu - scaled[0]).sum() + 0.25 * sigma.trace(), rel=1e-9)
    assert frechet_distance(mu, 0 * sigma, mu, sigma) == pytest.approx(sigma.trace())

@pytest.mark.parametrize("n", [100, 1000])
@pytest.mark.slow
def test_distance_of_a_set_to_itself_and_of_few_images(n):
    """n = 100 leaves singular covariances: Tr (S1 S2)^1/2 = the singular values of X Yᵀ / 99."""
    scale = np.geomspace(3, 1e-2, 600)
    x, y = np.random.default_rng(n).standard_normal((2, n, 600)) * scale + 0.4
    a, b = moments(x), moments(y)
    assert abs(frechet_distance(*a, *a)) < 1e-4
    found = frechet_distance(*a, *b)
    assert isinstance(found, float) and found == frechet_distance(*a, *b)
    if n < 600:
        roots = np.linalg.svd((x - a[0]) @ (y - b[0]).T / (n - 1), compute_uv=False)
        expected = np.square(a[0] - b[0]).sum() + a[1].trace() + b[1].trace() - 2 * roots.sum()
        assert found == pytest.approx(expected, rel=1e-8)
        assert frechet_distance(*b, *a) == pytest.approx(found, rel=1e-8)

@needs_cifar10
@pytest.mark.filterwarnings("ignore:The `disp` argument")
def test_distance_is_pytorch_fids():
    """By scipy's root of a matrix, on pixel features of real images: 3 x 8 x 8 averages."""
    from pytorch_fid.fid_score import calculate_frechet_distance
    images = torch.from_numpy(cifar10(False)[:4000])
    x = avg_pool2d(images.double(), 4).flatten(1).numpy() / 127.5 - 1
    a, b = moments(x[:2000]), moments(x[2000:])
    theirs = calculate_frechet_distance(*a, *b)
    assert theirs > 0.01 and frechet_distance(*a, *b) == pytest.approx(theirs, rel=1e-5)

def test_statistics_are_numpys():
    """Those of features that are not finite are refused; large images are averaged down."""
    images = np.random.default_rng(0).integers(0, 256, (333, 3, 5, 4), np.uint8)
    given, extractor = features.ImageSet("x", images), features.Extractor("pixels", CPU)
    found, x = compute(given, extractor, 50, keep=True), images.reshape(333, -1) / 127.5 - 1
    assert found.n == 333 and np.abs(found.features.numpy() - x).max() < 1e-6
    assert np.abs(found.mu - x.mean(0)).max() < 1e-7
    assert np.abs(found.sigma - np.cov(x, rowvar=False)).max() < 1e-7
    extractor.network = lambda images: (images.flatten(1) * np.inf,)
    with pytest.raises(UserError, match="x: the features are NaN or Inf"):
        compute(given, extractor)
    x = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    found, = features.Extractor("pixels", CPU)(x)
    assert (found - avg_pool2d(x.float() / 127.5 - 1, 2).flatten(1)).abs().max() < 1e-6

MEMORY = """
import numpy as np, torch
from edm2 import features, frechet
def peak():     # In MB. ru_maxrss would begin with that of the process that started this one.
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
cheap, weight = features.Extractor("pixels", torch.device("cpu")), torch.randn(48, 2048)
cheap.network = lambda images: (images.flatten(1).float() @ weight,)
pixels, before = np.random.default_rng(0).integers(0, 256, (50_000, 3, 4, 4), np.uint8), peak()
stats = frechet.compute(features.ImageSet("x", pixels), cheap, 256)
assert stats.n == 50_000 and np.isfinite(frechet.distance(stats, stats))
print("MB:", peak() - before)
"""

@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read memory from")
@pytest.mark.slow
def test_statistics_of_50000_images_need_less_than_a_gigabyte():
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 30 < float(done.stdout.split("MB:")[1]) < 1000

@pytest.fixture(scope="module")
def sampled(trained, tmp_path_factory):
    """The flags for a copy of the trained run, with samples of two epochs and seeds; its folder."""
    copy = shutil.copytree(trained / "run", tmp_path_factory.mktemp("fid") / "run")
    flags = ("--config", trained / "config.yaml", "--set", f"save_dir={copy}")
    for args in (["--epoch", 0], ["--epoch", 3, "--npz"], ["--epoch", 3, "--seed", 1]):
        succeed("sample.py", *flags, "--n_samples", 30, *args)
    return flags, copy

def test_scores_a_run(sampled, tmp_path):
    """Epochs, seeds, metrics; what is kept of it; the reference once, or where it does not fit."""
    flags, save_dir = sampled
    (save_dir / "results.jsonl").unlink(missing_ok=True)
    args = ("fid.py", *flags, *PIXELS, "--set", f"cache_dir={tmp_path}")
    first = run(*args)
    assert "n = 30 and n = 1,437" in first.stderr and "1/n" in first.stderr, first.stderr
    cache, = tmp_path.glob("fid/digits-train-pixels-*.npz")
    arrays, written, again = dict(np.load(cache)), cache.stat().st_mtime_ns, "made anew"
    about = json.loads(str(arrays["metadata"]))
    assert hashlib.sha256(str(arrays["metadata"]).encode()).hexdigest()[:16] in cache.name
    assert (about["n"], about["split"], about["features"]) == (1437, "train", "pixels")
    both = succeed(*args, "--epoch", "0,4", "--repeat", 1, "--metrics", "kid,precision,recall")
    assert scores(both)["FD(pixels)"] == scores(first.stdout)["FD(pixels)"]
    every = run(*args, "--epoch", "all")
    assert every.stdout.count("FD(pixels)") == 2 and every.stderr.count("no samples") == 2
    assert "2 seeds" in succeed(*args, "--repeat", 2) and cache.stat().st_mtime_ns == written
    kept = results(save_dir)
    assert [(line["figure"], line["epoch"]) for line in kept] == [
        ("FD(pixels)", 3), *((f"{name}(pixels)", epoch) for epoch in (0, 3)
                             for name in ("FD", "KD", "precision", "recall")),
        ("FD(pixels)", 0), ("FD(pixels)", 3), ("FD(pixels)", 3)]
    last, values = kept[-1], kept[-1]["values"]
    assert len(set(values)) == 2 and last["seconds"] > 0 and last["device"].startswith("CPU")
    assert last["value"] == min(values) and last["mean"] == pytest.approx(sum(values) / 2)
    assert (last["n"], last["n_reference"], last["Mimg"], last["net_type"], last["seeds"]) == (
        30, 1437, 4 * 1400 / 1e6, "UNetE", [0, 1]) and "fid.py --config" in last["command"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    board = EventAccumulator(str(save_dir / "tensorboard" / "scores")).Reload()
    assert {event.step for event in board.Scalars("FD(pixels)")} == {0, 3}
    # Its name says what it is of; a damaged one is computed again.
    whole = cache.read_bytes()
    for damaged in (whole[:1000], whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:]):
        cache.write_bytes(damaged)
        done = run(*args)
        assert again in done.stderr and str(cache) in done.stderr
        assert scores(done.stdout) == scores(first.stdout) and again not in run(*args).stderr

@pytest.mark.parametrize("name", ["pixels", pytest.param("inception", marks=pytest.mark.slow)])
def test_two_processes_and_any_two_sets(sampled, inception_weights, tmp_path, name):
    """Statistics agree to 1e-8; a folder, an .npz of images and one of statistics compare."""
    (flags, save_dir), how, epoch = sampled, PIXELS, "3"
    if name == "inception":                 # Of random weights; of a run on 12 images of noise.
        how = ("--weights", inception_weights[0], "--weights_sha256", inception_weights[1],
               "--n_samples", 12, "--batch_gpu", 4)
        noise = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), np.uint8)
        np.savez(tmp_path / "train.npz", noise)
        flags = ("--config", tiny_config(tmp_path, dataset="folder", data_root=str(tmp_path),
                                         batch_size=12, n_epoch=1))
        save_dir, epoch = tmp_path / "run", "0"
        succeed("train.py", *flags)
        succeed("sample.py", *flags, "--n_samples", 12, "--npz")
    for processes in (None, 2):
        cache = f"cache_dir={tmp_path / str(processes)}"
        succeed("fid.py", *flags, *how, "--set", cache, processes=processes)
    one, reference = (next(tmp_path.glob(f"{processes}/fid/*.npz")) for processes in (None, 2))
    for key in ("mu", "sigma"):
        a, b = np.load(one)[key], np.load(reference)[key]
        assert np.abs(a - b).max() <= 1e-8 * np.abs(a).max()
    one, two = results(save_dir)[-2:]
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["value"] == pytest.approx(one["value"], rel=1e-8)
    folder = save_dir / "samples" / epoch
    images, npz = folder / "images", folder / "samples.npz"
    every = name == "pixels"                # The same code: once is enough for slow features.
    for a, b in ((images, reference), (npz, reference), (reference, folder))[:3 if every else 1]:
        found, = scores(succeed("fid.py", a, b, *how)).values()
        assert found == pytest.approx(one["value"], rel=1e-5)
    same, = scores(succeed("fid.py", images, npz, *how)).values()
    assert abs(same) < 1e-6

def pngs(folder, n=4, size=(8, 8)):
    folder.mkdir()
    for i in range(n):
        Image.new("RGB", size, (i, 0, 0)).save(folder / f"{i}.png")
    return folder

def test_weights_are_refused(inception_weights, sampled, tmp_path):
    class Evil:                             # Runs code where a pickle is loaded without care.
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    (path, sha256), (flags, save_dir), evil = inception_weights, sampled, tmp_path / "evil.pth"
    before, published = sorted(save_dir.rglob("*")), features.NETWORKS["inception"][1]
    refused(*flags, "--weights", path, words=[path, sha256, published, "SHA-256"])
    refused(*flags, "--weights", tmp_path / "no.pth", words=[tmp_path / "no.pth", "No such file"])
    torch.save(Evil(), evil)
    refused(*flags, "--weights", evil, "--weights_sha256", files.sha256(evil),
            words=["cannot load", evil])
    assert not (tmp_path / "ran").exists() and sorted(save_dir.rglob("*")) == before

@pytest.mark.parametrize("name", list(features.NETWORKS))
def test_neither_file_nor_network(tmp_path, name, monkeypatch):
    """Address, checksum, where to put it; a file that arrives damaged is refused; none is left."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    a, (url, sha256, load) = pngs(tmp_path / "a"), features.NETWORKS[name]
    file = url.rpartition("/")[2]
    path, damaged = tmp_path / "torch" / "hub" / "checkpoints" / file, tmp_path / file
    refused(a, a, "--features", name, words=[url, sha256 or "unknown", path])
    damaged.write_bytes(b"not these")
    monkeypatch.setitem(features.NETWORKS, name, (damaged.as_uri(), sha256 or 64 * "0", load))
    refused(a, a, "--features", name, words=["invalid hash", path])
    assert [p for p in tmp_path.rglob("*") if p.is_file() and p.parent != a] == [damaged]

def test_images_are_refused(tmp_path):
    a, damaged, file = pngs(tmp_path / "a"), pngs(tmp_path / "bad"), tmp_path / "bad" / "2.png"
    refused(a, tmp_path / "no", *PIXELS, words=[tmp_path / "no", "o such file"])
    refused(a, pngs(tmp_path / "empty", 0), *PIXELS, words=["empty", "no images"])
    refused(a, pngs(tmp_path / "one", 1), *PIXELS, words=["one", "covariance"])
    file.write_bytes(file.read_bytes()[:50])
    refused(a, damaged, *PIXELS, words=[file, "not a whole image"])
    Image.new("RGB", (9, 8)).save(file)
    refused(a, damaged, *PIXELS, words=[file, "[3, 8, 9]", "[3, 8, 8]"])
    refused(a, pngs(tmp_path / "large", size=(16, 16)), *PIXELS, words=["192 dim", "768", "large"])
    refused(a, a, *PIXELS, "--metrics", "kid,recall", "--n_samples", 3, words=["4 images"])
    file.write_bytes(b"")
    done = run("fid.py", a, damaged, *PIXELS, processes=2)
    assert done.returncode != 0 and f"{file} is not a whole image" in done.stderr
    assert 'fid.py", line' not in done.stderr

def test_npz_are_refused(tmp_path):
    a, path, five = pngs(tmp_path / "a"), tmp_path / "b.npz", np.zeros(5)
    np.savez(path, np.zeros((9, 8, 8, 3), np.uint8))
    whole = path.read_bytes()
    for content in (whole[:-200], whole[:40], b"", b"PK" + bytes(500), b"mu"):
        path.write_bytes(content)
        refused(a, path, *PIXELS, words=[path, "not a whole"])
    for arrays, word in (({"x": np.zeros((9, 8, 8, 3))}, "float64"),
                         ({"x": np.array([{}])}, "not a whole"),
                         ({"mu": five, "sigma": np.zeros((5, 4))}, "covariance"),
                         ({"mu": five, "sigma": np.full((5, 5), np.nan)}, "covariance"),
                         ({"mu": five, "sigma": np.triu(np.ones((5, 5)))}, "covariance"),
                         ({"mu": five, "sigma": np.eye(5)}, "5")):
        np.savez(path, **arrays)
        refused(a, path, *PIXELS, words=[path, word])
    refused(a, path, *PIXELS, "--metrics", "kid", words=[path, "--metrics needs the images"])
    np.savez(path, mu=five, sigma=np.diag([1.0, 1, 1, 1, -1]))
    refused(path, path, words=["negative eigenvalue"])

def test_no_images_of_a_checkpoint(sampled, tmp_path):
    """The error is the command to run, and it runs."""
    flags, save_dir = sampled
    args, last = (*flags, *PIXELS), save_dir / "samples" / "3_seed1"
    done = run("fid.py", *args, "--repeat", 3, "--n_samples", 2)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    command = done.stderr.partition("with: ")[2].split()
    assert " ".join(command) == " ".join(map(str, (
        "python sample.py", *flags[:2], "--epoch 3 --seed 2 --n_samples 2", *flags[2:])))
    succeed(*command[1:])
    assert "3 seeds" in succeed("fid.py", *args, "--repeat", 3, "--n_samples", 2)
    refused(*args, "--n_samples", 40, words=["lacks images, 10 (000030.png, ", "--n_samples 40"])
    refused(*args, "--set", "net_type=UNetG", words=["net_type", "UNetG"])
    refused(*args, "--epoch", 7, words=["no checkpoint of epoch 7", "0, 1, 2, 3"])
    refused(*args, "--images", tmp_path, words=["settings.json"])
    few = shutil.copytree(last, tmp_path / "few")
    (last / "images" / "000000.png").unlink()
    refused(*args, "--repeat", 2, words=["lacks images, 000000.png: ", "--seed 1"])
    out = succeed("fid.py", *args, "--images", few)
    assert "epoch 3" in out and results(save_dir)[-1]["seeds"] == [1]
    copy = shutil.copytree(save_dir, tmp_path / "run")
    state = torch.load(copy / "ckpts" / "model_0.pth", weights_only=True)
    torch.save(state | {"epoch": 3}, copy / "ckpts" / "model_3.pth")
    refused(*args, "--set", f"save_dir={copy}", words=["another checkpoint", copy])

def test_arguments_are_refused():
    for args, word in (("", "A B"), ("a", "A B"), ("a b c", "A B"), ("a b --metrics fid", "'fid'"),
                       ("a b --features pixels --metrics is", "inception"),
                       ("a b --epoch 3", "--config"), ("a b --set n_epoch=3", "--config"),
                       ("a b --repeat 0", "'0'")):
        refused(*args.split(), words=["error: ", word])
