"""What goes in and what comes out: no wrong data and no wrong score without a word."""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
import numpy as np
import pytest
import torch
from conftest import ROOT, launch, metrics, refused, results, run, succeed, tiny_config
from PIL import Image
from torch import nn
from torchvision.transforms.functional import normalize
import fid
from edm2 import data, diffusion, evaluation, features, frechet, image_files, log
from edm2.config import load_config
from edm2.errors import UserError

CPU, PIXELS = torch.device("cpu"), ("--features", "pixels")

def pixels(seed, *shape):
    """Noise, uint8."""
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)

def pictures(folder, n, mode="RGB", first=0, size=8, **how):
    """Write n pictures of noise to a folder; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + n):
        Image.fromarray(pixels(i, size, size, 3)).convert(mode).save(folder / f"{i:03d}.png", **how)
    return folder

def own(folder, root, **changes):
    """A config of a tiny run on images of one's own; its flags."""
    shape = changes.pop("network", {"image_shape": [3, 8, 8]})
    return "--config", tiny_config(folder, **({
        "dataset": "folder", "data_root": str(root), "network": shape, "batch_size": 4,
        "diffusion": {"sigma_data": 0.58}, "n_epoch": 1} | changes))

@pytest.fixture
def copied(trained, tmp_path):
    """The flags for a copy of the trained run, and its folder."""
    copy = shutil.copytree(trained / "run", tmp_path / "run")
    return ("--config", trained / "config.yaml", "--set", f"save_dir={copy}"), copy

def change(path, **values):
    """Change values of a checkpoint."""
    torch.save(torch.load(path, weights_only=True) | values, path)

# 1. NaN looks like a picture.

def test_a_network_that_diverged_makes_no_pictures_and_no_scores(copied):
    (flags, folder), words = copied, ["NaN or Inf", "diverged"]
    ema = torch.load(folder / "ckpts" / "model_3.pth", weights_only=True)["ema"]
    ema["stem.weight"][0] = math.nan
    change(folder / "ckpts" / "model_3.pth", ema=ema)
    refused("sample.py", *flags, "--n_samples", 4, words=words)
    refused("probe.py", *flags, words=words)
    assert not list(folder.glob("samples/*/images/*"))

@pytest.fixture
def diverged(tmp_path):
    """A config and an EDM whose weights are finite, and whose output is not."""
    config = load_config(tiny_config(tmp_path, "UNetC", eval_every=1, eval={
        "fid": 4, "features": "pixels", "images": 8}))
    denoiser = diffusion.build(config).eval()
    with torch.no_grad():
        denoiser.net.out_conv.weight.fill_(1e38)
    return config, denoiser

def test_samples_that_are_not_finite_are_no_pixels(diverged, tmp_path):
    config, denoiser = diverged
    with pytest.raises(UserError, match="NaN or Inf"):
        diffusion.generate(denoiser, range(4))
    with pytest.raises(UserError, match="NaN or Inf"):
        evaluation.sample_grid(denoiser, torch.zeros(9, 1, 8, 8, dtype=torch.uint8),
                               torch.full([9], -1), config, 0)
    assert not (tmp_path / "run" / "grids").exists()

def test_an_evaluation_of_what_is_not_finite_says_so(diverged, capsys):
    config, denoiser = diverged
    found = evaluation.Evaluator(config, *data.load(config), CPU).measure(denoiser)
    assert not any("FD" in name for name in found) and not math.isfinite(found["heldout_loss"])
    assert "4 samples: the features are NaN or Inf; not measured" in capsys.readouterr().err
    Path(config.save_dir).mkdir()
    written = log.Log(config.save_dir, 0)
    for step in (1, 2):
        written.write(step, {"heldout_loss": found["heldout_loss"], "MFU": None, "loss": 1.0})
    assert "step 1: heldout_loss is NaN or Inf\n" in capsys.readouterr().err
    assert [line["heldout_loss"] for line in metrics(config.save_dir)] == [None, None]

def test_distances_are_finite_and_not_negative():
    a = frechet.Statistics("a", np.zeros(2), np.eye(2) * 1e308, 9)
    b = frechet.Statistics("b", np.full(2, 1e200), np.eye(2), 9)
    with np.errstate(all="ignore"), pytest.raises(UserError, match="a: Fréchet distance is"):
        fid.score(a, b, None, [])
    x = pixels(0, 50, 20) / 255
    assert frechet.frechet_distance(x.mean(0), np.cov(x.T), x.mean(0), np.cov(x.T)) >= 0

# 2. One folder, two readings.

def test_sixteen_bits_are_scaled_for_scores_as_for_training(tmp_path):
    """Clipped to white, both sets would be the same."""
    for name, low, high in (("a", 1000, 20000), ("b", 30000, 65000)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(np.random.default_rng(0).integers(low, high, (30, 8, 8))):
            Image.fromarray(image.astype(np.uint16)).save(tmp_path / name / f"{i}.png")
    out = succeed("fid.py", tmp_path / "a", tmp_path / "b", *PIXELS)
    assert float(out.split()[1].rstrip(":")) > 20

@pytest.mark.parametrize("modes", [["L", "RGB"], ["RGB", "L"]])
def test_gray_images_among_colours_are_colours_whichever_is_first(tmp_path, modes):
    for i, mode in enumerate(modes):
        pictures(tmp_path / "mixed", 3, mode, 3 * i)
    assert features.ImageSet("x", image_files.find_images(tmp_path / "mixed")).shape == (3, 8, 8)
    gray = image_files.find_images(pictures(tmp_path / "gray", 3, "L"))
    assert features.ImageSet("x", gray).shape == (1, 8, 8)

def test_a_photo_stands_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                    # To be turned by 90 degrees.
    (tmp_path / "photo").mkdir()
    image = Image.fromarray(pixels(0, 8, 16, 3))
    image.save(tmp_path / "photo" / "a.png", exif=exif)
    path, = image_files.find_images(tmp_path / "photo")
    assert np.array_equal(image_files.decode_image(path, 3),
                          np.asarray(image.rotate(-90, expand=True)).transpose(2, 0, 1))
    images, _ = data.load(load_config(own(tmp_path, tmp_path / "photo", network={
        "image_shape": [3, 16, 8]})[1]))
    assert np.array_equal(images[0], image_files.decode_image(path, 3))

# 3. Strange folders.

def test_what_is_found_in_a_folder_is_said(tmp_path, capsys):
    """Hidden names, other files, links to what was walked: left out, in one line."""
    for name in ("a", "b", ".ipynb_checkpoints"):
        pictures(tmp_path / "set" / name, 2)
    (tmp_path / "set" / "a" / "self").symlink_to("..")
    (tmp_path / "set" / "a" / ".000.png").write_bytes(b"")
    (tmp_path / "set" / "b" / "notes.txt").write_text("")
    images, labels = data.load(load_config(own(tmp_path, tmp_path / "set", classes=2)[1]))
    said = capsys.readouterr()
    assert labels.tolist() == [0, 0, 1, 1] and len(images) == 4
    assert f"4 training images, 2 classes, from {tmp_path / 'set'}\n" in said.out
    assert "4 (.ipynb_checkpoints, a/.000.png, a/self, ...) left out" in said.err
    flags = own(tmp_path, tmp_path / "set", classes=7)
    done = run("train.py", *flags)
    assert done.returncode == 2 and "set has 2" in done.stderr.splitlines()[-1]
    pictures(tmp_path / "set", 1)
    for args in (("train.py", *flags), ("fid.py", tmp_path / "set", tmp_path / "set", *PIXELS)):
        done = run(*args)
        assert done.returncode == 2 and "images, 000.png, beside" in done.stderr
    refused("train.py", *own(tmp_path, tmp_path / "set" / "b" / "notes.txt"), words=["notes.txt"])
    pictures(pictures(tmp_path / "all" / "cat", 2).parent / "val", 2)
    refused("train.py", *own(tmp_path, tmp_path / "all"), words=["val beside classes", "in train"])

def test_images_that_cannot_be_taken_are_counted_and_named(tmp_path):
    folder = pictures(tmp_path / "set", 6)
    for name in ("000.png", "001.png", "003.png", "004.png"):
        (folder / name).write_bytes(b"no picture")
    words = ["4 (", "000.png is not a whole image", "003.png", "...)", "replace or remove"]
    refused("train.py", *own(tmp_path, folder), words=words)
    refused("fid.py", folder, folder, *PIXELS, words=words)
    shutil.rmtree(folder)
    pictures(pictures(folder, 4), 2, first=4, size=9)
    refused("fid.py", folder, folder, *PIXELS, words=["2 (", "004.png", "[3, 9, 9]", "[3, 8, 8]"])

# 5. A score against something else than was meant.

def test_a_stray_picture_among_the_samples_is_not_scored(copied):
    flags, folder = copied
    succeed("sample.py", *flags, "--n_samples", 20)
    args = ("fid.py", *flags, *PIXELS)
    before = run(*args).stdout.splitlines()[-1]
    images = folder / "samples" / "3" / "images"
    shutil.copy(images / "000000.png", images / "zz_copy.png")
    done = run(*args)
    assert done.stdout.splitlines()[-1] == before and "n = 20)" in before
    assert f"{images}: zz_copy.png left out: not written by sample.py" in done.stderr
    for other in (images, images.parent):               # images/ by itself is the same.
        assert "FD(pixels) 0: " in run("fid.py", images, other, *PIXELS).stdout
    assert [line["n"] for line in results(folder)] == [20, 20]

def test_a_run_inside_its_data_is_refused(tmp_path):
    root = pictures(tmp_path / "set" / "a", 8).parent
    for key, elsewhere in (("save_dir", {}), ("cache_dir", {"save_dir": str(tmp_path / "run")})):
        flags = own(tmp_path, root, **{key: str(root / "b")} | elsewhere)
        refused("train.py", *flags, words=[f"{key} {root / 'b'} lies in data {root}"])

def test_a_score_is_of_the_data_that_was_trained_on(tmp_path):
    """Another picture of the same size, as many: refused by all; rows of two sets stay apart."""
    for name, first in (("a", 0), ("b", 50)):
        pictures(tmp_path / name / "set", 8, first=first)
        (tmp_path / f"{name}.d").mkdir()
        flags = own(tmp_path / f"{name}.d", tmp_path / name, n_epoch=2)
        succeed("train.py", *flags)
        succeed("sample.py", *flags, "--n_samples", 8)
        succeed("fid.py", *flags, *PIXELS)
    other, words = ("--set", f"data_root={tmp_path / 'a'}"), ["model_1.pth", "8 images of SHA-256"]
    refused("fid.py", *flags, *other, *PIXELS, words=words)
    refused("train.py", *flags, *other, "--set", "n_epoch=3", words=words)
    block = "linear.blockname=out_1"
    refused("probe.py", *flags, *other, "--set", block, words=["no val or val.npz"])
    out = succeed("results.py", tmp_path, "--out", tmp_path / "results.png")
    rows = [line for line in out.splitlines() if line.startswith("| folder (")]
    assert len(rows) == 2 and "a.d/run" in rows[0] and "b.d/run" in rows[1] and "UNetC" in out
    ckpts = tmp_path / "b.d" / "run" / "ckpts"
    shutil.copy(ckpts / "model_1.pth", ckpts / "model_5.pth")
    refused("sample.py", *flags, "--epoch", 5, words=["model_5.pth is of epoch 1"])

# 6. Few images, and images of one's own.

def test_five_images_train_and_go_on(tmp_path):
    """Fewer than the sample grid has columns; a flat folder, without classes; then a probe."""
    flags = own(tmp_path, pictures(tmp_path / "flat", 5), n_sample=64, save_every=1)
    assert "5 training images, no classes" in succeed("train.py", *flags)
    assert "after step 1" in succeed("train.py", *flags, "--set", "n_epoch=3")
    grid = Image.open(tmp_path / "run" / "grids" / "0002.png")
    assert grid.size == (8 * 34 + 2, 9 * 34 + 4)
    shutil.copytree(tmp_path / "flat", tmp_path / "both" / "train")
    shutil.copytree(tmp_path / "flat", tmp_path / "both" / "val")
    refused("probe.py", *flags, "--set", f"data_root={tmp_path / 'both'}", "--set", "n_epoch=3",
            "--set", "linear.blockname=out_1", words=["two classes or more", "0 and 0", "both"])

@pytest.mark.parametrize(("labels", "words"), [
    (None, "8 training images, no classes"), (np.arange(8) % 3, "8 training images, 3 classes"),
    (np.arange(7), "labels int64 [7] are no classes"),
    (np.eye(8), "labels float64 [8, 8] are no classes"),
    (np.arange(8) - 1, "labels int64 [8] are no classes")])
def test_an_npz_trains(tmp_path, labels, words):
    path, images = tmp_path / "train.npz", pixels(0, 8, 8, 8, 3)
    np.savez(path, arr_0=images, **{} if labels is None else {"labels": labels})
    flags = own(tmp_path, tmp_path)
    if "are no" in words:
        return refused("train.py", *flags, words=[path, words])
    found, kept = data.load(load_config(flags[1]))
    assert np.array_equal(found, images.transpose(0, 3, 1, 2))
    assert kept.tolist() == ([-1] * 8 if labels is None else labels.tolist())
    assert words in succeed("train.py", *flags)
    refused("train.py", *own(tmp_path, path, network={"image_shape": [1, 8, 8]}),
            words=[path, "[3, 8, 8]", "network.image_shape [1, 8, 8]"])

def test_sigma_data_is_compared_with_the_pixels(tmp_path):
    args = ["train.py", *own(tmp_path, pictures(tmp_path / "set", 8)), "--max_steps", 1]
    right, wrong = run(*args), run(*args, "--set", "diffusion.sigma_data=0.85")
    assert "RMS of the pixels 0.583, sigma_data 0.58\n" in right.stdout
    assert "the RMS" not in right.stderr
    assert "RMS of the pixels 0.583, sigma_data 0.85: set" in wrong.stderr

def test_the_config_that_is_there_to_copy():
    config = load_config(ROOT / "config" / "folder" / "G.yaml")
    recipe = load_config(ROOT / "config" / "cifar10" / "G.yaml").model_dump()
    changed = {key for key, value in config.model_dump().items() if recipe[key] != value}
    assert changed == {"dataset", "data_root", "classes", "eval_every", "save_dir"}

# 7, 8. What comes from below; streams.

@pytest.mark.parametrize("streams", [
    ">&- 2>&-", pytest.param(">/dev/full 2>/dev/full", marks=pytest.mark.slow)])
def test_a_command_that_cannot_say_anything_does_its_work(tmp_path, streams):
    command = launch("train.py", "--config", tiny_config(tmp_path, n_epoch=1))
    done = subprocess.run(["bash", "-c", f'"$@" {streams}', "bash", *command["args"]],
                          env=command["env"], capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "ckpts" / "model_0.pth").exists()
    assert len(metrics(tmp_path / "run")) == 2

def test_help_in_ascii():
    """And a mistake that cannot be shown keeps its exit code."""
    command = f"{sys.executable} {ROOT}/fid.py"
    done = subprocess.run(["bash", "-c", f"{command} --help && {command} no.npz a 2>&-"],
                          env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert done.returncode == 2 and b"Fr?chet" in done.stdout and done.stderr == b""

# 9. Values of --set that YAML reads as something else.

@pytest.mark.parametrize(("assignment", "expected"), [
    ("save_dir=runs/try #2", "runs/try #2"), ("save_dir=2024-01-02", "2024-01-02"),
    ("save_dir=007", "007"), ("save_dir=runs: a", "runs: a"), ("save_dir='a b'", "a b"),
    ("data_root=yes", "yes"), ("save_dir=runs/x #2'", "runs/x #2'"), ("cache_dir=Null", None),
    ("cache_dir=null", None), ("cache_dir= c ", "c"), ("seed=7", 7),
    ("linear.blockname=1e5", "1e5"), ("lrate=2e-2", 0.02), ("tref_epoch=null", None)])
def test_a_text_is_taken_as_it_stands(tmp_path, assignment, expected):
    config = load_config(tiny_config(tmp_path, linear={"blockname": "out_1"}), [assignment])
    for key in assignment.partition("=")[0].split("."):
        config = getattr(config, key)
    assert config == expected

# 11. Messages.

@pytest.mark.parametrize(("state", "words"), [
    ({"MODEL": {}, "EMA": {}, "opt": {}}, ["not a checkpoint of this project", "MODEL, EMA, opt"]),
    ({"model": {}, "model_args": {}, "iter_num": 1}, ["model, model_args, iter_num"]),
    ([1], ["not a checkpoint of this project", "list"])])
def test_a_checkpoint_of_another_project_is_not_called_damaged(copied, state, words):
    flags, folder = copied
    torch.save(state, folder / "ckpts" / "model_3.pth")
    for script in ("sample.py", "probe.py", "fid.py"):
        done = run(script, *flags)
        assert "damaged" not in done.stderr or script == "fid.py"
        refused(script, *flags, words=["no images"] if script == "fid.py" else words)

def test_messages(tmp_path, trained):
    np.save(tmp_path / "a.npy", pixels(0, 4, 8, 8, 3))
    refused("fid.py", tmp_path / "a.npy", tmp_path / "a.npy", words=["it is an .npy", "savez"])
    with Image.new("RGB", (8, 8)) as image:
        image.save(tmp_path / "a.png")
    shutil.make_archive(tmp_path / "zip", "zip", tmp_path, "a.png")
    refused("fid.py", tmp_path / "zip.zip", tmp_path / "zip.zip", words=["a.png in it is no array"])
    (tmp_path / "dead").symlink_to("nowhere")
    refused("train.py", "--config", tiny_config(tmp_path), "--set", f"save_dir={tmp_path / 'dead'}",
            words=["dead is a link to what does not exist: nowhere"])
    folders = pictures(pictures(tmp_path / "set" / "a", 3).parent / "b", 3, first=3).parent
    done = run("fid.py", folders, folders, *PIXELS)
    assert "FD(pixels) 0: " in done.stdout and "(n = 6)" in done.stdout

# 13. FD_DINOv2.

class Tokens(nn.Module):
    """Named as DINOv2's are: what the loading code sees of it, but for its size."""
    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 16))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, 16, 14, 14)})
        self.norm = nn.LayerNorm(16)

    def forward(self, x):
        tokens = self.patch_embed["proj"](x).flatten(2).transpose(1, 2) + self.cls_token
        return self.norm(tokens.square().mean(1))

def test_fd_dinov2(tmp_path, monkeypatch):
    """The weights of the file, and images as Pillow resizes them, normalized by torchvision."""
    def hub_load(repository, name, **how):
        assert (repository, name) == ("facebookresearch/dinov2", "dinov2_vitl14")
        return Tokens()

    monkeypatch.setattr(torch.hub, "load", hub_load)
    torch.manual_seed(0)
    theirs, path = Tokens().eval(), tmp_path / "weights.pth"
    torch.save(theirs.state_dict(), path)
    images = torch.from_numpy(pixels(1, 4, 3, 32, 32))
    extractor = features.Extractor("dinov2", CPU, path)
    ours, = extractor(images)
    large = np.stack([np.asarray(Image.fromarray(x.permute(1, 2, 0).numpy()).resize(
        (224, 224), Image.Resampling.BICUBIC)) for x in images]).transpose(0, 3, 1, 2)
    x = normalize(torch.from_numpy(large) / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.no_grad():
        expected = theirs(x)
    assert (ours - expected).abs().max() < 0.02 * expected.std()
    assert [extractor.metric(name) for name in ("FID", "KID", "recall")] == [
        "FD_DINOv2", "KD_DINOv2", "recall_DINOv2"] and len(extractor.sha256) == 64
    np.savez(tmp_path / "a.npz", images.permute(0, 2, 3, 1).numpy())
    out = succeed("fid.py", tmp_path / "a.npz", tmp_path / "a.npz", "--features", "dinov2",
                  "--weights", path)
    assert float(re.search("FD_DINOv2 (.*?): ", out)[1]) == pytest.approx(0, abs=1e-9)
    torch.save({"cls_token": torch.zeros(1, 1, 8)}, path)
    refused("fid.py", tmp_path / "a.npz", tmp_path / "a.npz", "--features", "dinov2",
            "--weights", path, words=["cannot load dinov2 from", path])
