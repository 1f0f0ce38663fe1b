"""sample.py: the same images from any processes and batches, nothing made twice, nothing mixed."""

import json
import shutil
from pathlib import Path
import numpy as np
import pytest
from conftest import refused, succeed
from PIL import Image

N = 37

@pytest.fixture(scope="module")
def flags(trained, tmp_path_factory):
    """The flags for a copy of the trained run."""
    copy = shutil.copytree(trained / "run", tmp_path_factory.mktemp("sample") / "run")
    return "--config", trained / "config.yaml", "--set", f"save_dir={copy}", "--n_samples", N

@pytest.fixture(scope="module")
def reference(flags):
    """The folder of the default settings, made in one process."""
    out = succeed("sample.py", *flags)
    return Path(out.split("grid: ")[1].strip()).parent

def read(folder, n=N):
    """The images of a folder, (n,H,W)."""
    paths = sorted((folder / "images").iterdir())
    assert [path.name for path in paths] == [f"{i:06d}.png" for i in range(n)]
    return np.stack([np.asarray(Image.open(path), int) for path in paths])

def times(folder):
    """When the files of a folder were written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("[!.]*")}

def test_outputs(flags, reference):
    """Unusual settings have folders of their own; n_epoch means the last checkpoint."""
    images = read(reference)
    assert images.shape == (N, 8, 8) and images.std() > 30
    assert len({image.tobytes() for image in images}) == N
    assert {path.name for path in reference.iterdir()} - {".lock"} == {
        "grid.png", "images", "settings.json"}
    assert Image.open(reference / "grid.png").size == (7 * 34 + 2, 6 * 34 + 2)
    assert json.loads((reference / "settings.json").read_text())["weights"] == "ema"
    succeed("sample.py", *flags, "--n_samples", 2, "--seed", 1, "--weights", "model", "--epoch", 0)
    assert np.abs(read(reference.parent / "0_model_seed1", 2) - images[:2]).max() > 1
    assert "epoch 3" in succeed("sample.py", *flags, "--epoch", 4)
    # C and E have the same tensors: the config in the checkpoint tells them apart.
    refused("sample.py", *flags, "--set", "net_type=UNetC", words=["'UNetE' there, 'UNetC' here"])

@pytest.mark.parametrize("eta", [0, 1])
def test_the_images_do_not_depend_on_processes_and_batches(flags, reference, tmp_path, eta):
    found = []
    for size, processes in ((64, None), (32, None), (8, None), (3, 2)):
        command = ("sample.py", *flags, "--eta", eta, "--batch_gpu", size)
        succeed(*command, "--out", tmp_path / str(size), processes=processes)
        found.append(read(tmp_path / str(size)))
        assert np.abs(found[-1] - found[0]).max() <= 1
    assert (np.abs(found[0] - read(reference)).max() <= 1) == (eta == 0)

def test_started_again_it_makes_what_is_missing(flags, tmp_path):
    command = ("sample.py", *flags, "--out", tmp_path, "--n_samples")
    succeed(*command, 8)
    before = read(tmp_path, 8)
    for i in (2, 5):
        (tmp_path / "images" / f"{i:06d}.png").unlink()
    kept = times(tmp_path / "images")
    (tmp_path / "images" / ".000002.png.7.tmp").write_bytes(b"of a killed process")
    assert "4 of 10 images to make" in succeed(*command, 10, "--npz")
    after = read(tmp_path, 10)
    assert np.abs(after[:8] - before).max() <= 1 and len(kept) == 6
    assert kept.items() <= times(tmp_path / "images").items()
    (name, array), = np.load(tmp_path / "samples.npz").items()
    assert (name, array.dtype) == ("arr_0", np.uint8) and np.array_equal(array, after[..., None])
    assert "0 of 3 images to make" in succeed(*command, 3)      # fid.py wants the 10 still.
    assert json.loads((tmp_path / "settings.json").read_text())["n_samples"] == 10

@pytest.mark.parametrize("args", [
    ["--seed", 1], ["--weights", "model"], ["--eta", 0.5], ["--steps", 9], ["--epoch", 0],
    ["--clip_denoised"], ["--amp_dtype", "float16"]])
def test_a_folder_of_other_settings_is_refused(flags, reference, args):
    before, name = times(reference), args[0].lstrip("-").replace("amp_dtype", "precision")
    refused("sample.py", *flags, "--n_samples", N + 1, "--out", reference, *args,
            words=["other settings", name, reference])
    assert before == times(reference)

@pytest.mark.parametrize(("name", "content", "word"), [
    *(("settings.json", content, "is damaged") for content in (b"", b"[1]", b"\xff")),
    ("images/000003.png", b"\x89PNG", "is not a whole image")])
def test_damaged_files_in_the_folder_are_named(flags, reference, tmp_path, name, content, word):
    folder = shutil.copytree(reference, tmp_path / "samples")
    (folder / name).write_bytes(content)
    refused("sample.py", *flags, "--out", folder, words=[f"{folder / name} {word}", "remove"])
