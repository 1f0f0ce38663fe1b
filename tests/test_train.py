"""train.py: what a run writes, what a step does, and that neither the processes, the passes nor a
restart change what comes out."""

import math
import numpy as np
import pytest
import torch
import yaml
from conftest import DATA, ROOT, distance, metrics, needs_cifar10, succeed, tiny_config, weights
from PIL import Image
from steps import train_steps
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
import train
from edm2 import checkpoint, data, diffusion
from edm2.config import load_config

ALL = ["network", "ema", "uncertainty"]
BOARD = {"loss", "loss_unweighted", "lr", "grad_norm", "ema_decay", "img_per_s", "step_time_s"}

def settings(text):
    """The flags --set of "a=1 b=2"."""
    return [word for setting in text.split() for word in ("--set", setting)]

def equal(a, b):
    """Whether two states, or parts of them, hold bitwise the same."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(value, b[key]) for key, value in a.items())
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

def assert_same(a, b, epoch):
    """Two runs have bitwise the same weights, averages and moments, and once the same figures."""
    states = [checkpoint.load(folder / "ckpts" / f"model_{epoch}.pth") for folder in (a, b)]
    for key in (*ALL, "ema_step", "optimizer"):
        assert equal(states[0][key], states[1][key]), key
    rows = [[row for row in metrics(folder) if row["epoch"] <= epoch] for folder in (a, b)]
    for key in ("step", "loss", "loss_unweighted", "lr", "grad_norm", "ema_decay", "Mimg", "epoch"):
        values, others = ([row[key] for row in part] for part in rows)
        # The processes' sums of losses are added in another order after a restart.
        assert values == pytest.approx(others, rel=1e-6, abs=0), key

@pytest.mark.slow
@pytest.mark.parametrize("net_type", diffusion.NETWORKS)
def test_the_weights_do_not_depend_on_the_processes_or_passes(tmp_path, net_type):
    """Nor on torch.compile, with DDP, which cuts it into a graph for each of its buckets."""
    def same_run(name, *args, n_epoch=1, processes=None):
        (tmp_path / name).mkdir(exist_ok=True)
        path = tiny_config(tmp_path / name, net_type, flip=True, network={"n_channels": 16},
                           n_epoch=n_epoch)
        out = succeed("train.py", "--config", path, *args, processes=processes)
        assert f"{processes or 1} process" in out
        return tmp_path / name / "run"

    one, start = same_run("one"), same_run("start", "--set", "lrate=1e-12")
    assert metrics(one)[-1]["step"] == 10 and distance(weights(one, 0), weights(start, 0)) > 0.01
    others = [same_run("quarter", "--batch_gpu", 35), same_run("uneven", "--batch_gpu", 30),
              same_run("two_in_passes", "--batch_gpu", 30, processes=2)]
    if net_type == "UNetG":
        others += [same_run("four", processes=4),
                   same_run("compiled", "--compile", "--batch_gpu", 35, processes=2)]
    for other in others:
        for key in ALL:
            a, b = weights(one, 0, key), weights(other, 0, key)
            assert list(a) == list(b) and distance(a, b) < 1e-4, (other, key)
        for a, b in zip(metrics(one), metrics(other), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        # Each process draws its share of the grid from its own EMA.
        grids = [np.asarray(Image.open(folder / "grids" / "0000.png")).astype(int)
                 for folder in (one, other)]
        assert np.abs(grids[0] - grids[1]).max() <= 1
    same_run("one", n_epoch=2, processes=2)     # It goes on with another number of processes.
    same_run("two_in_passes", n_epoch=2)
    assert distance(weights(one, 1), weights(others[2], 1)) < 1e-4

def test_outputs_of_a_run(trained):
    folder, steps = trained / "run", list(range(5, 41, 5))
    assert {".lock", "ckpts", "grids", "metrics.jsonl", "tensorboard"} <= {
        path.name for path in folder.iterdir()}
    for part, name in (("ckpts", "model_{}.pth"), ("grids", "000{}.png")):
        assert {p.name for p in (folder / part).iterdir()} == set(map(name.format, range(4)))
    rows = metrics(folder)
    assert [row["step"] for row in rows] == steps and set(rows[0]) == BOARD | {
        "step", "epoch", "Mimg", "TFLOP_per_s", "MFU", "gpu_memory_GB"}
    assert (rows[-1]["Mimg"], rows[-1]["epoch"], rows[-1]["MFU"]) == (40 * 140 / 1e6, 3, None)
    assert rows[0]["lr"] == pytest.approx(1e-2)
    assert [row["ema_decay"] for row in rows] == pytest.approx([        # As ema_pytorch has it.
        min(0.99, 1 - step ** (-2 / 3)) for step in steps])
    assert rows[-1]["loss_unweighted"] < rows[0]["loss_unweighted"]
    gflop = diffusion.cost(load_config(trained / "config.yaml"))[1]
    assert rows[-1]["TFLOP_per_s"] == pytest.approx(rows[-1]["img_per_s"] * gflop / 1e3)
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) >= BOARD
    assert [event.step for event in board.Scalars("loss")] == steps
    assert board.Tags()["images"] == ["samples above real images"]
    grid = Image.open(folder / "grids" / "0001.png")
    assert grid.size == (2 * 34 + 2, 2 * (2 * 34 + 2))              # 4 above 4.

def test_checkpoint_holds_plain_tensors_and_values_once(trained):
    state = torch.load(trained / "run" / "ckpts" / "model_1.pth", weights_only=True)

    def plain(value):
        if isinstance(value, dict):
            return all(plain(k) and plain(v) for k, v in value.items())
        if isinstance(value, list | tuple):
            return all(map(plain, value))
        return value is None or type(value) in (torch.Tensor, int, float, str, bool)

    assert plain(state | {"network": dict(state["network"])})
    assert set(state) == {*ALL, "ema_step", "optimizer", "scaler", "step", "epoch", "loss_sum",
                          "window", "bad_steps", "posthoc", "n_images", "images_sha256",
                          "precision", "config"}
    assert (state["step"], state["epoch"], state["ema_step"]) == (20, 1, 20)
    assert state["config"] == load_config(trained / "config.yaml").model_dump()
    assert set(state["network"]) == set(state["ema"])
    assert not any(name.startswith(("module.", "_orig_mod.", "net.")) for name in state["network"])
    assert 1e-4 < distance(state["network"], state["ema"]) < 0.5    # Raw and averaged weights.

def test_going_on_gives_the_same_run(trained, tmp_path):
    """By itself and by hand, and without the lines that came later or were cut."""
    whole, parts = trained / "run", tmp_path / "run"
    command = ["train.py", "--config", trained / "config.yaml", "--set", f"save_dir={parts}"]
    succeed(*command, "--set", "n_epoch=1")
    for step, *by_hand in ([10], [30, "--set", "load_epoch=2"]):
        with open(parts / "metrics.jsonl", "ab") as file:
            file.write(b'{"step": 40, "loss": 1}\n{"step": 50, "lo\xff')
        assert f"after step {step}\n" in succeed(*command, *by_hand)
        assert_same(whole, parts, 3)
        assert [row["loss"] for row in metrics(parts)] == [row["loss"] for row in metrics(whole)]
        assert "trained already" in succeed(*command)

@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("net_type", diffusion.NETWORKS)
def test_mixed_precision_trains(tmp_path, net_type, dtype):
    path = tiny_config(tmp_path, net_type, batch_size=20, warm_epoch=0, log_every=3,
                       save_minutes=1e-9)
    out = succeed("train.py", "--config", path, "--use_amp", "--amp_dtype", dtype, "--max_steps", 6)
    assert "stopped after step 6" in out and "--max_steps" in out
    first, last = metrics(tmp_path / "run")
    assert last["loss_unweighted"] < first["loss_unweighted"] and last["step"] == 6
    state = checkpoint.load(checkpoint.newest(load_config(path)))
    assert bool(state["scaler"]) == (dtype == "float16") and dtype in state["precision"]
    assert {value.dtype for value in state["network"].values()} == {torch.float32}

KEYS = {"dataset", "classes", "model_type", "net_type", "diffusion", "network", "n_epoch", "flip",
        "batch_size", "lrate", "warm_epoch", "tref_epoch", "ema", "optim", "n_sample", "save_dir",
        "save_model", "linear"}

def predecessors(name, folder):
    """A shipped config with the predecessor's keys and names, and an optim_args of comments."""
    values = yaml.safe_load((ROOT / "config" / f"{name}.yaml").read_text())
    old = {key: value for key, value in values.items() if key in KEYS} | {"load_epoch": -1}
    old["dataset"] = {"cifar10": "cifar", "tinyimagenet": "tiny"}.get(*2 * [old["dataset"]])
    del old["network"]["attn_channels_per_head"]
    (folder / "old.yaml").write_text(yaml.safe_dump(old) + "optim_args:\n#  betas: [0.9, 0.99]\n")
    return folder / "old.yaml"

@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "tinyimagenet"])
@pytest.mark.parametrize("letter", "CEG")
def test_a_config_of_the_predecessor_runs_unchanged_and_dry(tmp_path, dataset, letter):
    shipped = load_config(ROOT / "config" / dataset / f"{letter}.yaml")
    path = predecessors(f"{dataset}/{letter}", tmp_path)
    out = succeed("train.py", "--config", path, "--dry_run", "--use_amp", "--amp_dtype", "bfloat16")
    for words in (f"dataset: {dataset}\n", f"{diffusion.cost(shipped)[0]:,} parameters", "bfloat16",
                  f"batch_size: {shipped.batch_size}", "GFLOP per training image", "1 process"):
        assert words in out
    assert list(tmp_path.iterdir()) == [path]       # A dry run writes nothing.
    differing = {key for key, value in load_config(path) if value != getattr(shipped, key)}
    assert differing <= {"network", "optim_args", "eval_every"}

@needs_cifar10
@pytest.mark.slow
def test_the_full_network_trains_on_cifar10(tmp_path):
    """From a config of the predecessor, with the data in ./data: the loss is finite and falls."""
    (tmp_path / "data").symlink_to(DATA)
    out = succeed("train.py", "--config", predecessors("cifar10/C", tmp_path), "--max_steps", 12,
                  *settings("batch_size=4 warm_epoch=0 log_every=4"), cwd=tmp_path)
    assert "39,509,888 parameters, 42.6 GFLOP" in out
    losses = [row["loss_unweighted"] for row in metrics(tmp_path / "runs" / "cifar10" / "C")]
    assert len(losses) == 3 and all(map(math.isfinite, losses)) and losses[2] < losses[0]

@pytest.mark.slow
@pytest.mark.parametrize("letter", "CEG")
def test_the_digits_configs_learn(tmp_path, letter):
    """Within 6 epochs the unweighted loss falls to 60 % or less of the first epoch's."""
    succeed("train.py", "--config", ROOT / "config" / "digits" / f"{letter}.yaml", *settings(
        f"n_epoch=6 log_every=1000 eval_every=null n_sample=1 save_dir={tmp_path}"))
    losses = [row["loss_unweighted"] for row in metrics(tmp_path)]          # One row an epoch.
    assert len(losses) == 6 and losses[-1] < 0.6 * losses[0], losses

@pytest.mark.parametrize(("precision", "limit"), [([], 1e-5), (["--use_amp"], 1e-2)])
def test_going_on_in_another_memory_layout(tmp_path, precision, limit):
    path, states = tiny_config(tmp_path, "UNetE", batch_size=8, save_minutes=1e-9), []
    for name, steps, *layout in (("whole", 6), ("parts", 3), ("parts", 6, "--no-channels_last")):
        out = succeed("train.py", "--config", path, "--set", f"save_dir={tmp_path / name}",
                      "--max_steps", steps, *precision, *layout)
        states.append(checkpoint.load(tmp_path / name / "ckpts" / "latest.pth"))
    assert "after step 3\n" in out and [state["step"] for state in states] == [6, 3, 6]
    strides = [next(v.stride() for v in state["network"].values() if v.shape == (32, 2, 3, 3))
               for state in states]
    assert strides == [(18, 1, 6, 2), (18, 1, 6, 2), (18, 9, 3, 1)]
    assert distance(states[0]["network"], states[2]["network"]) < limit

@pytest.mark.parametrize("net_type", ["UNetE", "UNetG"])
def test_forced_weights_have_unit_mean_square_after_a_step_s_forward_pass(tmp_path, net_type):
    edm = train_steps(tmp_path, net_type, n=3).denoiser
    edm.train()(torch.randn(8, 1, 8, 8), torch.randn(8), torch.randn(8, 1, 8, 8))
    for weight in (p for p in edm.parameters() if p.ndim > 0):
        square = weight.square().mean(tuple(range(1, weight.ndim)))
        torch.testing.assert_close(square, torch.ones(len(weight)), rtol=0, atol=1e-3)

def test_learning_rate(tmp_path):
    """EDM2 Eq. 67, of the step; 2 steps an epoch."""
    config = load_config(tiny_config(tmp_path, lrate=0.1, warm_epoch=5, tref_epoch=50))
    for step, lr in {0: 0.01, 4: 0.05, 9: 0.1, 99: 0.1, 100: 0.1, 400: 0.05, 1600: 0.025}.items():
        assert train.learning_rate(config, step, 2) == pytest.approx(lr)
    config = config.model_copy(update={"tref_epoch": None, "warm_epoch": 0})
    assert train.learning_rate(config, 0, 2) == train.learning_rate(config, 1600, 2) == 0.1

def test_draws_are_functions_of_seed_and_step(tmp_path):
    """Images, flipped or augmented, noise levels, noise, labels; the labels are the images'."""
    path = tiny_config(tmp_path, flip=True, network={"label_dim": 10})
    images, labels = (torch.from_numpy(a) for a in (
        np.random.default_rng(0).integers(0, 256, (1437, 1, 8, 8), np.uint8), np.arange(1437) % 10))
    number = {image.numpy().tobytes(): i for i, image in enumerate(images)}

    def draw(step, *overrides, size=140):
        passes = data.draw(load_config(path, overrides), step, images, labels, size)
        assert len(passes) == 140 // size
        return [None if parts[0] is None else torch.cat(parts)
                for parts in zip(*passes, strict=True)]

    def found(y):
        """The numbers of images and whether they are flipped."""
        y = (y * 127.5 + 128).to(torch.uint8)
        numbers = [[number.get(image.numpy().tobytes(), -1) for image in x]
                   for x in (y, y.flip(-1))]
        return torch.tensor(numbers).amax(0), torch.tensor(numbers[1]) >= 0

    first = *same, _ = draw(0)
    y, level, noise, label = same
    for again in (draw(0), draw(0, size=35)):
        assert all(torch.equal(a, b) for a, b in zip(same, again[:-1], strict=True))
    for other in (draw(1), draw(0, "seed=1")):
        assert not any(torch.equal(a, b) for a, b in zip(same, other[:-1], strict=True))
    index, flip = found(y)
    dropped = label == -1
    assert index.unique().numel() == 140 and 40 < flip.sum() < 100 and 2 < dropped.sum() < 30
    assert torch.equal(label[~dropped], labels[index][~dropped]) and first[-1] is None
    assert abs(level.mean()) < 0.4 and abs(noise.std() - 1) < 0.05 and noise.shape == y.shape
    # Without flips, label dropout or either all else stays; so it does with augmentation.
    plain = draw(0, "flip=false", "label_dropout=0")
    assert torch.equal(plain[3], labels[index]) and torch.equal(plain[0], torch.where(
        flip[:, None, None, None], y.flip(-1), y))
    *augmented, told = draw(0, "augment=0.5")
    assert torch.equal(told, draw(0, "augment=0.5", size=35)[-1]) and told.shape == (140, 9)
    assert all(torch.equal(a, b) for a, b in zip(same[1:3], augmented[1:3], strict=True))
    for i in range(9):                      # Each of them in some of the images.
        assert 10 < (told[:, i] != 0).sum() < 100
    untouched = (told[:, 1:] == 0).all(1) & ~dropped
    flipped = torch.where(told[:, :1, None, None] == 1, plain[0].flip(-1), plain[0])
    close = (augmented[0] - flipped).abs().amax((1, 2, 3)) < 1e-4
    assert untouched.any() and close[untouched].all() and (~close).sum() > 70
    # Dropout shares nothing with the noise.
    assert diffusion.derive_seed(0, 1, train.DROPOUT, 0) != diffusion.derive_seed(0, 1, data.NOISE)
