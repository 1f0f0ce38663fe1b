"""benchmarks/sweep.py: which runs a command line names, that they are trained as train.py trains
them, once, and what a table says of them; benchmarks/expected.py on such runs."""

import json
import subprocess
import sys
from argparse import Namespace
import numpy as np
import pytest
from conftest import ROOT, metrics, refused, run, succeed, tiny_config, weights
from edm2.errors import UserError
from edm2.evaluation import LEVELS

@pytest.fixture
def sweep(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT))      # Whose fid.py is not that of benchmarks/.
    import sweep
    return sweep

def named(sweep, path, *vary, **how):
    args = Namespace(**{"config": [str(path)], "vary": list(vary), "mean": False, "set": [],
                        "save_dir": "runs", "amp_dtype": None, "epochs": None, "samples": 9,
                        "probe": 0} | how)
    return {v.name.partition(" ")[2]: v.config(0, args)[0] for v in sweep.variants(args)}

def test_which_variants(sweep, tmp_path):
    """One key, keys together, all pairs; lists and null are values; the base goes by its name."""
    config = tiny_config(tmp_path, "UNetG", eval_every=1)
    found = named(sweep, config, "lrate=1e-2,0.02", "optim_args.betas=[0.9,0.99],[0,0.99]")
    assert {name: (c.lrate, c.optim_args.betas) for name, c in found.items()} == {
        "optim_args.betas=[0.9, 0.99]": (0.01, [0.9, 0.99]),
        "optim_args.betas=[0, 0.99]": (0.01, [0.0, 0.99]),
        "lrate=0.02 optim_args.betas=[0.9, 0.99]": (0.02, [0.9, 0.99]),
        "lrate=0.02 optim_args.betas=[0, 0.99]": (0.02, [0.0, 0.99])}
    both = named(sweep, config, "diffusion.p_mean,diffusion.p_std=[-1.2,1.2],[-0.8,1.6]")
    assert {name: (c.diffusion.p_mean, c.diffusion.p_std) for name, c in both.items()} == {
        "": (-1.2, 1.2), "diffusion.p_mean=-0.8 diffusion.p_std=1.6": (-0.8, 1.6)}
    assert [c.tref_epoch for c in named(sweep, config, "tref_epoch=null,3").values()] == [None, 3]
    levels = "network.ch_mults,network.is_attn=[[1],[false]],[[1,1,2],[false,false,false]]"
    assert len(named(sweep, config, levels)) == 2           # Each alone would be refused.
    for wrong in ("lrate,ema=1,2", "lrate,ema=[1,2,3]", "lrate=", "lrate", "seed=1,2"):
        with pytest.raises(UserError, match="say KEY=A,B,C"):
            named(sweep, config, wrong)
    for vary, how, message in (
            (["lrate=[1"], {}, "YAML"), (["lrat=1"], {}, "lrate"), ([], {"mean": True}, "Config C"),
            ([], {"epochs": [1, 3]}, "2 epochs"), ([], {"probe": 9}, "blocks are"),
            ([], {"set": ["eval_every=null"]}, "eval_every"), ([], {"samples": 1}, "two samples"),
            ([], {"config": [str(config), str(config.with_suffix(".yml"))]}, "two different")):
        config.with_suffix(".yml").write_text(config.read_text().replace("ema: 0.99", "ema: 0.5"))
        with pytest.raises(UserError, match=message):
            named(sweep, config, *vary, **how)

def test_tables(sweep):
    """Means and deviations; a score that one lacks is "-", NaN is said; at equal time a slower one
    lies between its marks, by log(Mimg), and is not extrapolated below the first."""
    def lines(speed, losses, **more):
        return [{"seed": seed, "Mimg": mark, "img_per_s": speed, "activations": None,
                 "machine": "CPU, 2026-01-01", "heldout": [[0.1, None]],
                 "scores": {"heldout_loss": loss + seed / 10, **levels, **more}}
                for seed in (0, 1) for mark, loss in zip((0.1, 0.4), losses, strict=True)]

    levels = {f"heldout_loss/{level:.3g}": 0.5 if 0.1 < level < 3 else 1.0 for level in LEVELS}
    found = {"a": lines(100, (4, 3), FD=5.0), "b": lines(50, (4, 2)), "c": lines(20, (4, 2))}
    rows = [row.strip("| ").split(" | ") for row in sweep.table(found).splitlines()]
    assert rows[0][:6] == ["variant", "seeds", "Mimg", "heldout_loss", "of 0.14 to 2.8", "FD"]
    assert rows[2][:6] == ["a", "2", "0.1", "4.05 ± 0.071", "0.5 ± 0", "5 ± 0"]
    assert rows[6][:6] == ["b", "2", "0.4", "2.05 ± 0.071", "0.5 ± 0", "-"]
    assert "| nan |" in sweep.curves(found, "heldout")
    for speeds in {}, {"a": 10, "b": 5, "c": 2}:
        rows = [row.strip("| ").split(" | ")
                for row in sweep.at_equal_time(found, speeds).splitlines()[2:]]
        assert rows == [["a", "2", "0.4", "3.05 ± 0.071", "0.5 ± 0", "5 ± 0"],
                        ["b", "2", "0.2", "3.05 ± 0.071", "0.5 ± 0", "-"],
                        ["c", "2", "0.08", "-", "-", "-"]]
    assert "| a | 2 | 0.2 |" in sweep.at_equal_time(found, {"a": 1, "b": 2, "c": 2})
    found["b"][0]["machine"] = "another, 2026-01-01"
    assert "on one machine" in sweep.at_equal_time(found, {})

@pytest.mark.slow
def test_a_sweep_and_what_is_expected(sweep, tmp_path, monkeypatch):
    """Real processes. Each run is train.py's, bit for bit; the table has means and deviations; the
    same command does nothing again; another one under the same names is refused. Of these runs a
    line of what is expected, inside of whose band another seed lies."""
    config = tiny_config(tmp_path, "UNetC", eval_every=1, n_epoch=3, eval={"images": 60},
                         dynamics_every=10, linear={"blockname": "out_1", "n_epoch": 2},
                         network={"n_channels": 8, "attn_channels_per_head": 8})
    out = tmp_path / "runs.jsonl"
    words = [sys.executable, str(ROOT / "benchmarks" / "sweep.py"), "--config", str(config),
             "--vary", "lrate=0.001,1e-5", "--seeds", "3", "--epochs", "1,3", "--samples", "20",
             "--probe", "200", "--jobs", "1", "--save_dir", str(tmp_path / "sweep"),
             "--out", str(out)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["seed"], line["Mimg"]) for line in lines] == [
        (seed, mimg) for seed in range(3) for _ in range(2) for mimg in (0.0014, 0.0042)]
    folder = tmp_path / "sweep" / f"{tmp_path.name}-config"
    succeed("train.py", "--config", config, "--set", "seed=1")
    succeed("train.py", "--config", config, "--set", "seed=3", "--set", f"save_dir={tmp_path}/3")
    ours, theirs = weights(tmp_path / "run", 2, "ema"), weights(folder / "1", 2, "ema")
    assert all((ours[name] == theirs[name]).all() for name in ours)
    losses = [row["heldout_loss"] for row in metrics(folder / "1", "heldout_loss")]
    assert [line["scores"]["heldout_loss"] for line in lines[4:6]] == pytest.approx(losses[::2])
    rows = [row.split(" | ") for row in done.stdout.splitlines() if f"| {tmp_path.name}/" in row]
    assert len(rows) >= 9 and {row[1] for row in rows[:8]} == {"3"}     # Two tables, and a third.
    mean = sum(line["scores"]["heldout_loss"] for line in lines[1::4]) / 3
    assert float(rows[2][3].split(" ± ")[0]) == pytest.approx(mean, rel=1e-3)
    again = succeed("sweep.py", *words[2:])         # In this process: it starts no others.
    assert again.splitlines()[1:] == done.stdout.splitlines()[-len(again.splitlines()) + 1:]
    assert len(out.read_text().splitlines()) == 12
    refused("sweep.py", *words[2:], "--set", "batch_size=70",
            words=["batch_size 140 there, 70 here"])

    import expected
    monkeypatch.setattr(expected, "PATH", tmp_path / "expected.jsonl")
    runs = [folder / str(seed) for seed in (0, 1, 2)]
    other, slow = tmp_path / "3", f"{folder}-lrate=1e-05"
    refused("expected.py", "--run", folder, words=["holds no run"])
    refused("expected.py", "--add", "tiny, C", "python", *runs[:2], f"{slow}/0",
            words=["differ in more than their seeds"])
    succeed("expected.py", "--add", "tiny, C", "python", *runs, "--draw", tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000
    assert "6 of 6 losses inside" in succeed("expected.py", "--run", other)
    refused("expected.py", "--run", f"{slow}/0", words=["tiny, C", "lrate (0.001 there, 1e-05"])
    refused("expected.py", "--run", "", words=["say the save_dir"])
    refused("expected.py", "--add", "tiny, C", "python", other, words=["two runs or more"])
    refused("expected.py", "--add", "tiny, C", "python", other, other, words=["there twice"])
    line = json.loads(expected.PATH.read_text())
    assert list(line["heldout_loss"]) == ["0.0014", "0.0028", "0.0042"]
    line["heldout_loss"]["0.0042"] = [[loss / 2 for loss in losses]
                                      for losses in line["heldout_loss"]["0.0042"]]
    expected.PATH.write_text(json.dumps(line) + "\n")
    done = run("expected.py", "--run", other)
    assert done.returncode == 1 and "4 of 6 losses inside" in done.stdout
    assert all(done.stdout.splitlines()[i].endswith("OUTSIDE") for i in (2, 5))

def test_a_band_holds_as_many_as_it_says(sweep):
    """Of runs with normal losses one of a hundred is outside, whatever the configs' own means."""
    import expected
    rng, outside = np.random.default_rng(0), 0
    for _ in range(4000):
        means = 0.5, 0.6, 0.8
        losses = [[mean * (1 + 0.01 * x) for x in rng.standard_normal(4)] for mean in means]
        lines = [{"name": str(i), "heldout_loss": {"0.1": [[loss] * 8 for loss in some[:3]]}}
                 for i, some in enumerate(losses)]
        mean, half = expected.bands(lines)["1"]["0.1"]
        outside += abs(losses[1][3] - mean) > half
    assert outside / 4000 == pytest.approx(expected.CHANCE, abs=0.006)
