"""edm2.results: the table and the curves of what fid.py and probe.py leave behind."""

import json
import math
import re
import shutil
import pytest
import torch
from conftest import metrics, refused, results, run, succeed, tiny_config, weights
from PIL import Image
from edm2 import diffusion
from edm2.config import load_config
from edm2.evaluation import LEVELS
from edm2.results import along, levels

def write(folder, dataset, config, *rows):
    """A run's results.jsonl; rows: (figure, value, epoch, n, other keys). Return its folder."""
    folder.mkdir(parents=True)
    with open(folder / "results.jsonl", "w") as file:
        for figure, value, epoch, n, *more in rows:
            line = {"figure": figure, "value": value, "epoch": epoch, "n": n, "Mimg": epoch / 20,
                    "features": "f", "seeds": [0], "dataset": dataset, "net_type": f"UNet{config}"}
            file.write(json.dumps(dict(line, **dict(*more))) + "\n")
    return folder

def test_table_and_curves(tmp_path):
    c = write(
        tmp_path / "c", "cifar10", "C", ("FID", 3.5, 499, 50000), ("FID", 3.2, 1000, 50000),
        ("FID", 9.9, 99, 50000), ("KID", 0.1, 999, 50000),
        ("FID", 2.0, 999, 1000),                            # Fewer images: not to be compared.
        ("FID", 3.0312, 999, 60000),                        # More are as good.
        ("FID", 1.0, 999, 50000, {"sampling": {"eta": 0.5}}),       # Not the table's samples.
        ("probe", 91.846, 999, 10000, {"timestep": 4}),
        *(("probe", 80 + t, 499, 10000, {"timestep": t, "features": "out_6"}) for t in (3, 4, 5)))
    # The later of two lines of the same thing counts.
    e = write(tmp_path / "e", "cifar10", "E", ("FID", 2.5, 1999, 50000), ("FID", 2.72, 1999, 50000))
    g = write(tmp_path / "g", "digits", "G", ("FD(pixels)", 1.234, 59, 64), ("probe", 93, 59, 360))
    c2 = write(tmp_path / "c2", "cifar10", "C", ("FID", 4, 999, 50000))
    with open(e / "results.jsonl", "a") as file:
        file.write('{"figure": "FID", "value"\n[1]\n{"figure": "FID"}\n'
                   '{"figure": "FID", "value": NaN}\n')
    done = run("results.py", c, e, g, c2, "--out", tmp_path / "out.png")
    assert done.returncode == 0 and "other sampling settings: FID 1 @ 999" in done.stderr
    assert done.stderr.count(f"{e / 'results.jsonl'}: a damaged line") == 4
    names = [f"{metric} {config}" for metric in ("FID", "FD(pixels)", "probe")
             for config in ("UNetC", "UNetE", "UNetG")]
    assert done.stdout.splitlines()[:5] == [
        f"| | {' | '.join(names)} |", "|---|---|---|---|---|---|---|---|---|---|",
        f"| CIFAR-10 ({c}, {e}) | 3.03 @ 999 | 2.72 @ 1999 | - | - | - | - | "
        "91.85 @ 999 (t=4 f, best of 4) | - | - |",
        "| digits | - | - | - | - | - | 1.23 @ 59 (n=64) | - | - | 93.00 @ 59 |",
        f"| CIFAR-10 ({c2}) | 4.00 @ 999 | - | - | - | - | - | - | - | - |"]
    with Image.open(tmp_path / "out.png") as image:
        assert image.width > 1500 and len(image.convert("RGB").getcolors(1 << 20)) > 50

def test_like_is_compared_with_like(tmp_path):
    """The timestep and block, or the n, of the most epochs, not the best at one. And: all below."""
    pair = [("probe", value, epoch, 360, {"timestep": 4, "features": "out_1"})
            for epoch, value in ((9, 81), (19, 83))]
    grid = [("probe", 86, 19, 360, {"timestep": 1, "features": f"out_{i}"}) for i in (1, 2)]
    distances = [("FD(pixels)", 5, 9, 64), ("FD(pixels)", 4, 19, 64), ("FD(pixels)", 7, 19, 512)]
    write(tmp_path / "runs" / "digits" / "a", "digits", "C", *pair, *grid, *distances)
    write(tmp_path / "runs" / "digits" / "b", "digits", "G", *grid)
    row = ("| digits | 4.00 @ 19 (n=64) | - | 83.00 @ 19 (t=4 out_1) | "
           "86.00 @ 19 (t=1 out_1, best of 2) |")
    assert succeed("results.py", cwd=tmp_path).splitlines()[2] == row
    assert succeed("results.py", tmp_path, cwd=tmp_path).splitlines()[2] == row
    assert (tmp_path / "results.png").exists()

def test_scores_against_evaluations(trained, tmp_path):
    """Samples of three numbers of steps, with and without churn; Heun's 2n - 1 evaluations."""
    copy = shutil.copytree(trained / "run", tmp_path / "run")
    flags = ("--config", trained / "config.yaml", "--set", f"save_dir={copy}")
    how = ("fid.py", *flags, "--features", "pixels")
    for more in ([], ["--steps", 4], ["--steps", 7], ["--steps", 4, "--eta", 0.5]):
        out = succeed("sample.py", *flags, "--n_samples", 20, *more)
        folder = re.search("images: (.*)/images", out)[1]
        evaluations = int(re.search(r"each of (\d+) evaluations", out)[1])
        assert evaluations == 2 * (more[1] if more else 18) - 1
        succeed(*how, "--images", folder)
    succeed("probe.py", *flags)                 # Of no sampler.
    (curves,) = along(copy, "steps", None).values()
    assert {label: sorted(x for x, _ in points) for label, points in curves.items()} == {
        "epoch 3, eta 0": [7, 13, 35]}      # One number of steps is no curve.
    values = {(line["sampling"]["steps"], line["sampling"]["eta"]): line["value"]
              for line in results(copy) if line["figure"] == "FD(pixels)"}
    assert dict(curves["epoch 3, eta 0"]) == {7: values[4, 0], 13: values[7, 0], 35: values[18, 0]}
    # Of other epochs, or another n, there may be more: samples of 18 steps, and no curve.
    with open(copy / "results.jsonl", "a") as file:
        for epoch in range(4):
            file.write(json.dumps(results(copy)[0] | {"n": 500, "epoch": epoch}) + "\n")
            file.write(json.dumps(results(copy)[0] | {"epoch": epoch % 3}) + "\n")
    assert list(along(copy, "steps", None).values()) == [curves]
    succeed("results.py", "--steps", copy, "--out", tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").width > 500
    refused("results.py", "--steps", copy, "--figure", "FID", words=["no such score by steps"])

def test_loss_by_noise_level(trained, tmp_path):
    """Of metrics.jsonl's evaluations; e^u is what the loss is divided by."""
    path = tiny_config(tmp_path, "UNetG", n_epoch=3, eval_every=1, eval={"images": 20})
    succeed("train.py", "--config", path)
    out = succeed("results.py", "--levels", tmp_path / "run", "--out", tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").width > 1000 and out.count("| sigma ") == 8
    text, rows = levels(tmp_path / "run")
    loss, expected = next(iter(rows.values())).values()
    lines = metrics(tmp_path / "run", "heldout_loss")
    denoiser = diffusion.build(load_config(path))
    denoiser.uncertainty.load_state_dict(weights(tmp_path / "run", 2, "uncertainty"))
    for level in LEVELS:
        label = f"sigma {level:.3g}"
        assert loss[label] == [(n["Mimg"], n[f"heldout_loss/{level:.3g}"]) for n in lines]
        u = denoiser.uncertainty.eval()(torch.tensor([level]).float().log() / 4).item()
        assert expected[label][-1][1] == pytest.approx(math.exp(u), rel=1e-5)
        assert len(expected[label]) == 3 and f"to {math.exp(u):.3g} |" in text
    # A run of before u was recorded has its losses.
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"u/', '"old/'))
    assert list(next(iter(levels(tmp_path / "run")[1].values()))) == ["held-out loss"]
    refused("results.py", "--levels", trained / "run", words=["train with eval_every"])
    refused("results.py", "--levels", "no", words=["metrics.jsonl is not there"])

@pytest.mark.parametrize(("args", "words"), [
    (["no"], ["no results.jsonl", "or below no"]), (["empty"], ["empty/results.jsonl"]),
    ([], ["or below runs"]), (["kid"], ["kid", "no FID"]),
    (["good", "--out", "good/results.jsonl/x.png"], ["good/results.jsonl/x.png"]),
    (["good", "--out", "empty"], ["empty"])])
def test_bad_input(tmp_path, args, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "results.jsonl").write_text("")
    write(tmp_path / "kid", "cifar10", "C", ("KID", 0.1, 999, 50000))
    write(tmp_path / "good", "cifar10", "C", ("FID", 3, 999, 50000))
    refused("results.py", *args, words=words, cwd=tmp_path)
    assert not (tmp_path / "results.png").exists()
