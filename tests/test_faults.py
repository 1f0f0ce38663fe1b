"""What docs/reliability.md promises: whatever happens, what comes out is what an undisturbed run
gives, or one line that says what is wrong."""

import functools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import conftest
import pytest
import torch
from conftest import last_step, metrics, processes_of, refused, run, started, succeed, wait_until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import assert_same, equal
import train
from edm2 import checkpoint, diffusion
from edm2.config import load_config

def config_in(folder, net_type="UNetE", **changes):
    """A config of 12 epochs of 20 steps with all that is random in them, and many saves."""
    folder.mkdir(exist_ok=True)
    return conftest.tiny_config(folder, net_type, **{
        "flip": True, "network": {"dropout": 0.2, "n_channels": 16}, "n_epoch": 12, "tref_epoch": 2,
        "batch_size": 70, "save_every": 4, "save_minutes": 1e-3, "log_every": 3} | changes)

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(processes): the save_dir of an undisturbed run."""
    @functools.cache
    def train_it(processes=None):
        path = config_in(tmp_path_factory.mktemp("whole"))
        succeed("train.py", "--config", path, processes=processes)
        return path.parent / "run"
    return train_it

def lines_of(folder):
    """The command's own lines in folder/err, which holds no traceback of it."""
    text = (folder / "err").read_text()
    assert '/train.py", line' not in text, text[-3000:]
    return re.findall(r"train\.py(?: \(process \d\))?: .*", text)

def newest(path):
    """The newest whole checkpoint of the run of a config."""
    return checkpoint.load(checkpoint.newest(load_config(path)))

def content(folder):
    """Every file of a folder and what it holds."""
    return {str(path.relative_to(folder)): torch.load(path) if path.suffix == ".pth" else
            path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

def kill_often(n, progress, folder, *command, processes=None):
    """Kill a command n times, some time after progress, or earlier; return what it printed."""
    draw, said = random.Random(0), ""
    for i in range(n):
        before = progress()
        with started(folder, *command, processes=processes) as process:     # In the end it kills.
            if i % 5 < 4:
                wait_until(lambda before=before: progress() > before)
            time.sleep(draw.uniform(0, 0.3 if i % 5 < 4 else 3 * (processes or 1)))
            assert process.poll() is None
        said += (folder / "out").read_text()
    return said

@pytest.mark.slow
@pytest.mark.parametrize("processes", [None, 2])
def test_killed_at_twenty_random_moments(tmp_path, whole, processes):
    """In a step, a save, a sample grid or the start-up."""
    folder, command = tmp_path / "run", ["train.py", "--config", config_in(tmp_path)]
    said = kill_often(20, lambda: last_step(folder), tmp_path, *command, processes=processes)
    begun = [int(step) for step in re.findall(r"after step (\d+)\n", said)]
    assert len(set(begun)) > 10 and begun == sorted(begun)
    # A real process: in less than its start-up, in one second, two event files have no order.
    assert "going on" in succeed(*command, processes=processes, restarts=0)
    assert_same(whole(processes), folder, 11)
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == [
        row["step"] for row in metrics(folder)] == sorted({*range(3, 241, 3), *range(20, 241, 20)})
    for part, name in (("ckpts", "model_{}.pth"), ("grids", "{:04}.png")):
        assert {p.name for p in (folder / part).iterdir()} == set(map(name.format, (0, 4, 8, 11)))

@pytest.mark.parametrize(("name", "processes", "rank", "restarts"), [
    *((name, None, None, 0) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        ("SIGTERM", 2, None, 0), ("SIGINT", 2, None, 0), ("SIGUSR1", 2, "1", 0),
        ("SIGKILL", 2, "1", 0), ("SIGKILL", 2, "0", 1)])])
def test_a_signal(tmp_path, whole, name, processes, rank, restarts):
    """To a lone process, to torchrun (whose own exit code is 1), to one of its: it saves, leaves.
    A process that dies ends the job within a minute, or torchrun starts it again."""
    kills, number, folder = name == "SIGKILL", signal.Signals[name], tmp_path / "run"
    command = ["train.py", "--config", config_in(tmp_path, save_minutes=1e-3 if kills else 10)]
    with started(tmp_path, *command, processes=processes, restarts=restarts) as process:
        wait_until(lambda: last_step(folder) >= 24)
        began = time.monotonic()
        victims = processes_of(str(command[-1])).items()
        os.kill(next(pid for pid, its in victims if its == rank), number)
        assert process.wait(60) == (0 if restarts else 1 if processes else 128 + number)
        assert not processes_of(str(command[-1])) and (kills or time.monotonic() - began < 10)
    lines, step = lines_of(tmp_path), newest(command[-1])["step"]
    words = ["lost contact with another process"] if kills else [
        f"stopped by {name} after step {step} ", f"saved in {folder}", "command goes on"]
    assert 1 <= len(lines) <= (processes or 1) - kills      # At most one of each process.
    assert all(word in line for line in lines for word in words)
    if restarts:
        assert "going on" in (tmp_path / "out").read_text()
    else:
        out = succeed(*command, "--set", "n_epoch=5", processes=processes)
        assert step >= 20 and f"after step {step}\n" in out
    assert_same(whole(processes), folder, 4)
    assert not list(folder.rglob(".*.tmp"))

def test_a_signal_that_nohup_ignores(tmp_path):
    path, folder = config_in(tmp_path, n_epoch=2), tmp_path / "run"
    args = ["nohup", *conftest.launch("train.py", "--config", path)["args"]]
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: last_step(folder) >= 3)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0 and last_step(folder) == 40

@pytest.mark.parametrize(("changes", "seen"), [
    ({"n_sample": 5000}, "ckpts/latest.pth"),
    ({"eval_every": 1, "eval": {"fid": 5000, "features": "pixels"}}, "grids/0000.png")])
def test_a_signal_in_a_sample_grid_or_an_evaluation(tmp_path, whole, changes, seen):
    """It ends at once; the same command goes on there, and makes no step."""
    path, evaluated = config_in(tmp_path, n_epoch=1, save_minutes=10, **changes), "eval" in changes
    ckpts, grid = tmp_path / "run" / "ckpts", tmp_path / "run" / "grids" / "0000.png"
    with started(tmp_path, "train.py", "--config", path) as process:
        wait_until((tmp_path / "run" / seen).exists)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 143
    (line,) = lines_of(tmp_path)
    assert "stopped by SIGTERM" in line and "the same command goes on" in line
    assert [p.name for p in ckpts.iterdir()] == ["latest.pth"] and grid.exists() == evaluated
    command = ["train.py", "--config", path, "--set", "n_sample=4", "--set", "eval.fid=0"]
    assert "after step 20\n" in succeed(*command) and "trained already" in succeed(*command)
    assert grid.exists() and len(metrics(tmp_path / "run", "heldout_loss")) == evaluated
    assert [p.name for p in ckpts.iterdir()] == ["model_0.pth"]
    assert_same(whole(), tmp_path / "run", 0)

@pytest.mark.parametrize("save_minutes", [1e-3, 10])
def test_a_full_disk(tmp_path, whole, request, save_minutes):
    """12 MB in memory, filled to the last byte: in a save, and in a line of metrics."""
    disk, folder = tmp_path / "disk", tmp_path / "disk" / "run"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk]
    if os.geteuid() or subprocess.run(mount).returncode:
        pytest.skip("no right to mount a small file system")
    request.addfinalizer(lambda: subprocess.run(["umount", "-l", disk]))
    path = config_in(tmp_path, save_dir=str(folder), save_minutes=save_minutes)
    with started(tmp_path, "train.py", "--config", path) as process:
        wait_until(lambda: last_step(folder) >= 23)
        with open(disk / "filler", "wb", 0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(4096))
        assert process.wait(30) == 2
    (line,) = lines_of(tmp_path)
    assert "No space left on device" in line and str(folder) in line
    assert "Traceback" not in (tmp_path / "err").read_text()
    assert all(map(checkpoint.load, (folder / "ckpts").iterdir()))
    (disk / "filler").unlink()
    assert "going on" in succeed("train.py", "--config", path, "--set", "n_epoch=5")
    assert_same(whole(), folder, 4)

@pytest.mark.parametrize("name", ["latest.pth", "model_0.pth", "0000.png"])
def test_killed_before_a_file_has_its_name(tmp_path, whole, name):
    """The same command then gives what a run without a kill gives."""
    path, folder = config_in(tmp_path, n_epoch=1, save_minutes=10), tmp_path / "run"
    code = (f"import os, train\nos.fsync = lambda fd: '.{name}.' in os.readlink(f'/proc/self/fd/'"
            " + str(fd)) and os.kill(os.getpid(), 9)\ntrain.command(train.main)()")
    args = [sys.executable, "-c", code, "--config", path]
    assert subprocess.run(args, cwd=conftest.ROOT).returncode == -signal.SIGKILL
    (left,) = folder.rglob(f"*{name}*")
    assert left.name.endswith(".tmp")
    succeed("train.py", "--config", path)
    assert_same(whole(), folder, 0)
    grid = {"0000.png": content(whole() / "grids")["0000.png"]}
    assert content(folder / "grids") == grid and list(content(folder / "ckpts")) == ["model_0.pth"]

@pytest.mark.slow
@pytest.mark.parametrize("processes", [None, 2])
def test_sampling_killed_anywhere_gives_the_same_folder(trained, tmp_path, processes):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command = ["sample.py", "--config", trained / "config.yaml", "--n_samples", 1500, "--npz"]
    succeed(*command, "--out", whole)
    command += ["--out", parts]
    kill_often(4, lambda: len(list(parts.rglob("0*.png"))), tmp_path, *command, processes=processes)
    succeed(*command, processes=processes)
    assert content(whole) == content(parts)
    assert len(content(parts)) == 1500 + 4      # grid.png, samples.npz, settings.json, .lock

def test_two_runs_in_one_folder(trained, tmp_path):
    path, images = config_in(tmp_path, n_epoch=1000, save_every=1000), tmp_path / "images"
    sampling = ["--config", trained / "config.yaml", "--n_samples", 3000, "--out", images]
    for folder, seen, *command in (
            (tmp_path / "run", "metrics.jsonl", "train.py", "--config", path),
            (images, "images/000000.png", "sample.py", *sampling)):
        with started(tmp_path, *command) as first:
            wait_until((folder / seen).exists)
            refused(*command, words=[f"{folder} is in use by another run"])
            assert first.poll() is None

@pytest.fixture
def copied(trained, tmp_path):
    """The command and Config of a copy of the trained run, and the folder of its checkpoints."""
    shutil.copytree(trained / "run", tmp_path / "run")
    flags = ["--config", trained / "config.yaml", "--set", f"save_dir={tmp_path / 'run'}"]
    return ["train.py", *flags], load_config(flags[1], [flags[3]]), tmp_path / "run" / "ckpts"

def damage(path, draw):
    """Cut a file somewhere, or flip bits of one byte or five, anywhere."""
    data = bytearray(path.read_bytes())
    for _ in range(n := draw.choice([0, 1, 1, 5])):
        data[draw.randrange(len(data))] ^= draw.randrange(1, 256)
    path.write_bytes(data if n else data[:draw.randrange(len(data))])

def test_sixty_damages_are_detected(copied, capsys):
    """Of an epoch's checkpoint and of latest.pth: the one before is taken."""
    (_, config, ckpts), draw, detected = copied, random.Random(0), 0
    state = checkpoint.load(ckpts / "model_3.pth")
    whole = (ckpts / "model_3.pth").rename(ckpts / "whole").read_bytes()
    for i in range(60):
        path = ckpts / ("latest.pth" if i % 2 else "model_3.pth")
        path.write_bytes(whole)
        damage(path, draw)
        try:
            assert equal(checkpoint.load(path), state)
        except checkpoint.Damaged as e:
            assert checkpoint.newest(config) == ckpts / "model_2.pth"
            assert str(path) in str(e) and str(path) in capsys.readouterr().err
            detected += 1
        path.unlink()
    assert detected >= 55

def test_training_goes_on_from_the_one_before_a_damaged_one(copied, trained):
    command, _, ckpts = copied
    damage(ckpts / "model_3.pth", random.Random(1))
    refused("sample.py", *command[1:], words=["model_3.pth is damaged"])
    done = run(*command)
    assert done.returncode == 0 and "after step 30\n" in done.stdout
    assert re.findall(r"train\.py: .*/(.*\.pth) is damaged", done.stderr) == ["model_3.pth"]
    assert_same(trained / "run", ckpts.parent, 3)
    for path in ckpts.iterdir():            # Only damaged ones.
        path.write_bytes(path.read_bytes()[:-1])
    done = run(*command)
    assert done.returncode == 2 and "only damaged or foreign" in done.stderr.splitlines()[-1]
    assert set(re.findall(r"model_(\d)\.pth is damaged", done.stderr)) == {"0", "1", "2", "3"}
    shutil.rmtree(ckpts)
    (ckpts / "latest.pth").mkdir(parents=True)      # The system cannot read it: it may be whole.
    refused(*command, words=["cannot read", "latest.pth", "directory"])

def test_a_pickle_that_would_run_code_does_not(copied, tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return os.mkdir, ("ran",)

    command, _, ckpts = copied
    monkeypatch.chdir(tmp_path)
    checkpoint.save(ckpts / "model_3.pth", checkpoint.load(ckpts / "model_3.pth") | {"ema": Evil()})
    refused("sample.py", *command[1:], cwd=tmp_path, words=["model_3.pth is refused"])
    assert "model_3.pth is refused" in run(*command, cwd=tmp_path).stderr
    assert not (tmp_path / "ran").exists()
    torch.save(Evil(), "evil.pth")
    torch.load("evil.pth", weights_only=False)      # It would have.
    assert (tmp_path / "ran").exists()

def test_checkpoints_of_others_are_refused_with_what_differs(copied):
    """Of another config, other data, another network."""
    command, config, ckpts = copied
    command += ["--set", "n_epoch=5"]               # Which may differ.
    for key, there, here in (("network.dropout", 0.0, 0.3), ("lrate", 0.01, 0.5), ("seed", 0, 1),
                             ("diffusion.sigma_data", 0.85, 0.8)):
        refused(*command, "--set", f"{key}={here}", words=[
            f"({key} {there} there, {here} here)", config.save_dir])
    state = checkpoint.load(ckpts / "model_3.pth")
    done = run(*command, "--amp_dtype", "bfloat16", "--max_steps", 41)
    assert "trained in float32 and goes on in bfloat16 mixed precision" in done.stderr
    checkpoint.save(ckpts / "model_3.pth", state | {"n_images": 9})
    refused(*command, words=["9 images", "1,437", config.save_dir])
    name = next(iter(state["network"]))
    state["network"][name] = torch.zeros(1)
    checkpoint.save(ckpts / "model_3.pth", state)
    for script, *flags in (command, ["sample.py", *command[1:], "--weights", "model"]):
        refused(script, *flags, words=["of another network", f"differ in {name}"])

def test_fresh_load_epoch_and_a_smaller_n_epoch_lose_nothing(copied):
    command, _, ckpts = copied
    often, before = ["--set", "save_minutes=1e-9", "--max_steps"], content(ckpts)
    refused(*command, "--fresh", words=["--fresh", ckpts.parent])
    # load_epoch is for the first start: after a stop it goes on from there, not from epoch 0.
    done = run(*command, "--set", "load_epoch=0", *often, 15)
    assert "after step 10\n" in done.stdout
    assert "model_2.pth is of a later step than 10: renamed to model_2.pth.old" in done.stderr
    assert "after step 15\n" in succeed(*command, "--set", "load_epoch=0")
    new, old = (torch.load(ckpts / f"model_3.pth{end}") for end in ("", ".old"))
    assert equal(old, before["model_3.pth"]) and all(
        equal(old[key], new[key]) for key in ("network", "ema", "uncertainty", "optimizer"))
    succeed(*command, "--set", "n_epoch=9", *often, 43)
    before = content(ckpts)
    assert "trained already" in succeed(*command, "--set", "n_epoch=1")
    assert equal(content(ckpts), before) and before["latest.pth"]["step"] == 43

def test_a_signal_in_the_start_up(copied, monkeypatch):
    """While the newest checkpoint is looked through: it is not damaged, the command was stopped."""
    command, _, _ = copied
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda file: os.kill(os.getpid(), 15))
    done = run(*command, "--set", "n_epoch=9")
    assert done.returncode == 128 + signal.SIGTERM and "damaged" not in done.stderr

def poison(patch, value, steps):
    """From now on one gradient of these steps is `value`."""
    class Poisoned(train.Run):
        def __init__(self, *args):
            super().__init__(*args)
            stem = self.denoiser.net.stem.weight
            one = torch.arange(stem.numel()).view_as(stem) == 7
            stem.register_hook(lambda grad: grad.masked_fill(one & (self.step in steps), value))
    patch.setattr(train, "Run", Poisoned)

@pytest.mark.parametrize(("value", "log_every"), [("nan", 1), ("inf", 1000), ("-inf", 1000)])
def test_twenty_bad_gradients_in_a_row_end_the_run(tmp_path, monkeypatch, value, log_every):
    """What they led to until then can go on; whoever looks late hears of it all the same."""
    path = config_in(tmp_path, save_minutes=1e-9, log_every=log_every, n_epoch=2)
    poison(monkeypatch, float(value), range(1, 40))
    refused("train.py", "--config", path, words=["NaN or Inf", "20 steps in a row", "step 21"])
    state = newest(path)
    assert (state["step"], state["bad_steps"], state["ema_step"]) == (20, 19, 20)
    assert all(part.isfinite().all() for part in state["network"].values())
    monkeypatch.undo()
    poison(monkeypatch, float(value), [20])
    late = ["--set", "save_minutes=10", "--set", "log_every=1000"]
    refused("train.py", "--config", path, *late, words=["20 steps in a row", "step 40"])
    monkeypatch.undo()
    assert "after step 20\n" in succeed("train.py", "--config", path)

def test_a_bad_gradient_is_zero_for_adam_and_the_others_count(tmp_path, monkeypatch):
    """Its weight moves as Adam moves it with gradient 0, all others as ever."""
    states = []
    for value in (0.0, float("nan")):
        path = config_in(tmp_path / str(value), "UNetC", save_minutes=1e-9)
        poison(monkeypatch, value, [1])
        succeed("train.py", "--config", path, "--max_steps", 2)
        states.append(newest(path))
        monkeypatch.undo()
    assert [state["bad_steps"] for state in states] == [0, 1]
    assert all(equal(states[0][key], states[1][key]) for key in ("network", "ema", "optimizer"))

def test_a_run_that_had_bad_steps_goes_on_exactly(tmp_path, monkeypatch):
    """Under float16 a bad step is left out and halves the scale; the scaler and the number of bad
    steps in a row are in the checkpoint; a good step ends the row."""
    states = []
    poison(monkeypatch, float("inf"), range(5))
    for name, step in (("whole", 8), ("parts", 3), ("parts", 5), ("parts", 8)):
        path = config_in(tmp_path / name, "UNetC", batch_size=8, save_minutes=1e-9)
        succeed("train.py", "--config", path, "--amp_dtype", "float16", "--max_steps", step)
        states.append(newest(path))
    whole, _, bad, parts = states
    torch.manual_seed(0)
    start = diffusion.build(load_config(path)).net.state_dict()
    assert bad["scaler"]["scale"] == 64 / 2 ** 5 and bad["bad_steps"] == 5
    assert equal(bad["network"], start) and not equal(parts["network"], start)
    assert parts["bad_steps"] == 0 and all(equal(whole[key], parts[key]) for key in (
        "network", "ema", "ema_step", "uncertainty", "optimizer", "scaler", "bad_steps"))
