"""sample.py as users run it: the same images from any processes and batches, nothing made twice, nothing mixed."""

import json
import shutil

import numpy as np
import pytest
from conftest import run, succeed, tiny_config
from PIL import Image

N = 37


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config whose tiny Config G network is trained for 20 steps, with a checkpoint of each epoch."""
    path = tiny_config(tmp_path_factory.mktemp("sample"), "UNetG", save_every=1)
    succeed("train.py", "--config", path)
    return path


@pytest.fixture(scope="module")
def reference(config):
    """The folder of the default settings, made in one process."""
    succeed("sample.py", "--config", config, "--n_samples", N)
    return config.parent / "run" / "samples" / "1"


def read(folder, n=N):
    files = sorted(p.name for p in (folder / "images").iterdir())
    assert files == [f"{i:06d}.png" for i in range(n)]
    return np.stack([np.asarray(Image.open(folder / "images" / name)) for name in files]).astype(int)


def test_outputs(reference):
    images = read(reference)
    assert images.shape == (N, 8, 8) and images.std() > 30
    assert len({image.tobytes() for image in images}) == N
    assert sorted(p.name for p in reference.iterdir()) == [".lock", "grid.png", "images", "settings.json"]
    assert Image.open(reference / "grid.png").size == (8 * 34 + 2, 5 * 34 + 2)
    assert json.loads((reference / "settings.json").read_text())["weights"] == "ema"


@pytest.mark.parametrize(("name", "processes", "args"), [
    ("two", 2, []), ("batch8", None, ["--batch_gpu", 8]), ("batch32", None, ["--batch_gpu", 32])])
def test_the_images_do_not_depend_on_processes_and_batches(config, reference, tmp_path, name, processes, args):
    succeed("sample.py", "--config", config, "--n_samples", N, "--out", tmp_path / name, *args, processes=processes)
    assert np.abs(read(tmp_path / name) - read(reference)).max() <= 1


def test_churned_images_do_not_depend_on_processes_and_batches(config, tmp_path):
    for name, processes, args in (("a", None, []), ("b", 2, ["--batch_gpu", 3])):
        succeed("sample.py", "--config", config, "--n_samples", 8, "--eta", 1, "--out", tmp_path / name, *args,
                processes=processes)
    assert np.abs(read(tmp_path / "a", 8) - read(tmp_path / "b", 8)).max() <= 1


def test_the_batch_that_was_chosen_is_kept(config, reference, tmp_path):
    """Another one would change what is rounded: settings.json has it, but for what --batch_gpu said."""
    assert json.loads((reference / "settings.json").read_text())["batch_cpu"] == 64
    succeed("sample.py", "--config", config, "--n_samples", 2, "--out", tmp_path, "--batch_gpu", 1)
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert "batch_cpu" not in settings and settings["n_samples"] == 2
    (tmp_path / "settings.json").write_text(json.dumps(settings | {"batch_cpu": 3, "batch_cuda": "damaged"}))
    succeed("sample.py", "--config", config, "--n_samples", 7, "--out", tmp_path)
    assert json.loads((tmp_path / "settings.json").read_text()) == settings | {"batch_cpu": 3, "n_samples": 7}
    assert np.abs(read(tmp_path, 7) - read(reference)[:7]).max() <= 1


def test_started_again_it_makes_what_is_missing(config, tmp_path):
    command = ("sample.py", "--config", config, "--out", tmp_path)
    succeed(*command, "--n_samples", 8)
    before = read(tmp_path, 8)
    gone = [tmp_path / "images" / f"{i:06d}.png" for i in (2, 5)]
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "images").iterdir() if p not in gone}
    for path in gone:
        path.unlink()
    assert "4 of 10 images to make" in succeed(*command, "--n_samples", 10, "--npz")
    after = read(tmp_path, 10)
    assert np.abs(after[:8] - before).max() <= 1
    assert kept == {p: p.stat().st_mtime_ns for p in kept}
    arrays = np.load(tmp_path / "samples.npz")
    assert arrays.files == ["arr_0"] and arrays["arr_0"].dtype == np.uint8
    assert np.array_equal(arrays["arr_0"], after[..., None])


@pytest.mark.parametrize("args", [["--seed", 1], ["--weights", "model"], ["--eta", 0.5], ["--steps", 9],
                                  ["--epoch", 0], ["--clip_denoised"], ["--use_amp"]])
def test_a_folder_of_other_settings_is_refused(config, reference, args):
    before = {p: p.stat().st_mtime_ns for p in reference.rglob("[!.]*")}
    done = run("sample.py", "--config", config, "--n_samples", N + 1, "--out", reference, *args)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "other settings" in done.stderr and args[0].lstrip("-").replace("use_amp", "precision") in done.stderr
    assert before == {p: p.stat().st_mtime_ns for p in reference.rglob("[!.]*")}


@pytest.mark.parametrize(("name", "content"), [
    ("settings.json", b""), ("settings.json", b"[1]"), ("settings.json", b"\xff"), ("images/000003.png", b"\x89PNG")])
def test_damaged_files_in_the_folder_are_named(config, reference, tmp_path, name, content):
    folder = tmp_path / "samples"
    shutil.copytree(reference, folder)
    (folder / name).write_bytes(content)
    done = run("sample.py", "--config", config, "--n_samples", N, "--out", folder)
    assert done.returncode == 2 and f"{folder / name} is damaged" in done.stderr and "Traceback" not in done.stderr


def test_settings_that_are_not_usual_have_folders_of_their_own(config, reference):
    succeed("sample.py", "--config", config, "--n_samples", 2, "--seed", 1, "--weights", "model", "--epoch", 0)
    folder = reference.parent / "0_model_seed1"
    assert np.abs(read(folder, 2) - read(reference)[:2]).max() > 1


def test_a_checkpoint_of_another_network_is_refused(config, reference):
    """C and E have the same tensors: the config in the checkpoint tells them apart."""
    done = run("sample.py", "--config", config, "--set", "net_type=UNetC")
    assert done.returncode == 2 and "net_type 'UNetG' there, 'UNetC' here" in done.stderr


def test_epoch_n_epoch_means_the_last_one(config, reference):
    assert "epoch 1" in succeed("sample.py", "--config", config, "--n_samples", N, "--epoch", 2)
