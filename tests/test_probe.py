"""probe.py against scikit-learn and plain passes, over processes; what it writes and refuses."""

import shutil
import numpy as np
import pytest
import torch
from conftest import DATA, NETS, ROOT, needs_cifar10, refused, results, succeed, tiny_config
from PIL import Image
from sklearn.linear_model import LogisticRegression
from edm2 import data, diffusion, linear_probe
from edm2.config import load_config
from edm2.linear_probe import TEST, TRAIN, BlockFeatures

@pytest.fixture(scope="module")
def probed(trained, tmp_path_factory):
    """The flags for a copy of the trained run, and its folder; its epoch 1 has diverged."""
    copy = shutil.copytree(trained / "run", tmp_path_factory.mktemp("probe") / "run")
    state = torch.load(copy / "ckpts" / "model_1.pth", weights_only=True)
    next(v for v in state["ema"].values() if v.ndim == 4).fill_(np.nan)
    torch.save(state, copy / "ckpts" / "model_1.pth")
    return ("--config", trained / "config.yaml", "--set", f"save_dir={copy}"), copy

def make_probe(config, train, test=None, **how):
    """A Probe of sets (images, labels) by a random network."""
    torch.manual_seed(0)
    return linear_probe.Probe(config, diffusion.build(config).eval(),
                              {TRAIN: train, TEST: test or train}, **how)

@pytest.mark.parametrize("net_type", NETS)
def test_features_are_those_of_the_whole_network(tmp_path, net_type):
    """The pass that ends at a block gives the averages that the whole pass gives there."""
    config = load_config(tiny_config(tmp_path, net_type, linear={"flip": False}))
    images, labels = (part[:300] for part in data.load(config))
    probe = make_probe(config, (images, labels), passes=2, batch_gpu=64)
    assert list(probe.widths) == ["out_1", "out_2", "out_3"]
    assert linear_probe.sigma_of(config, 3) == pytest.approx(0.0229, rel=1e-2)
    for t, blocks in ((3, ["out_1", "out_2"]), (9, ["out_2", "out_1"]), (9, ["out_3"])):
        found, sigma = probe.extract(TRAIN, t, blocks), linear_probe.sigma_of(config, t)
        assert torch.equal(found.labels, labels) and found.row.tolist() == list(range(300))
        assert not torch.equal(found.values[0], found.values[1])            # Draws differ.
        g = torch.Generator().manual_seed(diffusion.derive_seed(0, 1, 256, TRAIN))
        noise = torch.randn(256, 1, 8, 8, generator=g)[:44]
        x = images[256:].float() / 127.5 - 1 + sigma * noise
        with torch.no_grad():
            D_x, whole = probe.denoiser.denoise(x, torch.full([44], sigma), return_features=True)
        assert D_x.shape == x.shape
        expected = torch.cat([whole[block].mean((2, 3)) for block in blocks], 1)
        assert found.values.shape == (2, 300, expected.shape[1])
        assert (found.values[1, 256:] - expected).abs().max() < 1e-5
    assert probe.extract(TEST, 3, ["out_1"]).values.shape == (1, 300, probe.widths["out_1"])

def test_training_images_are_flipped_half_of_the_time(tmp_path):
    """Only where `linear` says so and only in training; a noise level of almost 0 shows it."""
    for flip in (False, True):
        config = load_config(tiny_config(tmp_path, diffusion={"sigma_min": 1e-6},
                                         linear={"flip": flip}))
        same = data.load(config)[0][:1].repeat(256, 1, 1, 1), torch.zeros(256, dtype=torch.int64)
        for kind in (TRAIN, TEST):
            values = make_probe(config, same, passes=1).extract(kind, 1, ["out_2"]).values[0]
            n = torch.isclose(values, values[:1], rtol=1e-3, atol=1e-4).all(1).sum().item()
            assert 90 < n < 166 if flip and kind == TRAIN else n == 256

def test_every_image_once_an_epoch_and_every_draw_in_turn(tmp_path):
    config = load_config(tiny_config(tmp_path, linear={"n_epoch": 3, "batch_size": 4}))
    labels, seen = torch.zeros(10, dtype=torch.int64), set()
    train = BlockFeatures(10, torch.zeros(3, 10, 1), labels, torch.arange(10))
    batches = list(make_probe(config, (None, labels), seed=7).batches(train, 9))
    assert [size for _, _, size in batches] == [4, 4, 2] * 3
    for start in (0, 3, 6):
        parts = list(zip(*batches[start:start + 3], strict=True))[:2]
        rows, draws = (torch.cat(part).tolist() for part in parts)
        assert sorted(rows) == list(range(10)) and rows != list(range(10))
        seen |= set(zip(rows, draws, strict=True))
    assert len(seen) == 30

def test_heads_of_different_widths_learn_as_they_would_alone(tmp_path):
    """The same accuracies beside others, on features that hold the answer or noise."""
    linear = {"n_epoch": 20, "batch_size": 64, "lrate": 0.05}
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(4, [600], generator=g)
    good = torch.nn.functional.one_hot(labels, 4) + 0.7 * torch.randn(600, 4, generator=g)
    blocks = {"out_1": good, "out_2": torch.randn(600, 6, generator=g), "out_3": good + 1}
    probe = make_probe(load_config(tiny_config(tmp_path, linear=linear)), (None, labels))
    probe.widths = {block: values.shape[1] for block, values in blocks.items()}

    def accuracies(*names):
        values = torch.cat([blocks[name] for name in names], 1)[None]
        train, test = (BlockFeatures(n, values[:, part], labels[part], torch.arange(n))
                       for n, part in ((400, slice(400)), (200, slice(400, None))))
        return probe.classify(train, test, 1, list(names))

    together, alone = accuracies(*blocks), [accuracies(name)[0] for name in blocks]
    assert together == pytest.approx(alone, abs=0.51)
    assert together[0] > 70 and together[1] < 40 and together[2] > 65

@needs_cifar10
@pytest.mark.slow
def test_accuracy_is_scikit_learns(tmp_path):
    """Features of 5,000 + 1,000 real images, logistic regression on the same: within one point."""
    config = load_config(ROOT / "config" / "cifar10" / "C.yaml", [
        "network.n_channels=16", "network.ch_mults=[1,2,4]", "network.is_attn=[false,false,false]",
        "network.n_blocks=1", "network.attn_channels_per_head=16", "cache_dir=null",
        "linear.flip=false",
        "linear.lrate=1e-2", "linear.n_epoch=100", f"data_root={DATA}"])
    (x, y), (x_test, y_test) = data.load(config), data.load(config, train=False)
    y, y_test = y[:5000], y_test[:1000]
    probe = make_probe(config, (x[:5000], y), (x_test[:1000], y_test), passes=1)
    train, test = (probe.extract(kind, 4, ["out_3"]) for kind in (TRAIN, TEST))
    # The same scale for both, in which Adam and L-BFGS both come to the end.
    mean, std = train.values[0].mean(0), train.values[0].std(0)
    for found in (train, test):
        found.values.sub_(mean).div_(std)
    theirs = 100 * LogisticRegression(C=1e3, max_iter=10_000).fit(
        train.values[0].numpy(), y).score(test.values[0].numpy(), y_test)
    ours, = probe.classify(train, test, 4, ["out_3"])
    print(ours, theirs)
    assert theirs > 25 and abs(ours - theirs) <= 1

@pytest.mark.slow
def test_digits_are_told_apart_at_least_as_well_as_from_raw_pixels(tmp_path):
    """After a third of the demo's training."""
    config = ROOT / "config" / "digits" / "G.yaml"
    for script in ("train.py", "probe.py"):
        print(succeed(script, "--config", config, "--set", f"save_dir={tmp_path}",
                      "--set", "n_epoch=20", "--set", "eval_every=null"))
    (x, y), (x_test, y_test) = (data.load(load_config(config), train) for train in (True, False))
    pixels = LogisticRegression(max_iter=10_000).fit(x.flatten(1) / 255, y).score(
        x_test.flatten(1) / 255, y_test)
    assert results(tmp_path)[-1]["value"] >= 100 * pixels > 85

@pytest.mark.slow
def test_process_count_and_grid_change_nothing(probed):
    """To 0.1 points; another seed does."""
    flags, save_dir, values = (*probed[0], "--set", "linear.lrate=3e-2"), probed[1], []
    for args, n in (([], None), ([], 2), (["--batch_gpu", 100], None),
                    (["--blocks", "all"], None)):
        out = succeed("probe.py", *flags, *args, processes=n)
        found = [line for line in results(save_dir) if line["features"] == "out_2"][-1]
        assert (found["n"], found["n_reference"], found["timestep"], found["epoch"],
                found["processes"]) == (360, 1437, 4, 3, n or 1)
        values.append(found["value"])       # Whole images of 360.
        assert values[-1] * 3.6 == pytest.approx(round(values[-1] * 3.6), abs=1e-6)
        assert "out_2" in out and (args or f"probe accuracy {values[-1]:.2f} %" in out)
        assert args or out.strip().endswith("360 test images")
    assert max(values) - min(values) <= 0.1 and 20 < values[0] < 100, values
    succeed("probe.py", *flags, "--seed", 1)
    last = results(save_dir)[-1]
    assert last["seeds"] == [1] and last["value"] != values[0]

def test_grid(probed):
    """Every pair at once: a table, a heat map, a line of results each; the best named."""
    flags, save_dir = probed
    out = succeed("probe.py", *flags, "--grid", "--epoch", "0,4", "--passes", 1,
                  "--set", "linear.n_epoch=3")
    kept, blocks = results(save_dir)[-60:], ["out_1", "out_2", "out_3"]
    assert [(line["epoch"], line["timestep"], line["features"]) for line in kept] == [
        (epoch, t, block) for epoch in (0, 3) for t in range(1, 11) for block in blocks]
    assert {line["Mimg"] for line in kept} == {1400 / 1e6, 5600 / 1e6}
    lines, last = out.splitlines(), max(kept[30:], key=lambda line: line["value"])
    assert out.count("| block | t=1 | t=2 |") == 2 and out.count("best probe accuracy") == 2
    assert f"t={last['timestep']} (sigma {last['sigma']:.4g}), {last['features']}" in lines[-1]
    expected = [f"{line['value']:.2f}" for line in kept[30:] if line["features"] == "out_2"]
    assert [line for line in lines if line.startswith("| out_2 ")][-1] == (
        f"| out_2 | {' | '.join(expected)} |") and len(expected) == 10
    with Image.open(save_dir / "probe_3.png") as image:
        assert image.width > 800 and len(image.convert("RGB").getcolors(1 << 20)) > 50
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    board = EventAccumulator(str(save_dir / "tensorboard" / "scores")).Reload()
    assert {event.step for event in board.Scalars("probe t=4 out_2 (%)")} >= {0, 3}

@pytest.mark.parametrize(("args", "words"), [
    (["--set", "linear.blockname=out_9"], ["linear.blockname out_9", "out_1, out_2, out_3"]),
    (["--blocks", "out_1,in_2"], ["--blocks in_2", "out_1, out_2, out_3"]),
    (["--epoch", "7"], ["no checkpoint of epoch 7", "0, 1, 2, 3"]),
    (["--set", "linear.timestep=19"], ["linear.timestep", "18", "19"]), (["--epoch", "1"], ["NaN"]),
    (["--set", "classes=100"], ["classes is 100", "has 10"]),
    (["--set", "net_type=UNetG"], ["net_type", "UNetG"]), (["--timesteps", "0-3"], ["--timesteps"]),
    (["--set", "dataset=folder", "--set", "data_root=/nowhere"], ["/nowhere"]),
    (["--timesteps", "5-3"], ["--timesteps", "5-3"]), (["--passes", "0"], ["--passes", "'0'"]),
    (["--timesteps", "a"], ["--timesteps", "'a'"]), (["--epoch", "new"], ["--epoch", "'new'"])])
def test_bad_input(probed, args, words):
    flags, save_dir = probed
    before = {path: path.stat().st_mtime_ns for path in save_dir.rglob("*")}
    refused("probe.py", *flags, *args, words=words)
    assert before == {path: path.stat().st_mtime_ns for path in save_dir.rglob("*")}
