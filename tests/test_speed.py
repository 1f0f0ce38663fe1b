"""What makes it fast changes nothing: each fast path against its plain path; no step waits. Speed
itself is measured in benchmarks/, never here."""

import copy
import subprocess
import sys
import pytest
import torch
from conftest import NETS, ROOT, distance, tiny_config
from ema_pytorch import EMA
from steps import IMAGES, LABELS, train_steps
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from edm2 import data, diffusion, machine

DTYPES = {None: 1e-5, "bfloat16": 2e-2, "float16": 2e-2}

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("net_type", NETS)
def test_a_step_is_the_plain_step(tmp_path, net_type, dtype):
    """Loss, gradients, weights and averages of train.py against a loop that knows no shortcuts:
    eager, NCHW, in one pass."""
    n, seen, tolerance = 1 if dtype else 3, [], DTYPES[dtype]

    def begin(run):
        assert run.denoiser.net.stem.weight.is_contiguous(memory_format=torch.channels_last)
        seen.append(copy.deepcopy(run.denoiser.state_dict()))
        run.optimizer.register_step_pre_hook(lambda *_: seen.extend([run.loss_sum.clone(), {
            name: p.grad.clone() for name, p in run.denoiser.named_parameters()}]))

    done = train_steps(tmp_path, net_type, dtype, n, begin, flip=True, warm_epoch=0, lrate=0.01)
    plain = diffusion.build(done.config, dtype and getattr(torch, dtype)).train()
    plain.load_state_dict(seen[0])
    average = EMA(plain.net, beta=done.config.ema, update_after_step=0, update_every=1)
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.01, foreach=False, fused=False)
    for step in range(n):
        passes = data.draw(done.config, step, IMAGES[:8 * n], LABELS[:8 * n], done.batch_gpu)
        y, level, noise = (torch.cat(parts) for parts in list(zip(*passes, strict=True))[:3])
        loss, unweighted = plain(y, level, noise)
        optimizer.zero_grad()
        (loss.mean() * y[0].numel()).backward()
        if step == 0:               # Later ones start from weights that differ by rounding.
            both = torch.stack([loss.sum(), unweighted.sum()])
            torch.testing.assert_close(seen[1], both, rtol=tolerance, atol=tolerance)
            own = {name: p.grad for name, p in plain.named_parameters()}
            assert distance(own, seen[2]) < tolerance
        optimizer.step()
        average.update()
    if dtype is None:
        assert distance(plain.net.state_dict(), done.denoiser.net.state_dict()) < 1e-4
        assert distance(average.ema_model.state_dict(), done.averages.state()["ema"]) < 1e-4

class Waits(TorchDispatchMode):
    """Notes what makes the host wait for a GPU: numbers fetched, sizes that depend on values."""
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = "_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.", "is_nonzero"
        if any(word in str(function) for word in waits) or ("index.Tensor" in str(function) and any(
                i is not None and i.dtype == torch.bool for i in args[1])):
            self.found.append(str(function))
        return function(*args, **kwargs or {})

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("net_type", NETS)
def test_nothing_waits_between_figures(tmp_path, net_type, dtype):
    """Seen on the CPU, where numbers fetched can be told, from the end of step 2 to that of step 3,
    with labels and augmentation. ema_pytorch's counters are on the CPU."""
    waits = Waits()

    def after(run):
        if run.step == 2:
            ema, run.averages.update = run.averages.ema, lambda: None
            assert ema.step.device.type == ema.initted.device.type == "cpu"
            waits.__enter__()
        elif run.step == 3:
            waits.__exit__(None, None, None)

    train_steps(tmp_path, net_type, dtype, 4, after=after, augment=0.5, network={"label_dim": 10})
    assert waits.found == []
    with waits:                                     # It would see one.
        torch.ones(1).item()
    assert waits.found == ["aten._local_scalar_dense.default"]

@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize("net_type", NETS)
def test_compiling_and_recording_change_nothing(tmp_path, net_type, dtype):
    """Weights and averages are bitwise the same, dropout included. Network and loss are compiled to
    one graph, once, without a break, whether or not a step is recorded, with labels and
    augmentation too."""
    graphs, states, more = [], [], {"augment": 0.3} if dtype else {}

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    counters.clear()
    for every, begin in ((0, id), (2, id), (2, lambda run: run.denoiser.compile(backend=backend))):
        run = train_steps(tmp_path, net_type, dtype, 4, begin, dynamics_every=every,
                          network={"dropout": 0.3, "label_dim": 10 if dtype else 0}, **more)
        averaged = run.averages.denoiser
        states.append(run.denoiser.state_dict() | averaged.state_dict(prefix="ema."))
    for other in states[1:]:
        assert all(torch.equal(value, other[name]) for name, value in states[0].items())
    assert len(graphs) == 1 == counters["stats"]["unique_graphs"] and not counters["graph_break"]
    averaged.net.compile(backend=backend)           # Sampling: one more.
    for _ in range(2):
        diffusion.generate(averaged, range(4), 0, diffusion.Sampling(3))
    assert len(graphs) == 2 and not counters["graph_break"]
    torch.compiler.reset()

@pytest.mark.parametrize(("name", "tflops"), [
    ("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756),
    ("NVIDIA H100 NVL", 835), ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA GeForce RTX 4090", 165),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA RTX A4000", None), ("Tesla T4", 65),
    ("Tesla V100-SXM2-16GB", 125), ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA L4", None),
    ("NVIDIA of next year", None)])
def test_the_peak_that_mfu_is_a_share_of(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert machine.peak_flops(torch.device("cuda")) == (tflops and tflops * 1e12)
    assert machine.peak_flops(torch.device("cpu")) is None

def test_dry_run_imports_only_what_it_needs(tmp_path):
    """What is slow to import comes when it is used."""
    code = ("import sys, train; sys.argv[1:] += ['--dry_run']; train.main(); print(sorted("
            "{'torchvision', 'scipy', 'sklearn', 'ema_pytorch', 'matplotlib'} "
            "& set(sys.modules)), file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code, "--config", tiny_config(tmp_path)],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.strip() == "[]", done.stderr
    assert "parameters" in done.stdout
