"""What a GPU must do, in real commands. `make gpu` runs these tests; on a CPU (`make gpu
REHEARSE=1`) they take the same ways, but for those that need a GPU."""

import subprocess
import sys
import numpy as np
import pytest
import torch
from conftest import NETS, ROOT, distance, metrics, run, started, succeed, tiny_config, wait_until
from PIL import Image
import train
from edm2 import checkpoint, machine
from edm2.config import load_config

pytestmark = pytest.mark.cuda
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="there is no GPU")
needs_compiler = pytest.mark.skipif(not machine.has_compiler(DEVICE), reason="no compiler")
EAGER = "--no-compile"          # Where it is not the matter: compiling takes a minute.
# A CPU may emulate half precision, which takes ten times as long.
ON_GPU = DEVICE.type == "cuda"
HALF = ["--amp_dtype", "float16"] if ON_GPU else []

def losses(folder, *args, net_type="UNetG", steps=30):
    """The losses of a tiny network's first steps."""
    folder.mkdir()
    path = tiny_config(folder, net_type, batch_size=128 if ON_GPU else 16, log_every=1, n_epoch=4,
                       warm_epoch=0, network={"n_blocks": 1, "n_channels": 32 if ON_GPU else 16})
    out = succeed("train.py", "--config", path, "--max_steps", steps, *args)
    assert f"on {machine.device_name(DEVICE)}" in out
    return np.array([row["loss_unweighted"] for row in metrics(folder / "run")])

@pytest.mark.parametrize("net_type", NETS)
def test_mixed_precision_gives_the_losses_of_float32(tmp_path, net_type):
    whole = losses(tmp_path / "float32", EAGER, net_type=net_type)
    assert whole[-8:].mean() < 0.95 * whole[:8].mean()
    for name, limit in (("float16", 0.02), ("bfloat16", 0.05)):
        half = losses(tmp_path / name, EAGER, "--amp_dtype", name, net_type=net_type)
        assert len(half) == len(whole) and np.abs(half / whole - 1).mean() < limit, name

@needs_compiler
@pytest.mark.parametrize("dtype", [[], HALF] if ON_GPU else [[]])
def test_compiling_gives_the_same_losses(tmp_path, dtype):
    eager = losses(tmp_path / "eager", EAGER, *dtype, steps=10)
    compiled = losses(tmp_path / "compiled", "--compile", *dtype, steps=10)
    np.testing.assert_allclose(compiled, eager, rtol=2e-2 if ON_GPU else 2e-3)

def test_a_gradscaler_that_skips(tmp_path, monkeypatch):
    """Steps whose scaled gradients overflow leave the weights as they are and halve the scale."""
    class Large(train.Run):
        def __init__(self, *args):
            super().__init__(*args)
            self.scaler = torch.amp.GradScaler(self.device.type, 2.0 ** 40)

    path = tiny_config(tmp_path, batch_size=70, save_minutes=1e-9)
    states = []
    for step in (1, 2, 19):
        with monkeypatch.context() as patch:
            patch.setattr(train, "Run", Large)
            succeed("train.py", "--config", path, EAGER, "--amp_dtype", "float16",
                    "--max_steps", step)
        states.append(checkpoint.load(checkpoint.newest(load_config(path))))
    assert [state["scaler"]["scale"] for state in states[:2]] == [2.0 ** 39, 2.0 ** 38]
    assert distance(states[0]["network"], states[1]["network"]) == 0
    assert states[2]["step"] == 19 and states[2]["scaler"]["scale"] < 2.0 ** 36

def test_killed_and_gone_on(tmp_path):
    """A run that was killed ends where one in one go ends."""
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        path = tiny_config(tmp_path / name, "UNetE", save_minutes=1e-9, log_every=1, save_every=9)
        command = ["train.py", "--config", path, *HALF, EAGER]
        if name == "parts":
            with started(tmp_path, *command) as process:
                wait_until(lambda: len(metrics(tmp_path / "parts" / "run")) >= 12, 240)
                process.kill()
            assert "going on in" in succeed(*command)
        else:
            succeed(*command)
    whole, parts = (checkpoint.load(tmp_path / name / "run" / "ckpts" / "model_1.pth")
                    for name in ("whole", "parts"))
    limit = 0.02 if ON_GPU else 0        # On a GPU sums have no fixed order.
    assert whole["step"] == parts["step"] and distance(whole["ema"], parts["ema"]) <= limit

@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    """The config of a run of 6 epochs with post-hoc EMAs."""
    folder = tmp_path_factory.mktemp("snapshots")
    path = tiny_config(folder, "UNetG", n_epoch=6, posthoc_ema={"sigma_rels": [0.05, 0.1]},
                       linear={"blockname": "out_2", "n_epoch": 20, "lrate": 3e-3})
    succeed("train.py", "--config", path, *HALF, EAGER)
    return path

def images(folder, n=20):
    """sample.py's images, (n,8,8)."""
    return np.stack([np.asarray(Image.open(folder / "images" / f"{i:06d}.png")) for i in range(n)])

def test_sampling(snapshots, tmp_path, monkeypatch):
    """The same images whatever the batch, compiled or not, and whatever was sampled before."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    command, found = ["sample.py", "--config", snapshots, "--n_samples", 20], []
    ways = [[EAGER], [EAGER, "--batch_gpu", 7], *([["--compile"]] if ON_GPU else [])]
    for i, flags in enumerate(ways):
        succeed(*command, *flags, "--out", tmp_path / str(i))
        found.append(images(tmp_path / str(i)).astype(int))
    assert found[0].std() > 10
    for other in found[1:]:
        assert np.abs(other - found[0]).max() <= 2
    assert "float16" in succeed(*command, "--amp_dtype", "float16", EAGER, "--out", tmp_path / "4")
    assert np.abs(images(tmp_path / "4").astype(int) - found[0]).mean() < 3

def test_posthoc_snapshots(snapshots, tmp_path):
    flags = "--n_samples", 20, "--sigma_rel", 0.07, EAGER, "--out", tmp_path
    succeed("sample.py", "--config", snapshots, *flags)
    assert images(tmp_path).std() > 10

def test_probe_and_score(snapshots):
    out = succeed("probe.py", "--config", snapshots, *HALF, EAGER)
    assert float(out.split("probe accuracy ")[1].split(" %")[0]) > 30      # Chance is 10.
    succeed("sample.py", "--config", snapshots, "--n_samples", 100, EAGER)
    out = succeed("fid.py", "--config", snapshots, "--features", "pixels", "--n_samples", 100)
    assert "FD(pixels)" in out

@needs_gpu
def test_out_of_memory_is_one_line(tmp_path):
    code = ("import torch; torch.cuda.set_per_process_memory_fraction(0.02); import train; "
            "from edm2.errors import command; command(train.main)()")
    path = tiny_config(tmp_path, batch_size=1400, network={"n_channels": 512, "n_blocks": 4})
    done = subprocess.run([sys.executable, "-c", code, "--config", path, EAGER], cwd=ROOT,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert "out of memory; lower --batch_gpu" in done.stderr.splitlines()[-1]

@needs_gpu
def test_a_pass_that_does_not_fit_is_said_before(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda device: 1e8)
    done = run("train.py", "--config", tiny_config(tmp_path, batch_size=1400), "--dry_run",
               "--set", "network.n_channels=256")
    assert done.returncode == 0 and "not even passes of 1 would fit" in done.stderr

@needs_gpu
@pytest.mark.parametrize("net_type", NETS)
def test_what_is_counted_is_what_the_gpu_holds(tmp_path, net_type):
    """The memory of a pass, counted of fake tensors, against the allocator's peak."""
    from edm2 import diffusion
    config = load_config(ROOT / "config" / "cifar10" / f"{net_type[-1]}.yaml",
                         ["network.n_channels=64"])
    kept = diffusion.training_bytes(config, DEVICE, torch.float16)[0] * 7 / 8
    peaks = []
    for n in (32, 64):
        edm = diffusion.deploy(diffusion.build(config, torch.float16), DEVICE).train()
        y = torch.randn(n, 3, 32, 32, device=DEVICE)
        for _ in range(2):              # The first one tries cuDNN's algorithms.
            torch.cuda.reset_peak_memory_stats()
            edm(y, torch.randn(n, device=DEVICE), torch.randn_like(y))[0].sum().backward()
        peaks.append(torch.cuda.max_memory_allocated())
        del edm
    assert 0.8 < (peaks[1] - peaks[0]) / 32 / kept < 1.3
