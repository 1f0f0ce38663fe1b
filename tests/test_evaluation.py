"""What is measured on the way: the held-out loss, FID and probe of a schedule."""

import shutil
from unittest import mock
import numpy as np
import pytest
import torch
from conftest import metrics, refused, succeed, tiny_config
from edm2 import data, evaluation
from edm2.config import load_config
from edm2.errors import UserError
from edm2.posthoc_ema import load_denoiser

KEY = "heldout_loss"

def test_the_held_out_loss_is_the_loss(trained, monkeypatch):
    """Against the loss written out; an image's noise depends on neither level nor other images."""
    config, seen = load_config(trained / "config.yaml"), []
    denoiser, s_d = load_denoiser(config, 3), config.diffusion.sigma_data
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (70, 1, 8, 8), np.uint8))
    none, y = torch.full([70], -1), images[:1].float() / 127.5 - 1
    one = evaluation.held_out_loss(denoiser, images[:1], none)
    D = denoiser.denoise
    monkeypatch.setattr(denoiser, "denoise", lambda *given: seen.append(given) or D(*given))
    assert evaluation.held_out_loss(denoiser, images[:1], none) == one and len(seen) == 8
    alone = [(x - y) / sigma for x, sigma, _ in seen]
    assert all(torch.allclose(noise, alone[-1], rtol=0, atol=1e-3) for noise in alone[1:])
    for (x, sigma, _), noise, level in zip(seen, alone, evaluation.LEVELS, strict=True):
        assert sigma.item() == pytest.approx(level) and 0.02 - 1e-9 <= level <= 20 + 1e-9
        assert noise.std().item() == pytest.approx(1, abs=0.3)
        with torch.no_grad():
            error = (D(x, sigma) - y).square().mean().item()
        expected = (1 / s_d ** 2 + 1 / level ** 2) * error
        assert one[f"{KEY}/{level:.3g}"] == pytest.approx(expected, rel=1e-5)
    assert one[KEY] == pytest.approx(np.mean([v for k, v in one.items() if "/" in k]))
    both = evaluation.held_out_loss(denoiser, images, none)
    assert torch.equal(seen[15][0][:1], seen[7][0]) and (seen[23][0][0] - seen[15][0][0]).std() > 9
    assert evaluation.held_out_loss(denoiser, images, none, 7) == pytest.approx(both, rel=1e-5)
    assert both[KEY] != pytest.approx(one[KEY], rel=1e-5)

@pytest.mark.slow
def test_a_schedule_and_what_it_gives(tmp_path):
    """Held-out loss, FD and probe at the epochs of eval_every and at the last: those of fid.py and
    probe.py; the same after a resume, which does nothing twice, and, to 1e-5, in two processes."""
    fd, accuracy, save_dir = "FD(pixels) n=80", "probe t=4 out_1 (%)", tmp_path / "run"
    config = tiny_config(tmp_path, "UNetE", n_epoch=4, save_every=100, eval_every=2, eval={
        "fid": 80, "features": "pixels", "probe": True, "images": 150}, linear={
        "blockname": "out_1", "n_epoch": 3})
    succeed("train.py", "--config", config)
    found = metrics(save_dir, KEY)
    assert [line["epoch"] for line in found] == [0, 2, 3] and found[-1][KEY] < found[0][KEY]
    for line in found:
        assert line[fd] > 0 and 0 < line[accuracy] <= 100
        assert len({line[key] for key in line if key.startswith(KEY)}) == 9
    board = b"".join(path.read_bytes() for path in (save_dir / "tensorboard").glob("events*"))
    assert f"{KEY}/0.02".encode() in board
    succeed("sample.py", "--config", config, "--n_samples", 80)
    scored = succeed("fid.py", "--config", config, "--features", "pixels")
    scored = float(scored.splitlines()[-1].split()[1].rstrip(":"))
    assert scored == pytest.approx(found[-1][fd], rel=1e-3)
    probed = succeed("probe.py", "--config", config, "--passes", 1)
    assert f"probe accuracy {found[-1][accuracy]:.2f} %" in probed
    # Killed between the save on the way and the checkpoint: the epoch's end is done again.
    (save_dir / "ckpts" / "model_3.pth").rename(save_dir / "ckpts" / "latest.pth")
    (save_dir / "grids" / "0003.png").unlink()
    two = shutil.copytree(save_dir, tmp_path / "two")
    for folder, processes in ((save_dir, None), (two, 2)):
        succeed("train.py", "--config", config, "--set", f"save_dir={folder}", processes=processes)
        assert (folder / "grids/0003.png").exists() and (folder / "ckpts/model_3.pth").exists()
        again = metrics(folder, KEY)
        assert again[:2] == found[:2] and again[2:] == [pytest.approx(found[2], rel=1e-5)]
        print(f"{processes} processes: {found[-1][KEY]:.8f} before, {again[-1][KEY]:.8f} again")
    assert metrics(save_dir, KEY) == found

@pytest.mark.parametrize(("key", "words"), [
    ("eval.fid=1", ["eval.fid"]), ("eval.features=vgg", ["eval.features", "inception", "'vgg'"]),
    ("eval_every=0", ["eval_every"]), ("eval_every=null", ["eval_every"]),
    ("eval.prob=true", ["did you mean eval.probe?"]), ("dynamics_every=-1", ["dynamics_every"]),
    ("eval.probe=false", ["cannot read", "download", "hub/checkpoints/weights-inception"])])
def test_bad_keys_and_missing_weights_are_said_before_training(tmp_path, monkeypatch, key, words):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    config = tiny_config(tmp_path, eval_every=1, eval={"fid": 10})
    refused("train.py", "--config", config, "--set", key, words=words)
    assert not (tmp_path / "run").exists()

def test_images_are_spread_and_a_score_that_fails_ends_nothing(trained, monkeypatch, capsys):
    """eval.images of a sorted set are of all classes; what cannot be scored is said."""
    config = load_config(trained / "config.yaml", ["eval_every=1", "eval={images: 5, probe: true}"])
    images, labels = data.load(config)
    test = torch.arange(200, dtype=torch.uint8)[:, None, None, None].expand(200, 1, 8, 8)
    monkeypatch.setattr(data, "load", lambda config, train: (test, torch.arange(200)))
    evaluator = evaluation.Evaluator(config, images, labels, torch.device("cpu"))
    held_out, given = evaluator.held_out
    assert held_out[:, 0, 0, 0].tolist() == given.tolist() == [0, 49, 99, 149, 199]
    fails = mock.Mock(side_effect=UserError("no space left"))
    monkeypatch.setattr(evaluation.linear_probe.Probe, "accuracies", fails)
    assert len(evaluator.measure(load_denoiser(config, 3))) == 9 + 8       # Losses and u.
    assert "no space left; not measured, training goes on" in capsys.readouterr().err
