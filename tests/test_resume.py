"""Runs that are killed, stopped, restarted: what comes out is what an undisturbed run gives."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    ROOT,
    distance,
    free_port,
    kill_all,
    last_step,
    launch,
    metrics,
    processes_of,
    run,
    started,
    succeed,
    tiny_config,
    wait_until,
    weights,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import checkpoint
import options
import runtime

OFTEN = 1e-4        # save_minutes: as soon as the one before is written.


def config_in(tmp_path, name, **changes):
    """A tiny run with all that is random in it, 10 steps an epoch, in a folder of its own."""
    (tmp_path / name).mkdir()
    settings = {"flip": True, "network": {"dropout": 0.2}, "n_epoch": 10, "save_every": 5, "save_minutes": OFTEN,
                "log_every": 3, "tref_epoch": 2} | changes
    return tiny_config(tmp_path / name, "UNetE", **settings)


def differences(a, b, epoch):
    """The distances of two runs' network, EMA, uncertainty and optimizer at an epoch, and of their metrics."""
    folders = a.parent / "run", b.parent / "run"
    found = {key: distance(*(weights(folder, epoch, key) for folder in folders))
             for key in ("network", "ema", "uncertainty")}
    moments = [{f"{i} {name}": tensor for i, state in weights(folder, epoch, "optimizer")["state"].items()
                for name, tensor in state.items()} for folder in folders]
    found["optimizer"] = distance(*moments)
    rows = [metrics(folder) for folder in folders]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for key in ("loss", "loss_unweighted", "lr", "grad_norm", "ema_decay", "Mimg", "epoch"):
        found[key] = max(abs(x[key] - y[key]) / max(abs(x[key]), 1e-9) for x, y in zip(*rows, strict=True))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("processes", [None, 2])
def test_killed_at_twenty_random_steps(tmp_path, processes):
    whole, killed = config_in(tmp_path, "whole"), config_in(tmp_path, "killed")
    succeed("train.py", "--config", whole, processes=processes)
    run_dir = killed.parent / "run"
    config, kills, begun, out = options.load_config(killed), [], [], killed.parent / "out"
    for target in sorted(random.Random(0).sample(range(1, 99), 20)):
        newest = checkpoint.newest(config)
        begun.append(checkpoint.step_in(newest) if newest else 0)
        with started(killed.parent, "train.py", "--config", killed, processes=processes) as process:
            wait_until(lambda: begun[-1] == 0 or f"after step {begun[-1]}\n" in out.read_text())
            # Every third step is in metrics.jsonl: the rest of the way is waited for.
            wait_until(lambda target=target: last_step(run_dir) >= max(target - target % 3, begun[-1] + 1))
            time.sleep(0.02 * (target % 3))
            assert process.poll() is None
            kill_all(str(killed))
        kills.append(last_step(run_dir))
    begun.append(checkpoint.step_in(checkpoint.newest(config)))
    assert f"after step {begun[-1]}\n" in succeed("train.py", "--config", killed, processes=processes)
    assert len(set(begun)) > 10 and begun == sorted(begun)
    found = differences(whole, killed, 9)
    print(f"killed after the metrics of steps {kills}, begun again after steps {begun}; {found}")
    assert all(value == 0 if processes is None else value <= 1e-6 for value in found.values()), found
    assert [row["step"] for row in metrics(run_dir)] == sorted({*range(3, 101, 3), *range(10, 101, 10)})
    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == [row["step"] for row in metrics(run_dir)]
    left = sorted(p.name for p in (run_dir / "ckpts").iterdir())
    assert left == ["model_0.pth", "model_5.pth", "model_9.pth"]
    assert sorted(p.name for p in (run_dir / "grids").iterdir()) == ["0000.png", "0005.png", "0009.png"]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_under_torchrun_saves_and_leaves(tmp_path, signum):
    """On the digits config: gone within 10 s, and the same command goes on exactly."""
    paths = [tmp_path / name / "config.yaml" for name in ("whole", "stopped")]
    for path in paths:
        path.parent.mkdir()
        path.write_text((ROOT / "config" / "digits" / "G.yaml").read_text())
    arguments = [["--config", path, "--set", f"save_dir={path.parent / 'run'}", "--set", "n_epoch=2", "--set",
                  "log_every=5"] for path in paths]
    succeed("train.py", *arguments[0], processes=2)
    folder = paths[1].parent
    with started(folder, "train.py", *arguments[1], processes=2) as process:
        wait_until(lambda: last_step(folder / "run") >= 25)
        began = time.monotonic()
        process.send_signal(signum)
        process.wait(20)
        wait_until(lambda: not processes_of(str(paths[1])), 20)
        seconds = time.monotonic() - began
    step = checkpoint.load(folder / "run" / "ckpts" / "latest.pth")["step"]
    errors = (folder / "err").read_text()
    print(f"gone after {seconds:.1f} s, saved at step {step}")
    assert seconds < 10 and process.returncode != 0 and 25 <= step < 44
    assert f"stopped by {signum.name} after step {step} and saved in {folder / 'run'}" in errors, errors[-2000:]
    assert f"after step {step}" in succeed("train.py", *arguments[1], processes=2)
    assert all(value <= 1e-6 for value in differences(*paths, 1).values())


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_saves_and_its_code_is_the_exit_code(tmp_path, signum, code):
    path = config_in(tmp_path, "one", save_minutes=10, n_epoch=1000, save_every=1000)
    with started(path.parent, "train.py", "--config", path) as process:
        wait_until(lambda: last_step(path.parent / "run") >= 15)
        process.send_signal(signum)
        assert process.wait(10) == code
    folder = path.parent / "run"
    lines = [line for line in (path.parent / "err").read_text().splitlines() if line.startswith("train.py")]
    step = checkpoint.load(folder / "ckpts" / "latest.pth")["step"]
    assert lines == [f"train.py: stopped by {signum.name} after step {step} and saved in {folder}: the same command "
                     f"goes on"]
    assert not list(folder.rglob(".*.tmp"))


@pytest.mark.parametrize("part", [0.1, 0.6])
def test_a_second_interrupt_leaves_at_once(tmp_path, part):
    """Steps of seconds: after the first SIGINT the step goes on, after the second the process ends in the middle."""
    path = config_in(tmp_path, "one", batch_size=1400, network={"n_channels": 64, "n_blocks": 2, "dropout": 0.0})
    with started(path.parent, "train.py", "--config", path) as process:
        wait_until(lambda: last_step(path.parent / "run") >= 2)         # One step an epoch; no grid after this one.
        time.sleep(part * metrics(path.parent / "run")[-1]["step_time_s"])      # In the forward or the backward pass.
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(3) == 130
    assert last_step(path.parent / "run") == 2
    errors = (path.parent / "err").read_text()
    assert "train.py: stopped by SIGINT at once" in errors and "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_torch_compiles(tmp_path, signum, code):
    path = config_in(tmp_path, "one")
    with started(path.parent, "train.py", "--config", path, "--compile") as process:
        wait_until(lambda: "0/100" in (path.parent / "err").read_text())
        time.sleep(2)
        process.send_signal(signum)
        assert process.wait(5) == code
    errors = (path.parent / "err").read_text()
    assert f"train.py: stopped by {signum.name} at once" in errors and "Traceback" not in errors
    assert last_step(path.parent / "run") == 0      # It did come before the first step.


def test_signals_are_heard_after_a_long_time():
    """Downloads have a time limit for sockets, which must not be one for the thread that hears signals."""
    code = ("import os, signal, socket, sys, time, runtime; socket.setdefaulttimeout(0.1); sys.argv = ['train.py']; "
            "s = runtime.Signals(runtime.Runtime(0, 1, 0, 1, None), lambda: None); s.unsaved = True; time.sleep(0.5); "
            "os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.2); assert s.agree(False) == (15, False); "
            "os.kill(os.getpid(), signal.SIGINT); time.sleep(5)")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 130


def test_a_signal_that_nohup_ignores(tmp_path):
    path = config_in(tmp_path, "one", n_epoch=3)
    done = subprocess.Popen(["nohup", *launch("train.py", "--config", path).pop("args")], stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL, cwd=ROOT)
    wait_until(lambda: last_step(path.parent / "run") >= 3)
    done.send_signal(signal.SIGHUP)
    assert done.wait(60) == 0 and last_step(path.parent / "run") == 30


@pytest.mark.slow
def test_a_killed_process_is_restarted_by_torchrun(tmp_path):
    whole, killed = config_in(tmp_path, "whole"), config_in(tmp_path, "killed")
    succeed("train.py", "--config", whole, processes=2)
    with started(killed.parent, "train.py", "--config", killed, processes=2, restarts=1) as process:
        wait_until(lambda: last_step(killed.parent / "run") >= 42)
        victim = next(pid for pid, env in processes_of(str(killed)).items() if env.get("RANK") == "1")
        os.kill(victim, signal.SIGKILL)
        assert process.wait(120) == 0, (killed.parent / "err").read_text()[-3000:]
    assert "going on in" in (killed.parent / "out").read_text()
    assert all(value <= 1e-6 for value in differences(whole, killed, 9).values())


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_killed_process_of_two_machines(tmp_path, rank):
    """The machine that lost its process counts a restart, the other does not: they find each other all the same, and
    --fresh, of which torchrun knows nothing, is for the first start."""
    whole, killed = config_in(tmp_path, "whole"), config_in(tmp_path, "killed")
    succeed("train.py", "--config", whole, processes=2)
    how = {"processes": 1, "restarts": 3, "port": free_port()}
    (tmp_path / "other").mkdir()
    with started(killed.parent, "train.py", "--config", killed, "--fresh", **how) as one, started(
            tmp_path / "other", "train.py", "--config", killed, "--fresh", **how) as other:
        wait_until(lambda: last_step(killed.parent / "run") >= 42)
        os.kill(next(pid for pid, env in processes_of(str(killed)).items() if env.get("RANK") == rank), signal.SIGKILL)
        for process in (one, other):
            assert process.wait(180) == 0, (killed.parent / "err").read_text()[-3000:]
    assert "going on in" in (killed.parent / "out").read_text() + (tmp_path / "other" / "out").read_text()
    assert all(value <= 1e-6 for value in differences(whole, killed, 9).values())


@pytest.mark.slow
def test_two_machines_that_share_no_folder(tmp_path):
    path, port, folders = config_in(tmp_path, "one", save_dir="run"), free_port(), [tmp_path / "a", tmp_path / "b"]
    with contextlib.ExitStack() as stack:
        for folder in folders:
            folder.mkdir()
            stack.enter_context(started(folder, "train.py", "--config", path, processes=1, port=port, cwd=folder))
        wait_until(lambda: not processes_of(str(path)))
    errors = "".join((folder / "err").read_text() for folder in folders)
    assert errors.count("run is not one folder for all machines: it must be on a disk that they share") == 1, errors
    assert 'train.py", line' not in errors and not list(tmp_path.rglob("*.pth"))


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "rank"), [(signal.SIGKILL, 1), (signal.SIGKILL, 0), (signal.SIGSTOP, 1)])
def test_a_lost_process_ends_the_job_within_a_minute(tmp_path, signum, rank):
    """Killed, or standing still as on a machine that is lost: a line says which process it was."""
    path = config_in(tmp_path, "one", n_epoch=100000, save_every=100000)
    with started(path.parent, "train.py", "--config", path, processes=2) as process:
        wait_until(lambda: last_step(path.parent / "run") >= 20)
        victim = next(pid for pid, env in processes_of(str(path)).items() if env.get("RANK") == str(rank))
        began = time.monotonic()
        os.kill(victim, signum)
        assert process.wait(60) != 0
        print(f"ended after {time.monotonic() - began:.1f} s")
        assert not processes_of(str(path))
    errors = (path.parent / "err").read_text()
    assert f"error: process {rank} (pid {victim} on " in errors, errors[-3000:]
    assert 'train.py", line' not in errors
    assert checkpoint.newest(options.load_config(path)).name.startswith("latest")


def test_a_signal_in_a_sample_grid(tmp_path):
    """It ends the drawing at once; started again, the grid of the last epoch is drawn, and no step is made."""
    path = config_in(tmp_path, "one", n_epoch=1, n_sample=2000)
    model, grid = (path.parent / "run" / name for name in ("ckpts/model_0.pth", "grids/0000.png"))
    with started(path.parent, "train.py", "--config", path) as process:
        wait_until(model.exists)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 143
    assert not grid.exists() and "at once" in (path.parent / "err").read_text()
    assert "done" in succeed("train.py", "--config", path)
    assert grid.exists() and "already" in succeed("train.py", "--config", path)
    assert [p.name for p in model.parent.iterdir()] == ["model_0.pth"]


def test_a_smaller_n_epoch_loses_nothing(tmp_path):
    path = config_in(tmp_path, "one", save_minutes=10, n_epoch=1000, save_every=1000)
    latest = path.parent / "run" / "ckpts" / "latest.pth"
    with started(path.parent, "train.py", "--config", path) as process:
        wait_until(lambda: last_step(path.parent / "run") >= 12)
        process.send_signal(signal.SIGTERM)
        process.wait(10)
    assert "already" in succeed("train.py", "--config", path, "--set", "n_epoch=1")
    checkpoint.verify(latest)


@pytest.mark.slow
def test_another_number_of_processes_goes_on(tmp_path):
    whole = config_in(tmp_path, "whole", network={"dropout": 0.0}, n_epoch=4)
    parts = config_in(tmp_path, "parts", network={"dropout": 0.0}, n_epoch=4)
    succeed("train.py", "--config", whole)
    succeed("train.py", "--config", parts, "--set", "n_epoch=1", processes=2)
    with started(parts.parent, "train.py", "--config", parts) as process:
        wait_until(lambda: last_step(parts.parent / "run") >= 15)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 143
    succeed("train.py", "--config", parts, processes=2)
    assert distance(weights(whole.parent / "run", 3), weights(parts.parent / "run", 3)) < 1e-4
    assert [row["step"] for row in metrics(parts.parent / "run")] == [
        row["step"] for row in metrics(whole.parent / "run")]


def test_two_runs_in_one_folder(tmp_path):
    path = config_in(tmp_path, "one", n_epoch=1000, save_every=1000)
    with started(path.parent, "train.py", "--config", path) as first:
        wait_until(lambda: last_step(path.parent / "run") >= 3)
        second = run("train.py", "--config", path)
        assert second.returncode == 2 and len(second.stderr.strip().splitlines()) == 1, second.stderr
        assert f"in use by process {first.pid} on " in second.stderr and "train.py --config" in second.stderr
        step = last_step(path.parent / "run")
        wait_until(lambda: last_step(path.parent / "run") > step)       # The first one goes on.


def test_fresh_refuses_a_folder_that_holds_a_run(tmp_path):
    path = config_in(tmp_path, "one", n_epoch=1)
    succeed("train.py", "--config", path, "--fresh")
    before = weights(path.parent / "run", 0)
    done = run("train.py", "--config", path, "--fresh")
    assert done.returncode == 2 and "--fresh" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    # Also where torchrun then tries again.
    done = run("train.py", "--config", path, "--fresh", "--set", "n_epoch=2", processes=1, restarts=1)
    assert done.returncode != 0 and done.stderr.count("error: --fresh") == 2
    assert distance(before, weights(path.parent / "run", 0)) == 0 and last_step(path.parent / "run") == 10


def test_load_epoch_is_for_the_first_start(tmp_path):
    """Gone on from epoch 0 and stopped: started again, it goes on from where it stopped, not from epoch 0."""
    path = config_in(tmp_path, "one", n_epoch=3, save_every=1, save_minutes=10)
    succeed("train.py", "--config", path)
    by_hand = ["--config", path, "--set", "load_epoch=0"]
    folder = path.parent / "run"
    with started(path.parent, "train.py", *by_hand) as process:
        wait_until(lambda: last_step(folder) == 15 or process.poll() is not None)
        process.send_signal(signal.SIGTERM)
        process.wait(10)
    assert "model_2.pth is of a later step than 10: renamed" in (path.parent / "err").read_text()
    step = checkpoint.load(folder / "ckpts" / "latest.pth")["step"]
    assert 15 <= step < 30 and f"after step {step}" in succeed("train.py", *by_hand)
    assert distance(weights(folder, 2), torch.load(folder / "ckpts" / "model_2.pth.old", weights_only=True)["network"]
                    ) == 0


def test_what_shapes_the_result_is_refused(tmp_path):
    path = config_in(tmp_path, "one", n_epoch=1)
    succeed("train.py", "--config", path)
    for change, words in (("network.dropout=0.3", "another config (network.dropout 0.2 there, 0.3 here)"),
                          ("lrate=0.5", "lrate 0.01 there, 0.5 here"),
                          ("diffusion.sigma_data=0.4", "sigma_data"), ("seed=1", "seed 0 there, 1 here")):
        done = run("train.py", "--config", path, "--set", change, "--set", "n_epoch=2")
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert "goes on in bfloat16" in run("train.py", "--config", path, "--set", "n_epoch=2", "--amp_dtype",
                                        "bfloat16").stderr


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "1"}, {
    "RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}])
def test_a_stray_environment(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(runtime.UserError, match="start with torchrun"):
        runtime.start()
