"""train.py as users run it: real processes, one, two and four of them."""

import contextlib
import copy
import math

import numpy as np
import pytest
import torch
from conftest import DATA, NETS, ROOT, distance, metrics, needs_cifar10, run, succeed, tiny_config, weights
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import checkpoint
import edm
import files
import logs
import options
import runtime
import train as train_script

ALL = ["network", "ema", "uncertainty"]


def same_run(tmp_path, name, net_type, *args, processes=None, **changes):
    """Train the tiny config for 20 steps in a folder of its own; return its save_dir."""
    (tmp_path / name).mkdir()
    path = tiny_config(tmp_path / name, net_type, flip=True, **changes)
    succeed("train.py", "--config", path, *args, processes=processes)
    return tmp_path / name / "run"


@pytest.mark.slow
@pytest.mark.parametrize("net_type", NETS)
def test_the_weights_do_not_depend_on_the_processes_or_passes(tmp_path, net_type):
    one = same_run(tmp_path, "one", net_type)
    assert metrics(one)[-1]["step"] == 20
    start = same_run(tmp_path, "start", net_type, "--set", "lrate=1e-12")
    assert distance(weights(one, 1), weights(start, 1)) > 0.01      # It does train.
    others = [same_run(tmp_path, "two", net_type, processes=2), same_run(tmp_path, "four", net_type, processes=4),
              same_run(tmp_path, "quarter", net_type, "--batch_gpu", 35),
              same_run(tmp_path, "uneven", net_type, "--batch_gpu", 30),
              same_run(tmp_path, "two_in_passes", net_type, "--batch_gpu", 30, processes=2)]
    for other in others:
        for key in ALL:
            assert distance(weights(one, 1, key), weights(other, 1, key)) < 1e-4, (other, key)
        for a, b in zip(metrics(one), metrics(other), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        # Each process draws its share of the grid from its own EMA.
        grids = [np.asarray(Image.open(folder / "grids" / "0001.png")).astype(int) for folder in (one, other)]
        assert np.abs(grids[0] - grids[1]).max() <= 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two epochs with a checkpoint each."""
    return same_run(tmp_path_factory.mktemp("trained"), "whole", "UNetE", save_every=1)


def test_outputs_of_a_run(trained):
    assert sorted(p.name for p in trained.iterdir()) == [
        ".lock", "ckpts", "grids", "metrics.jsonl", "tensorboard"]
    assert sorted(p.name for p in (trained / "ckpts").iterdir()) == ["model_0.pth", "model_1.pth"]
    rows = metrics(trained)
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    assert set(rows[0]) == {"step", "epoch", "Mimg", "loss", "loss_unweighted", "lr", "grad_norm", "ema_decay",
                            "img_per_s", "step_time_s", "TFLOP_per_s", "MFU", "gpu_memory_GB"}
    assert rows[-1]["Mimg"] == 20 * 140 / 1e6 and rows[-1]["epoch"] == 1
    assert rows[0]["lr"] == pytest.approx(1e-2) and 0 < rows[-1]["ema_decay"] < 0.99
    assert rows[-1]["loss_unweighted"] < rows[0]["loss_unweighted"]
    flops = rows[-1]["img_per_s"] * edm.cost(options.load_config(trained.parent / "config.yaml"))[1] * 1e9
    assert rows[-1]["TFLOP_per_s"] == pytest.approx(flops / 1e12) and rows[-1]["MFU"] is None      # Of a CPU not known.
    board = EventAccumulator(str(trained / "tensorboard"))
    board.Reload()
    assert {"loss", "loss_unweighted", "lr", "grad_norm", "ema_decay", "img_per_s", "step_time_s"} <= set(
        board.Tags()["scalars"])
    assert [event.step for event in board.Scalars("loss")] == [5, 10, 15, 20]
    assert board.Tags()["images"] == ["samples above real images"]
    assert Image.open(trained / "grids" / "0001.png").size == (2 * 34 + 2, 2 * (2 * 34 + 2))     # 4 above 4.


def test_checkpoint_holds_plain_tensors_and_values_once(trained):
    state = torch.load(trained / "ckpts" / "model_1.pth", weights_only=True)

    def plain(value):
        if isinstance(value, dict):
            return all(plain(k) and plain(v) for k, v in value.items())
        if isinstance(value, list | tuple):
            return all(map(plain, value))
        return value is None or type(value) in (torch.Tensor, int, float, str, bool)

    state["network"] = dict(state["network"])
    assert plain(state)
    assert set(state) == {*ALL, "ema_step", "optimizer", "scaler", "step", "epoch", "loss_sum", "window", "bad_steps",
                          "posthoc", "n_images", "precision", "config"}
    assert (state["step"], state["epoch"], state["ema_step"]) == (20, 1, 20)
    assert state["config"] == options.load_config(trained.parent / "config.yaml")
    net_names = set(state["network"])
    assert net_names == set(state["ema"])
    assert not any(name.startswith(("module.", "_orig_mod.", "net.")) for name in net_names)


def test_going_on_gives_the_same_run(trained, tmp_path):
    """Epoch 0 alone, then the same command for two: bitwise what one run of two gives, every step logged once."""
    parts = same_run(tmp_path, "parts", "UNetE", "--set", "n_epoch=1", save_every=1)
    config = tmp_path / "parts" / "config.yaml"
    assert "going on" in succeed("train.py", "--config", config)
    for key in ALL:
        assert distance(weights(trained, 1, key), weights(parts, 1, key)) == 0
    a, b = (weights(folder, 1, "optimizer")["state"] for folder in (trained, parts))
    assert all(torch.equal(a[i][name], b[i][name]) for i in a for name in a[i])
    assert [row["step"] for row in metrics(parts)] == [5, 10, 15, 20]
    assert [row["loss"] for row in metrics(parts)] == [row["loss"] for row in metrics(trained)]
    assert "already" in succeed("train.py", "--config", config)
    # By hand, from epoch 0 again.
    succeed("train.py", "--config", config, "--set", "load_epoch=0")
    assert distance(weights(trained, 1), weights(parts, 1)) == 0
    assert [row["step"] for row in metrics(parts)] == [5, 10, 15, 20]


def test_a_cut_line_of_metrics_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": \xff')
    logs.Log(tmp_path, 2, True).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_another_config_does_not_go_on(trained):
    config = trained.parent / "config.yaml"
    done = run("train.py", "--config", config, "--set", "lrate=0.5", "--set", "n_epoch=9")
    assert done.returncode == 2 and "lrate 0.01 there, 0.5 here" in done.stderr
    assert "n_epoch" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_raw_and_averaged_weights_differ(trained):
    assert 1e-4 < distance(weights(trained, 1), weights(trained, 1, "ema")) < 0.5


def test_dry_run_describes_and_writes_nothing(tmp_path):
    path = tiny_config(tmp_path)
    out = succeed("train.py", "--config", path, "--dry_run", "--use_amp", "--amp_dtype", "bfloat16")
    for word in ("batch_size: 140", "parameters", "GFLOP per training image", "1 process", "bfloat16"):
        assert word in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml"]
    assert "2 processes" in succeed("train.py", "--config", path, "--dry_run", processes=2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("net_type", NETS)
def test_mixed_precision_trains(tmp_path, net_type, dtype):
    run_dir = same_run(tmp_path, "amp", net_type, "--use_amp", "--amp_dtype", dtype, n_epoch=1)
    assert metrics(run_dir)[-1]["loss_unweighted"] < metrics(run_dir)[0]["loss_unweighted"]
    assert bool(weights(run_dir, 0, "scaler")) == (dtype == "float16")
    assert {v.dtype for v in weights(run_dir, 0).values()} == {torch.float32}


PREDECESSOR = """
# dataset params
dataset: 'cifar'
classes: 10

# model params
model_type: 'EDM'
net_type: 'UNetE'
diffusion:
  sigma_data: 0.5
  p_mean: -1.2
  p_std: 1.2
  sigma_min: 0.002
  sigma_max: 80
  rho: 7
  S_min: 0.01
  S_max: 1
  S_noise: 1.007
network:
  image_shape: [3, 32, 32]
  n_channels: 32      # 128 in a real run
  ch_mults: [1, 2, 2, 2]
  is_attn: [False, True, False, False]
  dropout: 0.13
  n_blocks: 1

# training params
n_epoch: 2000
batch_size: 8
lrate: 2.0e-2
warm_epoch: 200
tref_epoch: 400
load_epoch: -1
flip: True
ema: 0.9993
optim: 'Adam'
optim_args:
  betas: [0.9, 0.99]

# testing params
n_sample: 30
save_dir: './output_C10'
save_model: True

# linear probe
linear:
  n_epoch: 15
  batch_size: 128
  lrate: 1.0e-3
  timestep: 4
  blockname: 'out_6'
"""


@needs_cifar10
def test_a_config_of_the_predecessor_runs_unchanged(tmp_path):
    (tmp_path / "E.yaml").write_text(PREDECESSOR)
    (tmp_path / "data").symlink_to(DATA)            # data_root is ./data where the file does not say.
    out = succeed("train.py", "--config", "E.yaml", "--max_steps", "2", cwd=tmp_path)
    assert "stopped after step 2" in out
    assert [row["step"] for row in metrics(tmp_path / "output_C10")] == [2]


@needs_cifar10
@pytest.mark.slow
def test_the_full_network_trains_on_cifar10(tmp_path):
    """39.5M parameters, batch 8, on the CPU: the loss is finite and falls over 30 steps."""
    out = succeed("train.py", "--config", ROOT / "config" / "cifar10" / "C.yaml", "--set", f"data_root={DATA}",
                  "--set", f"save_dir={tmp_path}", "--set", f"cache_dir={tmp_path}", "--set", "batch_size=8",
                  "--set", "warm_epoch=0",
                  "--set", "log_every=10", "--max_steps", "30", timeout=1200)
    assert "39,509,888 parameters, 42.6 GFLOP" in out
    losses = [row["loss_unweighted"] for row in metrics(tmp_path)]
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    assert losses[2] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("letter", "CEG")
def test_the_digits_configs_learn(tmp_path, letter):
    """In a fifth of the demo's epochs the unweighted loss falls to 60 % or less of what it was after the first."""
    succeed("train.py", "--config", ROOT / "config" / "digits" / f"{letter}.yaml", "--set", "n_epoch=12",
            "--set", f"save_dir={tmp_path}", "--set", "log_every=1000")
    losses = [row["loss_unweighted"] for row in metrics(tmp_path)]          # One row an epoch.
    assert len(losses) == 12 and losses[-1] < 0.6 * losses[0], losses


# ----------------------------------------------------------------------------------------------------------------------
# In this process: what a step does.

def training(tmp_path, net_type="UNetE", dtype=None, **changes):
    """A Training of the tiny config on random images."""
    path = tiny_config(tmp_path, net_type, **changes)
    argv = ["train.py", "--config", str(path), *(["--use_amp", "--amp_dtype", dtype] if dtype else [])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", argv)
        args = train_script.parse_arguments()
    rt = runtime.Runtime(0, 1, 0, 1, torch.device("cpu"))
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (16, 1, 8, 8), np.uint8))
    return train_script.Training(options.load_config(path), args, rt, images)


def poison(t, value):
    """Make one gradient of every coming step `value`."""
    weight = t.edm.net.stem.weight
    return weight.register_hook(lambda grad: torch.full_like(grad, value))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bad_gradients_become_zero_and_then_stop_the_run(tmp_path, value):
    t = training(tmp_path, batch_size=8)
    index = torch.arange(8)
    t.training_step(index)
    poison(t, value)
    for _ in range(train_script.MAX_BAD_STEPS - 1):
        t.training_step(index)
        t.check_bad_steps()
    assert all(torch.isfinite(p).all() for p in t.parameters)
    assert t.ema.step.item() == t.step == train_script.MAX_BAD_STEPS
    t.training_step(index)
    with pytest.raises(runtime.UserError, match="20 steps in a row"):
        t.check_bad_steps()


def test_a_bad_gradient_is_zero_for_adam_and_the_others_count(tmp_path):
    """One NaN among the gradients: its weight moves as Adam moves it with gradient 0, all others as ever."""
    good, bad = (training(tmp_path, "UNetC", batch_size=8) for _ in range(2))
    for t in (good, bad):
        t.training_step(torch.arange(8))
    mask = torch.zeros_like(bad.edm.net.stem.weight)
    mask[3, 1, 0, 2] = 1
    for t, value in ((good, 0.0), (bad, math.nan)):
        t.edm.net.stem.weight.register_hook(lambda grad, value=value: grad.masked_fill(mask.bool(), value))
        t.training_step(torch.arange(8))
    assert bad.bad_steps.item() == 1 and good.bad_steps.item() == 0
    for a, b in zip(good.parameters, bad.parameters, strict=True):
        assert torch.equal(a, b)


def test_a_run_that_had_bad_steps_goes_on_exactly(tmp_path):
    """Scale and growth of the GradScaler, and the count of bad steps in a row, are in the checkpoint."""
    whole, parts = (training(tmp_path, "UNetE", "float16", batch_size=8) for _ in range(2))
    handle = poison(whole, math.inf)
    for step in range(8):
        if step == 5:
            handle.remove()
            parts.restore(copy.deepcopy(whole.state()))
            assert parts.scaler.get_scale() == 2 and parts.bad_steps.item() == 5
            assert parts.scaler.state_dict() == whole.scaler.state_dict()
        whole.training_step(torch.arange(8))
    for _ in range(3):
        parts.training_step(torch.arange(8))
    whole.settle_ema()
    parts.settle_ema()
    assert parts.bad_steps.item() == 0 and parts.ema.step.item() == whole.ema.step.item() == 3
    assert parts.scaler.state_dict() == whole.scaler.state_dict()
    for key in ALL:
        assert distance(whole.state()[key], parts.state()[key]) == 0


def test_what_only_bad_steps_led_to_is_not_saved(tmp_path, monkeypatch):
    """A save in the steps before the guard looks would keep a run from ever going on."""
    t = training(tmp_path, batch_size=8, save_minutes=1e-9, log_every=1000, n_epoch=1)
    t.images = t.images.repeat(50, 1, 1, 1)
    t.steps_per_epoch = t.total_steps = 100
    poison(t, math.nan)

    class NoSignals:
        def __init__(self, *_):
            self.unsaved = False

        def agree(self, save):
            return 0, save

    monkeypatch.setattr(runtime, "Signals", NoSignals)
    log = logs.Log(files.make_folder(t.config["save_dir"]), 0, True)
    saver = checkpoint.Saver(t.config, log)
    with pytest.raises(runtime.UserError, match="20 steps in a row"), contextlib.closing(saver):
        train_script.run_steps(t, None, log, saver, t.rt.bar(100, "step"))
    state = checkpoint.load(checkpoint.newest(t.config))
    assert 0 < state["bad_steps"] < train_script.MAX_BAD_STEPS
    t.images = t.images[:state["n_images"]]
    t.restore(state | {"bad_steps": train_script.MAX_BAD_STEPS})
    assert t.bad_steps.item() == 0


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_going_on_in_another_memory_layout(tmp_path, dtype):
    whole, parts = (training(tmp_path, "UNetE", dtype, batch_size=8) for _ in range(2))
    other = training(tmp_path, "UNetE", dtype, batch_size=8)
    other.edm.to(memory_format=torch.contiguous_format)
    for t, steps in ((whole, 6), (parts, 3)):
        for _ in range(steps):
            t.training_step(torch.arange(8))
    other.restore(copy.deepcopy(parts.state()))
    for _ in range(3):
        other.training_step(torch.arange(8))
    assert distance(whole.state()["network"], other.state()["network"]) < (1e-5 if dtype is None else 1e-2)


def test_a_good_step_ends_the_row(tmp_path):
    t = training(tmp_path, batch_size=8)
    for _ in range(3):
        t.count_bad_steps(torch.tensor(False))
    assert t.bad_steps.item() == 3
    t.count_bad_steps(torch.tensor(True))
    assert t.bad_steps.item() == 0


def test_grad_scaler_leaves_out_a_bad_step_and_its_ema(tmp_path):
    t = training(tmp_path, "UNetC", dtype="float16", batch_size=8)
    index = torch.arange(8)
    while t.ema.step.item() < 3:                                    # The scale finds its level.
        t.training_step(index)
    t.settle_ema()
    poison(t, math.nan)
    before = {k: v.clone() for k, v in t.edm.net.state_dict().items()}
    average = {k: v.clone() for k, v in t.ema.ema_model.state_dict().items()}
    scale, ema_step = t.scaler.get_scale(), t.ema.step.item()
    t.training_step(index)
    t.settle_ema()
    assert t.scaler.get_scale() == scale / 2 and t.ema.step.item() == ema_step and t.bad_steps.item() == 1
    assert all(torch.equal(before[k], v) for k, v in t.edm.net.state_dict().items())
    assert all(torch.equal(average[k], v) for k, v in t.ema.ema_model.state_dict().items())


@pytest.mark.parametrize("net_type", ["UNetE", "UNetG"])
def test_forced_weights_have_unit_mean_square_after_a_step_s_forward_pass(tmp_path, net_type):
    t = training(tmp_path, net_type, batch_size=8)
    for _ in range(3):
        t.training_step(torch.arange(8))
    level, noise, _ = t.draw()
    t.edm(torch.randn(8, 1, 8, 8), level, noise)
    for weight in (p for p in t.parameters if p.ndim > 0):
        torch.testing.assert_close(weight.square().mean(tuple(range(1, weight.ndim))), torch.ones(len(weight)),
                                   rtol=0, atol=1e-3)


def test_learning_rate(tmp_path):
    t = training(tmp_path, batch_size=8, n_epoch=1000, lrate=0.1, warm_epoch=5, tref_epoch=50)     # 2 steps an epoch.
    expected = {0: 0.01, 4: 0.05, 9: 0.1, 99: 0.1, 100: 0.1, 400: 0.05, 1600: 0.025}
    for step, lr in expected.items():
        t.step = step
        assert t.learning_rate() == pytest.approx(lr)
    t.config["tref_epoch"] = None
    assert t.learning_rate() == pytest.approx(0.1)
    t.config["warm_epoch"], t.step = 0, 0
    assert t.learning_rate() == pytest.approx(0.1)


def test_draws_are_functions_of_seed_and_step(tmp_path):
    t = training(tmp_path, batch_size=8, flip=True)
    first = t.draw()
    assert all(torch.equal(a, b) for a, b in zip(first, t.draw(), strict=True))
    assert 0 < first[2].sum() < 8 or t.config["batch_size"] == 8
    t.step = 1
    assert not any(torch.equal(a, b) for a, b in zip(first[:2], t.draw()[:2], strict=True))
    rt_rank_0 = runtime.mix(0, 1, train_script.DROPOUT, 0)
    assert rt_rank_0 != runtime.mix(0, 1, train_script.NOISE)          # Dropout shares nothing with the noise.
    t.step, t.config["seed"] = 0, 1
    assert not any(torch.equal(a, b) for a, b in zip(first[:2], t.draw()[:2], strict=True))


def test_gradient_is_that_of_the_sum_over_pixels_averaged_over_the_batch(tmp_path):
    t = training(tmp_path, "UNetC", batch_size=8)
    level, noise, _ = t.draw()
    y = t.images[:8].float() / 127.5 - 1
    loss, _ = t.edm(y, level, noise)
    (loss * 64).mean().backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in t.parameters]).item()
    t.optimizer.zero_grad()
    assert t.training_step(torch.arange(8)).item() == pytest.approx(expected, rel=1e-4)


def test_ema_is_that_of_ema_pytorch(tmp_path):
    """The average after each step is lerp(average, weights, 1 - decay), decay = min(beta, 1 - (1+k)^(-2/3))."""
    t = training(tmp_path, "UNetC", batch_size=8)
    t.training_step(torch.arange(8))                                # The first update copies the weights.
    average = {k: v.clone() for k, v in t.edm.net.state_dict().items()}
    for k in range(1, 5):
        t.training_step(torch.arange(8))
        decay = min(0.99, 1 - (1 + k) ** (-2 / 3))
        assert t.ema.get_current_decay() == pytest.approx(decay)
        for name, value in t.edm.net.state_dict().items():
            average[name] = decay * average[name] + (1 - decay) * value
    assert distance(average, t.ema.ema_model.state_dict()) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("net_type", "dtype"), [*((net_type, None) for net_type in NETS), ("UNetG", "bfloat16")])
def test_compiled_step_is_the_plain_step(tmp_path, net_type, dtype):
    plain, compiled = (training(tmp_path, net_type, dtype, batch_size=8) for _ in range(2))
    compiled.edm.compile()
    for _ in range(3 if dtype is None else 1):
        gradients = []
        for t in (plain, compiled):
            level, noise, _ = t.draw()
            loss, _ = t.edm(t.images[:8].float() / 127.5 - 1, level, noise)
            loss.sum().backward()
            gradients.append({name: p.grad for name, p in t.edm.named_parameters()} | {"loss": loss.detach()})
            t.optimizer.zero_grad()
            t.training_step(torch.arange(8))
        assert distance(*gradients) < (1e-5 if dtype is None else 2e-2)
    assert list(plain.state()["network"]) == list(compiled.state()["network"])
    if dtype is None:
        assert distance(plain.state()["network"], compiled.state()["network"]) < 1e-4


@pytest.mark.slow
def test_compiled_processes_give_the_plain_run(tmp_path):
    """Two processes with torch.compile, which DDP cuts into a graph for each of its buckets, against one without."""
    plain = same_run(tmp_path, "plain", "UNetG", "--no-compile", n_epoch=1)
    compiled = same_run(tmp_path, "compiled", "UNetG", "--compile", "--batch_gpu", 35, processes=2, n_epoch=1)
    for key in ALL:
        assert distance(weights(plain, 0, key), weights(compiled, 0, key)) < 1e-4
