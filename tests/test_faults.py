"""Full disks, kills in the middle of a save, damaged checkpoints; sampling and scoring that are stopped anywhere."""

import contextlib
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import kill_all, last_step, launch, metrics, run, started, succeed, tiny_config, wait_until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import checkpoint
import logs
import options
import train
from files import make_folder
from runtime import UserError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the config of a run of 4 epochs, a checkpoint each."""
    folder = tmp_path_factory.mktemp("trained")
    succeed("train.py", "--config", tiny_config(folder, "UNetG", n_epoch=4, save_every=1))
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# A disk that is full.

@pytest.fixture
def small_disk(tmp_path):
    """A file system of 12 MB, in memory, at tmp_path/disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk]).returncode:
        pytest.skip("no right to mount a small file system")
    yield disk
    kill_all(str(disk))
    subprocess.run(["umount", "-l", disk], check=True)


def fill(disk):
    """Fill a file system to the last byte."""
    with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (2 ** 20, 2 ** 10, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass
    with pytest.raises(OSError, match="No space left"):
        (disk / "more").write_text("x")
    (disk / "more").unlink()


@pytest.mark.slow
def test_a_full_disk(tmp_path, small_disk):
    """Training goes on, the former checkpoint stays whole, the next save tries again, the exit code tells."""
    path = tiny_config(tmp_path, "UNetE", n_epoch=30, save_every=100, save_minutes=0.01, log_every=1,
                       save_dir=str(small_disk / "run"))
    config = options.load_config(path)
    latest = checkpoint.latest_paths(config)[0]

    def errors():
        return (tmp_path / "err").read_text()

    with started(tmp_path, "train.py", "--config", path) as process:
        wait_until(lambda: last_step(small_disk / "run") > 15 and latest.exists())
        fill(small_disk)
        wait_until(lambda: "cannot write" in errors() and "latest.pth" in errors())
        kept = checkpoint.load(checkpoint.newest(config))["step"]
        before = len(errors().splitlines())
        wait_until(lambda: len(errors().splitlines()) > before)         # It tried again, and failed again.
        assert process.poll() is None and checkpoint.load(checkpoint.newest(config))["step"] == kept
        assert not list((small_disk / "run").rglob(".*.tmp"))
        (small_disk / "filler").unlink()
        wait_until(lambda: latest.exists() and checkpoint.step_in(latest) > kept)
        checkpoint.load(checkpoint.newest(config))
        assert process.wait(120) == 2
    assert "No space left on device" in errors() and "Traceback" not in errors(), errors()
    assert "the run has ended, but" in errors() and "could not be written" in errors()
    steps = list(range(1, 301))
    assert [row["step"] for row in metrics(small_disk / "run")] == steps
    board = EventAccumulator(str(small_disk / "run" / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == steps
    assert "failed writes/text_summary" in board.Tags()["tensors"]
    assert checkpoint.epochs(config) == [0, 29] and not latest.exists()


def test_output_that_nobody_takes_ends_nothing(tmp_path):
    """stdout and stderr on a full disk: training and sampling go on to their end."""
    path = tiny_config(tmp_path, n_epoch=1)
    for script, *more in (("train.py",), ("sample.py", "--n_samples", 3)):
        with open("/dev/full", "w") as full:
            done = subprocess.run(**launch(script, "--config", path, *more), stdout=full, stderr=full)
        assert done.returncode == 0
    assert (tmp_path / "run" / "ckpts" / "model_0.pth").exists()
    assert len(list((tmp_path / "run" / "samples" / "0" / "images").iterdir())) == 3


def test_lines_that_a_full_disk_cuts_are_taken_back(small_disk):
    (small_disk / "lines").write_text("one\n")
    fill(small_disk)
    with pytest.raises(OSError, match="No space left"):
        logs.append(small_disk / "lines", b"x" * 100_000)
    assert (small_disk / "lines").read_text() == "one\n"
    (small_disk / "filler").unlink()
    logs.append(small_disk / "lines", b"two\n")
    assert (small_disk / "lines").read_text() == "one\ntwo\n"


def test_a_folder_that_is_moved_away(tmp_path, trained):
    """Figures and saves go on."""
    config = options.load_config(trained / "config.yaml", [f"save_dir={tmp_path / 'run'}"])
    log = logs.Log(make_folder(config["save_dir"]), 0, True)
    with contextlib.closing(checkpoint.Saver(config, log)) as saver:
        shutil.rmtree(tmp_path / "run" / "tensorboard")
        log.write(1, {"loss": 1.0})
        saver.save({"step": 1, "weight": torch.ones(1)}, checkpoint.latest_paths(config)[0])
        assert saver.finish() and not log.failures


def test_the_log_keeps_what_cannot_be_written(tmp_path, monkeypatch, capsys):
    log = logs.Log(tmp_path, 0, True)
    log.write(1, {"loss": 1.0})

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(logs, "append", full)
        log.write(2, {"loss": 2.0})
        log.write(3, {"loss": 3.0})
    assert [row["step"] for row in metrics(tmp_path)] == [1]
    assert capsys.readouterr().err.count("No space left on device") == 2        # Said once for each file.
    log.write(4, {"loss": 4.0})
    log.close()
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3, 4]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(i, float(i)) for i in (1, 2, 3, 4)]
    with pytest.raises(UserError, match="2 times something could not be written"):
        log.check()


# ----------------------------------------------------------------------------------------------------------------------
# Killed in the middle of a save.

def save_on_and_on(config, pipe):
    """Save a state of 20 MB again and again, telling when each save begins."""
    saver = checkpoint.Saver(config, logs.Log(make_folder(config["save_dir"]), 0, True))
    for step in range(1, 1000):
        state = {"step": step, "weights": [torch.full((1000, 1000), float(step)) for _ in range(5)]}
        pipe.send(step)
        saver.save(state, checkpoint.latest_paths(config)[0] if step % 3 else checkpoint.path_of(config, step))
        saver.finish()


@pytest.mark.slow
def test_killed_at_fifty_random_moments_of_a_save(tmp_path):
    """The save before, or the one that was under way, is whole; temporary files do not pile up."""
    config = options.load_config(tiny_config(tmp_path))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "checkpoint", "logs"])
    draw, outcomes, leftovers = random.Random(0), [], []
    for _ in range(50):
        shutil.rmtree(config["save_dir"], ignore_errors=True)
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=save_on_and_on, args=(config, send))
        process.start()
        whole = draw.randrange(1, 6)
        durations = []
        for _ in range(whole + 1):          # Saves 1..whole are done when the next begins.
            assert receive.poll(60)
            receive.recv()
            durations.append(time.perf_counter())
        time.sleep(draw.uniform(0, 1.1) * (durations[-1] - durations[0]) / whole)
        process.kill()
        process.join()
        newest = checkpoint.newest(config)
        checkpoint.verify(newest)
        state = torch.load(newest, weights_only=True)
        assert state["step"] >= whole and all((part == state["step"]).all() for part in state["weights"])
        outcomes.append(state["step"] - whole)
        leftovers.append(len(list(newest.parent.glob(".*.tmp"))))
    print(f"saves finished beyond the last certain one: {outcomes}; temporary files left: {sum(leftovers)}")
    assert sum(leftovers) >= 10             # The kills did come in the middle.


# ----------------------------------------------------------------------------------------------------------------------
# Damaged checkpoints.

def damage(path, draw):
    """Cut a file somewhere, or flip bits of one byte to a few, anywhere."""
    content = bytearray(path.read_bytes())
    kind = draw.choice(["cut", "flip", "flip", "several"])
    if kind == "cut":
        content = content[:draw.randrange(len(content))]
    for _ in range({"cut": 0, "flip": 1, "several": 5}[kind]):
        content[draw.randrange(len(content))] ^= draw.randrange(1, 256)
    path.write_bytes(content)


@pytest.mark.slow
def test_two_hundred_damages_are_detected(trained, tmp_path, capsys):
    shutil.copytree(trained / "run", tmp_path / "run")
    config = options.load_config(trained / "config.yaml") | {"save_dir": str(tmp_path / "run")}
    (latest, before), last = checkpoint.latest_paths(config), checkpoint.path_of(config, 3)
    whole, draw = last.read_bytes(), random.Random(0)
    last.unlink()
    for i in range(200):
        # The newest is latest.pth and beside it stands the one before; every other time they are those of epochs.
        if i % 2:
            newest, rest = latest, before
            before.write_bytes(whole)
        else:
            newest, rest = last, checkpoint.path_of(config, 2)
        newest.write_bytes(whole)
        damage(newest, draw)
        with pytest.raises(UserError, match="is damaged"):
            checkpoint.load(newest)
        assert checkpoint.newest(config) == rest and checkpoint.load(rest)["step"] == (40 if i % 2 else 30)
        assert str(newest) in capsys.readouterr().err
        for path in (latest, before, last):
            path.unlink(missing_ok=True)


@pytest.mark.slow
def test_training_goes_on_from_the_one_before_a_damaged_one(trained, tmp_path):
    draw = random.Random(1)
    for i in range(3):
        folder = tmp_path / str(i)
        shutil.copytree(trained / "run", folder)
        damage(folder / "ckpts" / "model_3.pth", draw)
        done = run("train.py", "--config", trained / "config.yaml", "--set", f"save_dir={folder}")
        assert done.returncode == 0 and "after step 30" in done.stdout
        assert "model_3.pth is damaged" in done.stderr and "Traceback" not in done.stderr
        a, b = (torch.load(run_dir / "ckpts" / "model_3.pth", weights_only=True)["network"]
                for run_dir in (trained / "run", folder))
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_damaged(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    config = options.load_config(trained / "config.yaml") | {"save_dir": str(tmp_path / "run")}
    latest = checkpoint.latest_paths(config)[0]
    latest.mkdir()                          # Reading it is an error of the system.
    with pytest.raises(UserError, match="cannot read the checkpoint"):
        checkpoint.newest(config)
    assert latest.exists()


def test_a_damaged_save_that_is_not_the_newest(trained, tmp_path, capsys, monkeypatch):
    """The next save would make it the one before."""
    shutil.copytree(trained / "run", tmp_path / "run")
    config = options.load_config(trained / "config.yaml") | {"save_dir": str(tmp_path / "run")}
    latest, before = checkpoint.latest_paths(config)
    for path, epoch in ((latest, 2), (before, 1)):
        shutil.copyfile(checkpoint.path_of(config, epoch), path)
    content = bytearray(latest.read_bytes())
    content[len(content) // 2] ^= 1
    latest.write_bytes(content)
    assert checkpoint.newest(config) == checkpoint.path_of(config, 3)
    assert not latest.exists() and before.exists() and str(latest) in capsys.readouterr().err
    # An error of the disk in a file that is not needed.
    shutil.copyfile(checkpoint.path_of(config, 2), latest)
    verify = checkpoint.verify

    def failing(path):
        if path == latest:
            raise UserError("Input/output error")
        verify(path)

    monkeypatch.setattr(checkpoint, "verify", failing)
    assert checkpoint.newest(config) == checkpoint.path_of(config, 3) and not latest.exists()


def test_load_epoch_of_a_checkpoint_that_is_damaged_since(trained, tmp_path):
    """A run that has gone on from it does not need it any more."""
    shutil.copytree(trained / "run", tmp_path / "run")
    config = options.load_config(trained / "config.yaml", [f"save_dir={tmp_path / 'run'}", "load_epoch=1"])
    args = SimpleNamespace(fresh=False)
    picked, latest = checkpoint.path_of(config, 1), checkpoint.latest_paths(config)[0]
    assert train.checkpoint_to_load(config, args, None) == picked
    checkpoint.write(latest, checkpoint.load(checkpoint.path_of(config, 2)) | {"config": config, "step": 41})
    for _ in range(2):
        assert train.checkpoint_to_load(config, args, None) == latest
        picked.write_bytes(picked.read_bytes()[:-1000])


def test_a_save_without_memory(trained, tmp_path, monkeypatch, capsys):
    """It counts as one that failed; the next tries again."""
    config = options.load_config(trained / "config.yaml", [f"save_dir={tmp_path / 'run'}"])
    saver = checkpoint.Saver(config, logs.Log(make_folder(config["save_dir"]), 0, True))
    latest = checkpoint.latest_paths(config)[0]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "clone", lambda tensor: torch.empty(2 ** 50, dtype=torch.uint8))       # 1 PB.
        saver.save({"step": 1, "weight": torch.ones(1)}, latest)
    assert not saver.finish() and "no memory for a copy" in capsys.readouterr().err
    saver.save({"step": 2, "weight": torch.ones(1)}, latest)
    assert saver.finish() and checkpoint.step_in(latest) == 2
    saver.close()


def test_only_damaged_checkpoints(trained, tmp_path):
    config = options.load_config(trained / "config.yaml") | {"save_dir": str(tmp_path / "run")}
    shutil.copytree(trained / "run", tmp_path / "run")
    for path in (tmp_path / "run" / "ckpts").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="only damaged"):
        checkpoint.newest(config)
    refused = run("sample.py", "--config", trained / "config.yaml", "--set", f"save_dir={tmp_path / 'run'}")
    assert refused.returncode == 2 and "model_3.pth is damaged" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


class Evil:
    """What a pickle can do to whom unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_that_would_run_code_does_not(trained, tmp_path):
    config = options.load_config(tiny_config(tmp_path))
    path = checkpoint.path_of(config, 0)
    path.parent.mkdir(parents=True)
    ran = tmp_path / "ran"
    checkpoint.write(path, {"step": 10, "network": Evil(ran)})          # With the right checksum.
    for script in ("train.py", "sample.py"):
        done = run(script, "--config", tmp_path / "config.yaml")
        assert done.returncode == 2 and "refused" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    torch.save({"step": 10, "network": Evil(ran)}, path)                # Without.
    done = run("train.py", "--config", tmp_path / "config.yaml")
    assert done.returncode == 2 and "damaged" in done.stderr
    assert not ran.exists()
    torch.load(path, weights_only=False)                                # It would have.
    assert ran.exists()


def test_checkpoint_of_another_network_is_refused_with_the_first_tensor(trained, tmp_path):
    state = checkpoint.load(trained / "run" / "ckpts" / "model_3.pth")
    name = next(iter(state["network"]))
    state["network"][name] = torch.zeros(1)
    shutil.copytree(trained / "run", tmp_path / "run")
    checkpoint.write(tmp_path / "run" / "ckpts" / "model_3.pth", state)
    for script in ("train.py", "sample.py --weights model"):
        script, *more = script.split()
        done = run(script, *more, "--config", trained / "config.yaml", "--set", f"save_dir={tmp_path / 'run'}", "--set",
                   "n_epoch=5")
        assert done.returncode == 2 and f"differ in {name}" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Sampling and scoring.

def content(folder):
    """Every file of a folder and what it holds."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [None, 2])
def test_sampling_killed_anywhere_gives_the_same_folder(trained, tmp_path, processes):
    arguments = ["--config", trained / "config.yaml", "--n_samples", 1200, "--npz", "--out"]
    succeed("sample.py", *arguments, tmp_path / "whole")
    parts, draw, counts = tmp_path / "parts", random.Random(0), []
    for _ in range(6):
        images = parts / "images"
        target = len(list(images.glob("*.png"))) + draw.randrange(1, 90)
        with started(tmp_path, "sample.py", *arguments, parts, processes=processes):
            wait_until(lambda images=images, target=target: len(list(images.glob("*.png"))) >= target)
            time.sleep(draw.uniform(0, 0.05))
            kill_all(str(trained / "config.yaml"))
        counts.append(len(list(images.glob("*.png"))))
    print(f"killed with {counts} images")
    assert counts[-1] < 1200
    succeed("sample.py", *arguments, parts, processes=processes)
    whole, restarted = content(tmp_path / "whole"), content(parts)
    whole_npz, parts_npz = (found.pop("samples.npz") for found in (whole, restarted))
    assert whole == restarted and len(whole) == 1200 + 3                # grid.png, settings.json, .lock
    assert whole_npz == parts_npz


# Runs a command; in the middle of writing the file whose temporary name holds a word, the process is killed.
KILLED_WRITING = """
import os, runpy, signal, sys, zipfile
import numpy, PIL.Image
word, script = sys.argv[1], sys.argv[2]
sys.argv = sys.argv[2:]
sys.path.insert(0, os.path.dirname(script))

def half(function, path_of):
    def write(*args, **kwargs):
        path = str(path_of(*args))
        function(*args, **kwargs)
        if word in path:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    return write

def savez(file, *args, **kwargs):
    original(file, *args, **kwargs)
    file.flush()

original = numpy.savez
numpy.savez = half(savez, lambda file, *_: file.name)
PIL.Image.Image.save = half(PIL.Image.Image.save, lambda image, path, *_: path)
runpy.run_path(script, run_name="__main__")
"""


def killed_writing(word, script, *args):
    """Run a command that is killed in the middle of writing a file."""
    how = launch(script, *args)
    done = subprocess.run(**how | {"args": [how["args"][0], "-c", KILLED_WRITING, word, *how["args"][1:]]},
                          capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize("word", ["000003.png", "grid.png", "samples.npz"])
def test_sampling_killed_in_the_middle_of_a_file(trained, tmp_path, word):
    arguments = ["--config", trained / "config.yaml", "--n_samples", 8, "--npz", "--out"]
    succeed("sample.py", *arguments, tmp_path / "whole")
    killed_writing(f".{word}.", "sample.py", *arguments, tmp_path / "parts")
    assert not list((tmp_path / "parts").rglob(word)) and list((tmp_path / "parts").rglob(f".{word}.*.tmp"))
    succeed("sample.py", *arguments, tmp_path / "parts")
    assert content(tmp_path / "whole") == content(tmp_path / "parts")


def test_scoring_killed_in_the_middle_of_a_file(trained, tmp_path):
    """The statistics of the training set, half-written, are not taken for whole."""
    images = tmp_path / "images"
    succeed("sample.py", "--config", trained / "config.yaml", "--n_samples", 80, "--out", images)
    values = []
    for name in ("whole", "parts"):
        settings = ["--config", trained / "config.yaml", "--features", "pixels", "--images", images, "--set",
                    f"cache_dir={tmp_path / name}"]
        if name == "parts":
            killed_writing(".digits-train-pixels.npz.", "fid.py", *settings)
            assert not list((tmp_path / name).rglob("*.npz"))
        values += [float(succeed("fid.py", *settings).split()[1].rstrip(":")) for _ in range(2)]
        assert list((tmp_path / name / "fid").glob("*.npz"))
    assert len(set(values)) == 1


@pytest.mark.slow
def test_scoring_killed_anywhere_gives_the_same_figures(trained, tmp_path):
    config = trained / "config.yaml"
    settings = ["--config", config, "--set", f"cache_dir={tmp_path / 'cache'}"]
    succeed("sample.py", "--config", config, "--n_samples", 300)
    results = trained / "run" / "results.jsonl"
    commands = [("fid.py", *settings, "--features", "pixels"),
                ("probe.py", *settings, "--set", "linear.blockname=out_1")]
    figures, alive, durations, draw = {}, [], {}, random.Random(0)
    for repeat in range(2):
        for script, *arguments in commands:
            if repeat:
                for _ in range(5):          # Of its time, 40 % at the most go into imports.
                    with started(tmp_path, script, *arguments) as process:
                        with contextlib.suppress(subprocess.TimeoutExpired):
                            process.wait(draw.uniform(0.4, 1) * durations[script])
                        alive.append(process.poll() is None)
                        process.kill()
            began = time.monotonic()
            succeed(script, *arguments)
            durations[script] = time.monotonic() - began
            rows = [json.loads(line) for line in results.read_text().splitlines()]
            figures.setdefault(script, []).extend(row["value"] for row in rows if (row["figure"] == "probe")
                                                  == (script == "probe.py"))
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    print(figures, alive)
    assert sum(alive) >= 4                  # Most kills did come before the end.
    assert all(len(values) >= 2 and len(set(values)) == 1 for values in figures.values()), figures


def test_two_samplers_in_one_folder(trained, tmp_path):
    arguments = ["--config", trained / "config.yaml", "--n_samples", 3000, "--out", tmp_path / "images"]
    with started(tmp_path, "sample.py", *arguments):
        wait_until(lambda: (tmp_path / "images" / "images" / "000000.png").exists())
        second = run("sample.py", *arguments)
    assert second.returncode == 2 and "in use by process" in second.stderr
    assert len(second.stderr.strip().splitlines()) == 1
