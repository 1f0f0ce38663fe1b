"""What makes it fast changes nothing: each fast path against its plain path, and nothing in a step that waits.

Speed itself is measured in benchmarks/, never here.
"""

import copy
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import NETS, ROOT, distance, run, succeed, tiny_config
from ema_pytorch import EMA
from test_train import training
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import data
import edm
import runtime
import sample

DTYPES = {None: 1e-5, "bfloat16": 2e-2, "float16": 2e-2}


def plain_copy(t, dtype):
    """The network of a Training as the plain path has it: eager, NCHW, the same weights."""
    plain = edm.build(t.config, dtype and getattr(torch, dtype))
    plain.load_state_dict(copy.deepcopy(t.edm.state_dict()))
    return plain.train()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("net_type", NETS)
def test_a_step_is_the_plain_step(tmp_path, net_type, dtype):
    """Loss, gradients, weights and averages of train.py's step against a loop that knows no shortcuts."""
    t = training(tmp_path, net_type, dtype, batch_size=8, flip=True, warm_epoch=0)
    assert t.edm.net.stem.weight.is_contiguous(memory_format=torch.channels_last)
    plain = plain_copy(t, dtype)
    average = EMA(plain.net, beta=t.config["ema"], update_after_step=0, update_every=1)
    optimizer = torch.optim.Adam(plain.parameters(), lr=t.config["lrate"], foreach=False, fused=False)
    order = np.random.default_rng(1)
    gradients = dict.fromkeys(name for name, _ in plain.named_parameters())
    for step in range(3 if dtype is None else 1):
        index = torch.from_numpy(order.permutation(16)[:8])
        level, noise, flip = t.draw()
        scale = t.scaler.get_scale()
        handles = [p.register_hook(lambda grad, name=name, scale=scale: gradients.update({name: grad / scale}))
                   for name, p in t.edm.named_parameters()]
        losses = t.loss_sum.clone()
        t.training_step(index)
        for handle in handles:
            handle.remove()

        pixels = t.images.numpy()[index]
        pixels = np.stack([image[:, :, ::-1] if turn else image for image, turn in zip(pixels, flip, strict=True)])
        y = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1)
        loss, unweighted = plain(y, level, noise)
        optimizer.zero_grad()
        (loss.mean() * y[0].numel()).backward()
        if step == 0:                   # Later ones start from weights that differ by rounding.
            both = torch.stack([loss.sum(), unweighted.sum()])
            torch.testing.assert_close(t.loss_sum - losses, both, rtol=DTYPES[dtype], atol=DTYPES[dtype])
            assert distance({name: p.grad for name, p in plain.named_parameters()}, gradients) < DTYPES[dtype]
        optimizer.step()
        average.update()
    if dtype is None:
        assert distance(plain.net.state_dict(), t.state()["network"]) < 1e-4
        assert distance(average.ema_model.state_dict(), t.state()["ema"]) < 1e-4


class Waits(TorchDispatchMode):
    """Notes the operations for which the host would wait for a GPU: numbers fetched, sizes that depend on values."""
    SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(word in str(function) for word in self.SYNCS) or (
                "index.Tensor" in str(function) and any(i is not None and i.dtype == torch.bool for i in args[1])):
            self.found.append(str(function))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("net_type", NETS)
def test_nothing_but_the_ema_of_a_grad_scaler_waits_between_figures(tmp_path, monkeypatch, net_type, dtype):
    """Seen on the CPU, where numbers fetched can be told. ema-pytorch's counters are on the CPU; the one number that a
    GradScaler makes the host wait for is settle_ema's."""
    t = training(tmp_path, net_type, dtype, batch_size=8)
    t.batch_gpu = 4
    for _ in range(2):
        t.training_step(torch.arange(8))
    assert t.ema.step.device.type == t.ema.initted.device.type == "cpu"
    monkeypatch.setattr(t, "settle_ema", lambda: None)
    monkeypatch.setattr(t.ema, "update", lambda: None)
    with Waits() as waits:
        t.training_step(torch.arange(8))
    assert waits.found == []
    with Waits() as waits:                          # It would see one.
        torch.ones(1).item()
    assert waits.found == ["aten._local_scalar_dense.default"]


@pytest.mark.parametrize("net_type", NETS)
def test_when_the_ema_is_settled_changes_nothing(tmp_path, net_type):
    """Under a GradScaler an update is put off until the next step, or until somebody looks."""
    quiet, watched = (training(tmp_path, net_type, "float16", batch_size=8) for _ in range(2))
    while quiet.ema.step.item() < 3:
        for t in (quiet, watched):
            t.training_step(torch.arange(8))
        state = watched.state()
        assert watched.taken is None and watched.state()["ema_step"] == state["ema_step"]       # Not twice.
    assert quiet.taken is not None
    assert quiet.ema.step.item() == state["ema_step"] - 1
    for key in ("network", "ema"):
        assert distance(quiet.state()[key], state[key]) == 0
    assert quiet.ema.step.item() == state["ema_step"]


@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize("net_type", NETS)
def test_compiled_network_and_loss_are_one_graph(tmp_path, net_type, dtype):
    """No graph break, and nothing is compiled again after the first step."""
    t = training(tmp_path, net_type, dtype, batch_size=8, network={"dropout": 0.1})
    torch.compiler.reset()
    counters.clear()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    t.edm.compile(backend=backend)
    for _ in range(4):
        t.training_step(torch.arange(8))
    assert len(graphs) == 1 and not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1
    with torch.no_grad():                           # Sampling: one more, of the averaged network.
        t.settle_ema()
        t.ema.ema_model.compile(backend=backend)
        for _ in range(2):
            edm.generate(t.edm_ema, range(4), (1, 8, 8), "cpu", n_steps=3)
    assert len(graphs) == 2 and not counters["graph_break"]
    torch.compiler.reset()


@pytest.mark.parametrize("net_type", NETS)
def test_samples_are_the_plain_samples(tmp_path, net_type):
    """channels_last, batches and threads against one image after the other in NCHW: one grey level at most."""
    t = training(tmp_path, net_type, batch_size=8)
    for _ in range(3):
        t.training_step(torch.arange(8))
    plain = plain_copy(t, None).eval().requires_grad_(False)
    fast = copy.deepcopy(t.edm).eval().requires_grad_(False)
    sample.data.save_png, saved = (lambda image, path: pictures.update({int(path.stem): image.clone()})), data.save_png
    pictures = {}
    args = type("Arguments", (), {"n_samples": 10, "seed": 3, "steps": 18, "eta": 0.3, "clip_denoised": False})
    try:
        sample.write_images(fast, set(range(10)), 4, tmp_path, t.config, args, t.rt)
    finally:
        sample.data.save_png = saved
    assert sorted(pictures) == list(range(10))
    for i in range(10):
        expected = edm.generate(plain, [i], (1, 8, 8), "cpu", 3, 18, 0.3)[0]
        assert (expected.int() - pictures[i].int()).abs().max() <= 1


@pytest.mark.parametrize(("fits", "n", "noted", "flag", "size", "tried"), [
    (2000, 50_000, {}, None, 1024, [1024]),
    (300, 50_000, {}, None, 256, [1024, 512, 256]),
    (300, 50_000, {"batch_cuda": 256, "batch_cpu": 64}, None, 256, [256]),      # As before, in a folder that is begun.
    (300, 50_000, {"batch_cpu": 64}, None, 256, [1024, 512, 256]),
    (300, 100, {}, None, 1024, [100]),                                          # Few images are one batch.
    (300, 50_000, {"batch_cuda": 256}, 700, 700, []),                           # What the user says.
])
def test_the_batch_of_sampling_is_what_fits(monkeypatch, fits, n, noted, flag, size, tried):
    """On a device that passes for a GPU with room for `fits` images."""
    found = []

    def generate(denoiser, indices, shape, device, n_steps):
        found.append(len(indices))
        if len(indices) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(1)

    monkeypatch.setattr(edm, "generate", generate)
    rt = runtime.Runtime(0, 1, 0, 1, type("Device", (), {"type": "cuda"}))
    monkeypatch.setattr(rt, "all", lambda value: value)
    args, settings = type("Arguments", (), {"n_samples": n, "batch_gpu": flag}), dict(noted)
    assert sample.choose_batch(None, settings, {"network": {"image_shape": [3, 32, 32]}}, args, rt) == size
    assert found == tried
    assert settings == (noted if flag else noted | {"batch_cuda": size})


@pytest.mark.parametrize(("name", "tflops"), [
    ("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835),
    ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA of next year", None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA RTX A4000", None)])
def test_the_peak_that_mfu_is_a_share_of(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert runtime.peak_flops(torch.device("cuda")) == (tflops and tflops * 1e12)
    assert runtime.peak_flops(torch.device("cpu")) is None


def test_dry_run_imports_only_what_it_needs(tmp_path):
    """What is slow to import comes when it is used: nothing of torch.compile, torchvision, scipy or scikit-learn."""
    code = ("import sys, runtime, train\nsys.argv = ['train.py', '--config', sys.argv[1], '--dry_run']\ntrain.main()\n"
            "print(sorted({'torch._dynamo', 'torchvision', 'scipy', 'sklearn', 'ema_pytorch', 'matplotlib'} "
            "& set(sys.modules)), file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code, tiny_config(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.strip() == "[]", done.stderr
    assert "parameters" in run("train.py", "--config", tiny_config(tmp_path), "--dry_run").stdout


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's memory alone")
def test_freed_memory_is_not_given_back(tmp_path):
    """By runtime.start() on the CPU: tensors made again cost less than half as many page faults as without."""
    script = tmp_path / "faults.py"
    script.write_text(f"""
import sys; sys.path[:0] = [{str(ROOT)!r}]
import resource, torch, runtime
if sys.argv[1] == "without":
    runtime.keep_freed_memory = lambda: None
runtime.start()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    before = faults()
    tensors = [torch.ones(4 << 20) for _ in range(16)]
    del tensors
print(faults() - before)
""")
    without, kept = (int(succeed(script, how)) for how in ("without", "with"))
    assert 2 * kept < without and without > 10_000
