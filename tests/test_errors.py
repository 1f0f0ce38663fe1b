"""What a user can get wrong: one line on stderr that names it, exit code 2, nothing written."""

import subprocess
import sys
import pytest
import torch
from conftest import ROOT, run, tiny_config
from edm2 import checkpoint
from edm2.config import load_config
from edm2.errors import UserError

def one_line(done, script, words):
    """A command was refused in one line (argparse puts its usage before) with all of `words`."""
    lines = done.stderr.strip().splitlines()
    lines = lines[-1:] if lines[0].startswith("usage: ") else lines
    assert done.returncode == 2 and len(lines) == 1 and len(lines[0]) < 1000, done.stderr
    assert lines[0].startswith(script)
    for word in words.split(" … "):
        assert word in lines[0], lines[0]

def written(folder):
    """The files of a folder, but for locks."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(".lock"))

@pytest.mark.parametrize(("line", "words"), [       # NEW: --config of a new run; RUN: of `trained`.
    *((line.replace("CMD", name), words) for name in ("train.py", "sample.py", "fid.py", "probe.py")
      for line, words in [
        ("CMD", "--config"), ("CMD --config no.yaml", "no.yaml: No such file"),
        ("CMD --config .", "config .: Is a directory"), ("CMD NEW --no_flag", "--no_flag"),
        ("CMD NEW --set colour=1", "config.yaml: unknown key colour; the keys are"),
        ("CMD NEW --set warm_epochs=1", "key warm_epochs; did you mean warm_epoch?"),
        ("CMD NEW --set lrate=quick", "lrate must be a valid number, not 'quick'"),
        ("CMD NEW --set lrate=2024-13-45", "--set lrate: not valid YAML"),
        ("CMD NEW --batch_gpu 0", "--batch_gpu: must be … equal to 1, not '0'")]),
    *((line.replace("CMD", script), words) for script in ("sample.py", "fid.py", "probe.py")
      for line, words in [
        ("CMD NEW", "no checkpoints in … run/ckpts: train first"),
        ("CMD RUN --epoch 9", "epoch 9 … run/ckpts … 0, 1, 2, 3"), ("CMD RUN --epoch x", "'x'"),
        ("CMD RUN --sigma_rel 0.9", "--sigma_rel: must be … equal to 0.28, not '0.9'")]),
    *((line.replace("CMD", script), words) for script in ("sample.py", "probe.py")
      for line, words in [
        ("CMD RUN --sigma_rel 0.1", "/run … without posthoc_ema.sigma_rels"),
        ("CMD RUN --set network.n_blocks=2", "/run … network.n_blocks 1 there, 2 here")]),
    *((f"train.py NEW --set {change}", words) for change, words in [
        ("load_epoch=7", "no checkpoints in … run/ckpts"), ("batch_size=5000", "5000 … 1437"),
        ("save_dir=" + 300 * "x", "xx … too long"), ("save_dir=/dev/null/a", "/dev/null/a … Not a"),
        ("save_dir=/proc/self/run", "/proc/self/run … No such file"),
        ("network.n_channels=200", "network: 200 channels … group norm"),
        ("eval_every=1 --set eval.probe=true --set linear.blockname=out_7", "out_7: … out_1"),
        ("dataset=folder --set data_root=/nowhere", "data_root /nowhere"),
        ("dataset=folder --set data_root=pets", "dogs/2.png is not a whole image"),
        ("dataset=cifar --set network.image_shape=[3,32,32] --set data_root=.",
         "cifar-10-batches-py/data_batch_1 is missing, damaged … remove … to download it again")]),
    ("train.py RUN --set load_epoch=7", "epoch 7 … run/ckpts … 0, 1, 2, 3"),
    ("train.py RUN --set lrate=1e-5", "/run … lrate 0.01 there, 1e-05 here … save_dir"),
    ("train.py RUN --fresh", "--fresh: … /run … choose another save_dir"),
    ("sample.py RUN --eta 2", "--eta … 1, not '2'"), ("sample.py RUN --n_samples -1", "'-1'"),
    ("sample.py RUN --n_samples 2 --out pets/dogs/2.png", "pets/dogs/2.png … File exists"),
    ("fid.py RUN", "no images of epoch 3 in … samples/3 … python sample.py --config … --epoch 3"),
    ("fid.py RUN --images pets", "pets, no settings.json: make"), ("fid.py A", "A B"),
    ("fid.py RUN --features pixels --weights x", "features pixels"), ("fid.py RUN A B", "A B"),
    ("fid.py A B --epoch 1", "--config"), ("fid.py A B --metrics fd", "--metrics … 'fd'"),
    ("fid.py no.npz pets", "no.npz"), ("fid.py run . --features pixels", "No such file"),
    ("probe.py RUN --timesteps 19", "18, not '19'"), ("probe.py RUN --timesteps 5-3", "'5-3' is"),
    ("probe.py RUN --blocks out_7", "out_7: … out_1"), ("probe.py RUN --set classes=7", "7 … 10"),
    ("results.py pets", "no results.jsonl in or below pets"), ("results.py --figure FID", "--ema"),
    ("results.py --ema pets", "pets/results.jsonl"), ("results.py --dynamics pets", "s/dynamics."),
])
def test_mistakes(tmp_path, trained, line, words):
    for name in ("pets/dogs/2.png", "cifar-10-batches-py/x"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n broken")
    new = tiny_config(tmp_path, linear={"blockname": "out_2"})
    line = line.replace("NEW", f"--config {new}").replace("RUN", f"--config {trained}/config.yaml")
    script, *args = line.split()
    before = written(tmp_path), written(trained)
    one_line(run(script, *args, cwd=tmp_path), script, words)
    assert (written(tmp_path), written(trained)) == before

@pytest.mark.parametrize(("line", "code"), [
    *((f"{name}.py --config no.yaml", 2) for name in ("train", "sample", "fid", "probe")),
    ("-m edm2.results no.yaml", 2), ("train.py --config config/digits/G.yaml --dry_run", 0)])
def test_a_real_process(line, code):
    done = subprocess.run([sys.executable, *line.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and ("parameters" in done.stdout) == (code == 0)
    if code:
        one_line(done, "results.py" if "-m" in line else line.split()[0], "error: … no.yaml")
    else:
        assert done.stderr == ""

def test_a_batch_that_the_processes_cannot_share(tmp_path):
    path = tiny_config(tmp_path, batch_size=33)
    done = run("train.py", "--config", path, processes=2)       # torchrun adds its own report.
    lines = [line for line in done.stderr.splitlines() if line.startswith("train.py (process")]
    assert lines and all("batch_size 33" in line and "2 processes" in line for line in lines)
    assert done.returncode == 1 and "exitcode  : 2" in done.stderr
    assert 'train.py", line' not in done.stderr and written(tmp_path) == [path]

@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "x"}])
def test_a_stray_environment(tmp_path, monkeypatch, environment):
    dry_run = ["train.py", "--config", tiny_config(tmp_path), "--dry_run"]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    one_line(run(*dry_run), "train.py", "WORLD_SIZE … torchrun … unset")
    monkeypatch.setenv("WORLD_SIZE", "1")                       # One process is one process.
    assert run(*dry_run).returncode == 0

@pytest.mark.parametrize(("content", "words"), [
    (b"", "is damaged"), (b"PK" + bytes(1000), "is damaged"), (b"text", "is damaged"),
    ({"step": 1, "network": 1}, "is not a checkpoint"), ([1], "is not a checkpoint"),
    (object, "is refused")])                                    # Its unpickler would run code.
def test_damaged_checkpoints_are_named(tmp_path, content, words):
    path = checkpoint.path_of(load_config(tiny_config(tmp_path)), 3)
    path.parent.mkdir(parents=True)
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError, match=rf"model_3\.pth {words}"):
        checkpoint.load(path)
