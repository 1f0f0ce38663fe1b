"""What is measured on the way: the held-out loss, FID and probe of a schedule."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import metrics, run, succeed, tiny_config
from test_train import training

import data
import edm
import evaluation
import runtime

ONE = runtime.Runtime(0, 1, 0, 1, torch.device("cpu"))


def lines(save_dir):
    return metrics(save_dir, evaluation.LOSS)


def test_the_held_out_loss_is_the_loss(tmp_path):
    """Against the loss written out; the noise of an image does not depend on the level or on the other images."""
    t = training(tmp_path, batch_size=8)
    for _ in range(3):
        t.training_step(torch.arange(8))
    denoiser = t.edm_ema
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (70, 1, 8, 8), np.uint8))
    one = evaluation.held_out_loss(denoiser, images[:1], ONE)
    seen = []

    class Perfect(edm.EDM):
        def denoise(self, x, sigma):
            seen.append((x, sigma))
            return super().denoise(x, sigma)

    spy = Perfect(denoiser.net, denoiser.uncertainty, **t.config["diffusion"])
    again = evaluation.held_out_loss(spy, images[:1], ONE)
    assert again == one and len(seen) == 8
    y = images[:1].float() / 127.5 - 1
    alone = [(x - y) / sigma for x, sigma in seen]
    assert all(torch.allclose(noise, alone[-1], rtol=0, atol=1e-3) for noise in alone[1:])
    evaluation.held_out_loss(spy, images, ONE)
    assert torch.equal(seen[8 + 7][0][:1], seen[7][0])
    for (x, sigma), level in zip(seen[:8], evaluation.LEVELS, strict=True):
        assert sigma.item() == pytest.approx(level) and 0.02 - 1e-9 <= level <= 20 + 1e-9
        noise = (x - y) / sigma
        assert noise.std().item() == pytest.approx(1, abs=0.3)
        with torch.no_grad():
            expected = (1 / 0.5 ** 2 + 1 / level ** 2) * (denoiser.denoise(x, sigma) - y).square().mean()
        assert one[f"heldout_loss/{level:.3g}"] == pytest.approx(expected.item(), rel=1e-5)
    assert one["heldout_loss"] == pytest.approx(np.mean([v for k, v in one.items() if "/" in k]))
    both = evaluation.held_out_loss(denoiser, images, ONE)
    assert evaluation.held_out_loss(denoiser, images, ONE, batch_size=7) == pytest.approx(both, rel=1e-5)
    assert both["heldout_loss"] != pytest.approx(one["heldout_loss"], rel=1e-5)


def test_a_schedule_and_what_it_gives(tmp_path):
    """Held-out loss, FD and probe at the epochs of eval_every and at the last; much the same in two processes; the same
    after a resume, which does what is missing and nothing twice."""
    flags = ["--set", "eval_every=2", "--set", "eval={fid: 40, features: pixels, probe: true, images: 100}",
             "--set", "linear={blockname: out_1, n_epoch: 3}", "--set", "n_epoch=4", "--set", "save_every=100"]
    config = tiny_config(tmp_path, "UNetE")
    succeed("train.py", "--config", config, *flags)
    found = lines(tmp_path / "run")
    assert [line["epoch"] for line in found] == [0, 2, 3]
    assert found[-1]["heldout_loss"] < found[0]["heldout_loss"]
    for line in found:
        assert line["FD(pixels) n=40"] > 0 and 0 < line["probe t=4 out_1 (%)"] <= 100
        assert len([key for key in line if key.startswith("heldout_loss/")]) == 8
    board = b"".join(path.read_bytes() for path in (tmp_path / "run" / "tensorboard").glob("events*"))
    assert b"heldout_loss/0.02" in board

    succeed("train.py", "--config", config, *flags, "--set", f"save_dir={tmp_path / 'two'}", processes=2)
    for one, two in zip(found, lines(tmp_path / "two"), strict=True):
        # Training itself rounds differently in two processes: to 1e-4, and a pixel or an image may tip over.
        assert two["heldout_loss"] == pytest.approx(one["heldout_loss"], rel=1e-4)
        assert two["FD(pixels) n=40"] == pytest.approx(one["FD(pixels) n=40"], rel=0.02)
        assert two["probe t=4 out_1 (%)"] == pytest.approx(one["probe t=4 out_1 (%)"], abs=1)

    # The last evaluation was not made: the last checkpoint is there, its line is not.
    path = tmp_path / "run" / "metrics.jsonl"
    last = found[-1]["step"]
    kept = [line for line in path.read_text().splitlines(keepends=True)
            if not ("heldout" in line and f'"step": {last}' in line)]
    path.write_text("".join(kept))
    (tmp_path / "run" / "grids" / "0003.png").unlink()
    succeed("train.py", "--config", config, *flags)
    again = lines(tmp_path / "run")
    assert [line["epoch"] for line in again] == [0, 2, 3]
    assert {k: v for k, v in again[-1].items() if "loss" in k} == {k: v for k, v in found[-1].items() if "loss" in k}


def test_two_processes_measure_what_one_does(tmp_path):
    """The same network: to 1e-5."""
    script = tmp_path / "measure.py"
    script.write_text(f"""
import sys; sys.path[:0] = [{str(evaluation.__file__.rpartition('/')[0])!r}]
import json, torch, edm, evaluation, options, runtime
def main():
    rt = runtime.start()
    torch.manual_seed(0)
    model = edm.build(options.load_config({str(tiny_config(tmp_path, 'UNetC'))!r})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    images = torch.randint(0, 256, (150, 1, 8, 8), dtype=torch.uint8)
    found = evaluation.held_out_loss(model, images, rt)
    if rt.is_main:
        print(json.dumps(found))
runtime.command(main)()
""")
    one, two = (json.loads(succeed(script, processes=n).splitlines()[-1]) for n in (None, 2))
    print(f"of one process {one['heldout_loss']:.8f}, of two {two['heldout_loss']:.8f}")
    assert two == pytest.approx(one, rel=1e-5) and len(set(one.values())) == 9


@pytest.mark.parametrize(("key", "words"), [
    ("eval.fid=1", ["eval.fid"]),
    ("eval.features=vgg", ["eval.features", "inception"]),
    ("eval_every=0", ["eval_every"]),
    ("eval.probe=true", ["eval_every"]),
    ("eval={prob: true}", ["did you mean eval.probe?"]),
    ("dynamics_every=-1", ["dynamics_every"]),
])
def test_bad_keys(tmp_path, key, words):
    done = run("train.py", "--config", tiny_config(tmp_path), "--set", key)
    assert done.returncode == 2 and all(word in done.stderr for word in words), done.stderr
    assert not (tmp_path / "run").exists()


def test_missing_weights_are_said_before_training(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    done = run("train.py", "--config", tiny_config(tmp_path), "--set", "eval_every=1", "--set", "eval.fid=10")
    assert done.returncode == 2 and "could not be downloaded" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_images_are_spread_and_a_score_that_fails_ends_nothing(tmp_path, monkeypatch, capsys):
    """eval.images of a set that is sorted by class are of all classes; what cannot be scored is said and left out."""
    t = training(tmp_path, batch_size=8)
    images, labels = data.load(t.config)
    test = torch.arange(200, dtype=torch.uint8)[:, None, None, None].expand(200, 1, 8, 8)
    monkeypatch.setattr(data, "load", lambda config, train: (test, torch.arange(200)))
    t.config["eval"] |= {"images": 5, "probe": True}
    t.config["linear"]["blockname"] = "out_1"
    evaluator = evaluation.Evaluator(t.config, SimpleNamespace(batch_gpu=None), ONE, images, labels)
    assert evaluator.chosen[:, 0, 0, 0].tolist() == [0, 49, 99, 149, 199]

    def fails(denoiser):
        raise runtime.UserError("no space left")

    monkeypatch.setattr(evaluator, "probed", fails)
    assert evaluation.LOSS in evaluator.figures(t.edm_ema)
    assert "no space left; not measured, training goes on" in capsys.readouterr().err


def test_the_sweep_trains_scores_and_tells_variants_apart(tmp_path):
    """benchmarks/sweep.py on the digits, one epoch: its table, and a second run that finds everything done."""
    flags = ["--data", "digits", "--save_dir", tmp_path, "--seeds", "2", "--samples", "10", "--set", "n_epoch=1",
             "--set", "network.dropout=0", "--set", "network.n_channels=8", "--set", "network.ch_mults=[1,2]",
             "--set", "eval.images=20", "--set", "network.attn_channels_per_head=8",
             "--only", "G", "G gain", "G dropout"]
    first = succeed("benchmarks/sweep.py", *flags)
    rows = {row.split(" | ")[0].strip("| "): row.split(" | ")[1:] for row in first.splitlines() if row.startswith("|")}
    assert set(rows) == {"variant", "---", "G", "G gain from 1", "G dropout 0.13"}         # Dropout 0 is G itself.
    assert len({rows[name][2] for name in rows}) == len(rows)
    assert rows["G"][0] == "2" and " ± " in rows["G"][2]
    scores = json.loads((tmp_path / "digits" / "G" / "1" / "scores.json").read_text())
    assert scores["config"]["seed"] == 1 and scores["plain"]["FD(pixels) n=10"] > 0
    assert scores["0.05"]["heldout_loss"] != scores["0.18"]["heldout_loss"]
    assert succeed("benchmarks/sweep.py", *flags) == first
    done = run("benchmarks/sweep.py", *flags, "--set", "lrate=1e-4")
    assert done.returncode == 2 and "another config" in done.stderr
