"""What a user can get wrong: one line on stderr that names it, exit code 2, and nothing written."""

import pytest
import torch
from conftest import run, tiny_config
from PIL import Image

import checkpoint
import options
from runtime import UserError


def refused(tmp_path, script, *args, words, processes=None):
    before = sorted(tmp_path.rglob("*"))
    done = run(script, *args, processes=processes)
    lines = [line for line in done.stderr.splitlines() if line.startswith(script)]
    if processes is None:
        assert done.returncode == 2, done.stderr
        assert done.stderr.strip().splitlines() == lines and len(lines) == 1, done.stderr
    else:                                           # torchrun adds its own report.
        assert done.returncode != 0 and lines, done.stderr
        assert f'{script}", line' not in done.stderr, done.stderr
    assert "Traceback" not in "".join(lines)
    for word in words:
        assert word in lines[0], lines[0]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("changes", "words"), [
    ("colour=1", ["unknown key colour"]),
    ("warm_epochs=1", ["warm_epochs", "did you mean warm_epoch?"]),
    ("lrate=quick", ["lrate", "number", "quick"]),
    ("n_epoch=[1]", ["n_epoch", "whole number"]),
    ("network.n_channels=200", ["group norm", "200 channels"]),
    ("network.attn_channels_per_head=5", ["attn_channels_per_head"]),
    ("batch_size=5000", ["batch_size 5000", "1437"]),
    ("network.image_shape=[3,8,8]", ["digits", "[1, 8, 8]"]),
    ("load_epoch=7", ["no checkpoints"]),
    ("save_dir=/proc/self/run", ["save_dir", "/proc/self"]),
    ("lrate=2024-13-45", ["not valid YAML"]),
    ("diffusion.rho=1e-300", ["diffusion.rho"]),
    ("save_dir=" + 300 * "x", ["save_dir", "too long"]),
    ("save_dir=/dev/null/run", ["save_dir", "/dev/null is not a folder"]),
])
def test_config_values(tmp_path, changes, words):
    refused(tmp_path, "train.py", "--config", tiny_config(tmp_path), "--set", changes, words=words)


def test_missing_config(tmp_path):
    for script in ("train.py", "sample.py"):
        refused(tmp_path, script, "--config", tmp_path / "no.yaml", words=["no.yaml", "No such file"])


def test_corrupt_image_in_a_class_folder(tmp_path):
    for name in ("cats", "dogs"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (8, 8)).save(tmp_path / "images" / name / f"{i}.png")
    (tmp_path / "images" / "dogs" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    path = tiny_config(tmp_path, dataset="folder", data_root=str(tmp_path / "images"), batch_size=4,
                       network={"image_shape": [3, 8, 8]})
    refused(tmp_path, "train.py", "--config", path, words=["dogs/2.png", "not a whole image"])


def test_data_that_cannot_be_read_or_downloaded(tmp_path):
    refused(tmp_path, "train.py", "--config", tiny_config(tmp_path, dataset="folder", data_root="/nowhere"),
            words=["/nowhere"])


def test_checkpoints(tmp_path):
    path = tiny_config(tmp_path)
    folder = tmp_path / "run" / "ckpts"
    refused(tmp_path, "sample.py", "--config", path, words=["no checkpoints", str(folder), "train first"])
    folder.mkdir(parents=True)
    for epoch in (0, 100):
        (folder / f"model_{epoch}.pth").write_bytes(b"damaged")
    refused(tmp_path, "sample.py", "--config", path, "--epoch", 7, words=["epoch 7", "there are 0, 100"])
    refused(tmp_path, "sample.py", "--config", path, words=["model_100.pth", "damaged"])


@pytest.mark.parametrize("content", [b"", b"PK" + bytes(1000), b"text", {"network": 1}, [1], object])
def test_damaged_checkpoints_are_named(tmp_path, content):
    config = options.load_config(tiny_config(tmp_path))
    path = checkpoint.path_of(config, 3)
    path.parent.mkdir(parents=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)               # The last one would run code, were it unpickled.
    with pytest.raises(UserError, match=r"model_3\.pth is damaged"):
        checkpoint.load(path)
    checkpoint.write(path, {"step": 1, "network": 1})           # With a checksum, and not of this project.
    with pytest.raises(UserError, match=r"model_3\.pth is not a checkpoint of this project"):
        checkpoint.load(path)


def test_arguments(tmp_path):
    path = tiny_config(tmp_path)
    for script, args in (("train.py", ["--batch_gpu", "0"]), ("sample.py", ["--eta", "2"]),
                         ("sample.py", ["--n_samples", "-1"]), ("train.py", ["--no_such_flag"])):
        done = run(script, "--config", path, *args)
        assert done.returncode == 2 and args[0] in done.stderr and "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_batch_that_the_processes_cannot_share(tmp_path):
    refused(tmp_path, "train.py", "--config", tiny_config(tmp_path, batch_size=33), processes=2,
            words=["batch_size 33", "2 processes"])
