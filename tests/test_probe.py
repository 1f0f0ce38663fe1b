"""probe.py against scikit-learn and plain passes, over processes and storages; what it writes and refuses."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DATA, NETS, ROOT, needs_cifar10, run, succeed, tiny_config
from PIL import Image
from sklearn.linear_model import LogisticRegression

import checkpoint
import data
import edm
import options
import probe
import runtime
from runtime import UserError

ONE = runtime.Runtime(0, 1, 0, 1, torch.device("cpu"))
LINEAR = {"n_epoch": 20, "batch_size": 64, "lrate": 3e-3, "timestep": 4, "blockname": "out_2"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The config of a tiny digits run with two checkpoints, and its save_dir."""
    folder = tmp_path_factory.mktemp("probe")
    path = tiny_config(folder, "UNetE", save_every=1, linear=LINEAR)
    succeed("train.py", "--config", path)
    return path, folder / "run"


def lines(save_dir):
    return [json.loads(line) for line in (save_dir / "results.jsonl").read_text().splitlines()]


def arguments(**changes):
    defaults = {"seed": 0, "passes": 2, "batch_gpu": None, "timesteps": None, "blocks": None, "grid": False}
    return SimpleNamespace(**defaults | changes)


def features_of(config, images, labels, kind, pairs, denoiser=None, **changes):
    args = arguments(**changes)
    if denoiser is None:
        torch.manual_seed(0)
        denoiser = edm.build(config).eval()
    return probe.extract(denoiser, images, labels, pairs, args.passes, kind, config, args, ONE)


# ----------------------------------------------------------------------------------------------------------------------
# Features.

@pytest.mark.parametrize("net_type", NETS)
def test_features_are_those_of_the_whole_network(tmp_path, net_type):
    """The pass that ends at a block gives what the whole pass gives there: averages at the schedule's noise levels."""
    config = options.load_config(tiny_config(tmp_path, net_type))
    torch.manual_seed(0)
    denoiser = edm.build(config).eval()
    images, labels = data.load(config)
    images, labels = images[:300], labels[:300]
    pairs = probe.choose_pairs(config, arguments(timesteps=[3, 9], blocks="out_1,out_2"))
    assert [(p.timestep, p.block) for p in pairs] == [(3, "out_1"), (3, "out_2"), (9, "out_1"), (9, "out_2")]
    assert pairs[0].sigma == pytest.approx(0.0229, rel=1e-2)
    found = features_of(config, images, labels, probe.TEST, pairs, denoiser, batch_gpu=64)
    assert found.values.shape == (2, 300, sum(p.width for p in pairs)) and torch.equal(found.labels, labels)
    assert not torch.equal(found.values[0], found.values[1])            # Draws differ.
    g = torch.Generator().manual_seed(runtime.mix(0, 1, 256, probe.TEST))
    noise = torch.randn(256, 1, 8, 8, generator=g)[:44]
    expected = []
    for sigma in (pairs[0].sigma, pairs[2].sigma):
        x = images[256:].float() / 127.5 - 1 + sigma * noise
        with torch.no_grad():
            D_x, whole = denoiser.denoise(x, torch.full([44], sigma), return_features=True)
        assert D_x.shape == x.shape
        expected += [whole[name].mean((2, 3)) for name in ("out_1", "out_2")]
    assert (found.values[1, 256:] - torch.cat(expected, 1)).abs().max() < 1e-5


def test_training_images_are_flipped_half_of_the_time(tmp_path):
    """Only where the config flips and only in training; a mirror-symmetric noise level of almost 0 shows it."""
    config = options.load_config(tiny_config(tmp_path, "UNetC"))
    config["diffusion"]["sigma_min"] = 1e-6
    pairs = probe.choose_pairs(config, arguments(timesteps=[1], blocks="out_2"))
    image = data.load(config)[0][:1]
    images, labels = image.repeat(256, 1, 1, 1), torch.zeros(256, dtype=torch.int64)
    groups = {}
    for flip in (False, True):
        config["flip"] = flip
        for kind in (probe.TRAIN, probe.TEST):
            values = features_of(config, images, labels, kind, pairs, passes=1).values[0]
            groups[flip, kind] = torch.isclose(values, values[:1], rtol=1e-3, atol=1e-4).all(1).sum().item()
    assert groups[False, probe.TRAIN] == groups[False, probe.TEST] == groups[True, probe.TEST] == 256
    assert 90 < groups[True, probe.TRAIN] < 166


def test_where_features_are_kept(tmp_path, monkeypatch):
    """Memory where there is room; else a file that leaves no trace; a clear error where even the disk is too small."""
    shape = (2, 100, 7)
    assert probe.storage(shape, ONE, tmp_path).shape == shape
    monkeypatch.setattr(probe, "free_memory", lambda: 1000)
    mapped = probe.storage(shape, ONE, tmp_path)
    mapped[:] = 3
    assert mapped.shape == shape and mapped.sum() == 3 * 1400 and list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="lower --passes"):
        probe.storage((1000, 10**9, 1000), ONE, tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Heads.

def test_every_image_once_an_epoch_and_every_draw_in_turn():
    train = probe.Features(10, torch.zeros(3, 10, 1), torch.zeros(10), torch.arange(10))
    seen = []
    for epoch in range(3):
        batches = list(probe.epoch_batches(train, 4, 7, epoch))
        assert [size for _, _, size in batches] == [4, 4, 2]
        rows, draws = (torch.cat(parts) for parts in list(zip(*batches, strict=True))[:2])
        assert sorted(rows.tolist()) == list(range(10)) and rows.tolist() != list(range(10))
        seen += list(zip(rows.tolist(), draws.tolist(), strict=True))
    assert len(set(seen)) == 30


def test_heads_of_different_widths_learn_as_they_would_alone(tmp_path):
    """A batched layer is the layers one by one: the same accuracies, on features that hold the answer or noise."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(4, [600], generator=g)
    good = torch.nn.functional.one_hot(labels, 4) + 0.7 * torch.randn(600, 4, generator=g)
    noise = torch.randn(600, 6, generator=g)
    rows = torch.arange(400), torch.arange(200)

    def sets(values):
        return [probe.Features(len(r), values[None, s], labels[s], r)
                for s, r in zip((slice(0, 400), slice(400, None)), rows, strict=True)]

    pairs = [probe.Pair(1, 0.1, "out_1", 1, 4), probe.Pair(1, 0.1, "out_2", 2, 6), probe.Pair(2, 0.2, "out_1", 1, 4)]
    linear = LINEAR | {"lrate": 0.05}
    together = probe.probe(*sets(torch.cat([good, noise, good + 1], 1)), pairs, 4, linear, 0, ONE)
    alone = [probe.probe(*sets(values), [pair], 4, linear, 0, ONE)[0]
             for pair, values in zip(pairs, (good, noise, good + 1), strict=True)]
    assert together == pytest.approx(alone, abs=0.51) and together[0] > 70 and together[1] < 40 and together[2] > 65


@needs_cifar10
def test_accuracy_is_scikit_learns(tmp_path):
    """Features of 5,000 + 1,000 real images, logistic regression on the same arrays: within one point."""
    config = options.load_config(ROOT / "config" / "cifar10" / "C.yaml", [
        "network.n_channels=16", "network.ch_mults=[1,2,4]", "network.is_attn=[false,false,false]",
        "network.n_blocks=1", "network.attn_channels_per_head=16", "flip=false",
        "linear.blockname=out_3", f"data_root={DATA}", f"save_dir={tmp_path}", f"cache_dir={tmp_path}"])
    pairs = probe.choose_pairs(config, arguments())
    (x, y), (x_test, y_test) = data.load(config), data.load(config, train=False)
    train = features_of(config, x[:5000], y[:5000], probe.TRAIN, pairs, passes=1)
    test = features_of(config, x_test[:1000], y_test[:1000], probe.TEST, pairs, passes=1)
    # The same scale for both, in which Adam and L-BFGS both come to the end.
    mean, std = train.values[0].mean(0), train.values[0].std(0)
    for found in (train, test):
        found.values.sub_(mean).div_(std)
    theirs = 100 * LogisticRegression(C=1e3, max_iter=10_000).fit(train.values[0].numpy(), y[:5000]).score(
        test.values[0].numpy(), y_test[:1000])
    ours, = probe.probe(train, test, pairs, 10, {"n_epoch": 100, "batch_size": 128, "lrate": 1e-2}, 0, ONE)
    print(ours, theirs)
    assert theirs > 25 and abs(ours - theirs) <= 1


@pytest.mark.slow
def test_digits_are_told_apart_at_least_as_well_as_from_raw_pixels(tmp_path):
    """After the demo's training."""
    config = ROOT / "config" / "digits" / "G.yaml"
    succeed("train.py", "--config", config, "--set", f"save_dir={tmp_path}")
    out = succeed("probe.py", "--config", config, "--set", f"save_dir={tmp_path}")
    loaded = options.load_config(config)
    (x, y), (x_test, y_test) = data.load(loaded), data.load(loaded, train=False)
    pixels = LogisticRegression(max_iter=10_000).fit(x.flatten(1) / 255, y).score(x_test.flatten(1) / 255, y_test)
    print(out, pixels)
    assert lines(tmp_path)[-1]["value"] >= 100 * pixels > 85


# ----------------------------------------------------------------------------------------------------------------------
# As users run it.

def test_process_count_storage_and_grid_change_nothing(trained, tmp_path):
    """The same seed gives the same accuracy to 0.1 points, test images counted once each; another seed another."""
    path, save_dir = trained
    values = []
    for args, processes in (([], None), ([], 2), ([], 3), (["--batch_gpu", 100], None), (["--blocks", "all"], None)):
        out = succeed("probe.py", "--config", path, *args, processes=processes)
        found = [line for line in lines(save_dir) if line["features"] == "out_2"][-1]
        values.append(found["value"])
        assert (found["n"], found["n_reference"], found["timestep"], found["epoch"]) == (360, 1437, 4, 1)
        assert found["processes"] == (processes or 1) and "out_2" in out
        assert (values[-1] * 3.6) == pytest.approx(round(values[-1] * 3.6), abs=1e-6)      # Whole images of 360.
    assert max(values) - min(values) <= 0.1 and 20 < values[0] < 100, values
    assert succeed("probe.py", "--config", path).strip().endswith("360 test images")
    assert f"probe accuracy {values[0]:.2f} %" in succeed("probe.py", "--config", path)
    succeed("probe.py", "--config", path, "--seed", 1)
    assert lines(save_dir)[-1]["seeds"] == [1]


def test_grid(trained):
    """Every pair at once: a table, a heat map, a line of results each; the best named."""
    path, save_dir = trained
    before = len(lines(save_dir)) if (save_dir / "results.jsonl").exists() else 0
    out = succeed("probe.py", "--config", path, "--grid", "--epoch", "0,2", "--passes", 1)
    kept = lines(save_dir)[before:]
    blocks = [f"out_{i}" for i in range(1, 4)]
    assert [(line["epoch"], line["timestep"], line["features"]) for line in kept] == [
        (epoch, t, block) for epoch in (0, 1) for t in range(1, 11) for block in blocks]
    assert out.count("| block | t=1 | t=2 |") == 2 and out.count("best probe accuracy") == 2
    last = max(kept[30:], key=lambda line: line["value"])
    assert f"t={last['timestep']} (sigma {last['sigma']:.4g}), {last['features']}" in out.splitlines()[-1]
    row = next(line for line in out.splitlines()[::-1] if line.startswith("| out_2 "))
    expected = [f"{line['value']:.2f}" for line in kept[30:] if line["features"] == "out_2"]
    assert row == f"| out_2 | {' | '.join(expected)} |" and len(expected) == 10
    assert {line["Mimg"] for line in kept} == {1400 / 1e6, 2800 / 1e6}
    with Image.open(save_dir / "probe_1.png") as image:
        assert image.width > 800 and len(image.convert("RGB").getcolors(1 << 20)) > 50
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(save_dir / "tensorboard" / "scores")).Reload().Scalars("probe t=4 out_2 (%)")
    assert {event.step for event in events} >= {0, 1}


def test_mapped_features_give_the_same(trained, monkeypatch, tmp_path):
    path, _ = trained
    config = options.load_config(path, [f"save_dir={tmp_path}"])
    pairs = probe.choose_pairs(config, arguments())
    sets = {probe.TRAIN: data.load(config), probe.TEST: data.load(config, train=False)}
    values = []
    for free in (1 << 40, 0):
        monkeypatch.setattr(probe, "free_memory", lambda free=free: free)
        train, test = (features_of(config, *sets[kind], kind, pairs) for kind in (probe.TRAIN, probe.TEST))
        values.append(probe.probe(train, test, pairs, 10, LINEAR, 0, ONE))
    assert values[0] == values[1] and list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------------------
# What it refuses: one line, exit code 2, nothing written.

@pytest.mark.parametrize(("args", "words"), [
    (["--set", "linear.blockname=out_9"], ["linear.blockname out_9", "out_1, out_2, out_3"]),
    (["--blocks", "out_1,in_2"], ["--blocks in_2", "out_1, out_2, out_3"]),
    (["--set", "linear.timestep=19"], ["linear.timestep", "from 1 to 18"]),
    (["--epoch", "7"], ["no checkpoint of epoch 7", "0, 1"]),
    (["--set", "classes=100"], ["classes is 100", "has 10"]),
    (["--set", "net_type=UNetG"], ["net_type", "UNetG"]),
    (["--set", "dataset=folder", "--set", "data_root=/nowhere"], ["/nowhere"]),
])
def test_bad_input(trained, args, words):
    path, save_dir = trained
    before = {p: p.stat().st_mtime_ns for p in save_dir.rglob("*")}
    done = run("probe.py", "--config", path, *args)
    message = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(message) == 1 and message[0].startswith("probe.py: error: "), done.stderr
    for word in words:
        assert word in message[0], message[0]
    assert before == {p: p.stat().st_mtime_ns for p in save_dir.rglob("*")}


@pytest.mark.parametrize("args", [["--timesteps", "0-3"], ["--timesteps", "5-3"], ["--timesteps", "a"],
                                  ["--passes", "0"], ["--epoch", "new"]])
def test_bad_arguments(trained, args):
    done = run("probe.py", "--config", trained[0], *args)
    assert done.returncode == 2 and args[0] in done.stderr and "Traceback" not in done.stderr


def test_a_diverged_network_is_named(trained, tmp_path):
    path, save_dir = trained
    shutil.copytree(save_dir, tmp_path / "run")
    file = tmp_path / "run" / "ckpts" / "model_1.pth"
    state = torch.load(file, weights_only=True)
    next(v for k, v in state["ema"].items() if v.ndim == 4).fill_(np.nan)
    checkpoint.write(file, state)
    done = run("probe.py", "--config", path, "--set", f"save_dir={tmp_path / 'run'}")
    assert done.returncode == 2 and "NaN" in done.stderr and "Traceback" not in done.stderr
