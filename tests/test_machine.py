"""What a machine can do: errors that come early, precision, compiler, memory, other systems."""

import subprocess
import sys
from types import SimpleNamespace
import pytest
import torch
from conftest import NETS, ROOT, refused, run, succeed, tiny_config
from edm2 import diffusion, distributed, flags, machine
from edm2.config import load_config
from edm2.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)

def dry(folder, *args):
    """The arguments of a dry run."""
    return "train.py", "--config", tiny_config(folder), "--dry_run", *args

# Errors that come early.

@pytest.mark.parametrize("script", ["train.py", "sample.py", "fid.py", "probe.py"])
def test_slurm_without_torchrun(trained, monkeypatch, script):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    refused(script, "--config", trained / "config.yaml", words=["SLURM_NTASKS is 4", "torchrun"])

def test_slurm_with_torchrun_or_one_task(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "1")
    succeed(*dry(tmp_path))
    monkeypatch.setenv("SLURM_NTASKS", "2")
    out = succeed(*dry(tmp_path), processes=2)
    assert "2 processes" in out

def nvidia_smi(folder, monkeypatch, lines):
    """Put an nvidia-smi that prints these lines on the path."""
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\nprintf '{lines}'\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

@pytest.mark.skipif(torch.cuda.is_available(), reason="its driver is usable")
def test_a_driver_that_pytorch_cannot_use(tmp_path, monkeypatch):
    nvidia_smi(tmp_path, monkeypatch, r"535.183.01\n535.183.01\n")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    refused(*dry(tmp_path), words=["driver 535.183.01", "CUDA 13.0", "whl/cu126", "="])
    monkeypatch.setattr(torch.version, "cuda", None)
    refused(*dry(tmp_path), words=["driver 535.183.01", "PyTorch", "pip install"])
    for hidden in ("", "-1"):                       # The CPU is meant.
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert "on CPU" in succeed(*dry(tmp_path))

@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_driver_without_a_gpu_is_none(tmp_path, monkeypatch):
    """A login node: the tool is there, a GPU is not."""
    nvidia_smi(tmp_path, monkeypatch, "")
    assert "on CPU" in succeed(*dry(tmp_path))

@pytest.mark.parametrize(("capability", "arch_list", "known"), [
    ((7, 0), "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120", False),
    ((12, 1), "sm_75 sm_80 sm_120", True), ((8, 9), "sm_80 sm_90a", True),
    ((8, 0), "sm_75 sm_86 sm_90", False), ((13, 0), "sm_90 compute_120", True),
    ((10, 0), "sm_90 sm_120 compute_120", False), ((9, 0), "gfx90a", True)])
def test_a_capability_that_the_wheel_was_not_built_for(monkeypatch, capability, arch_list, known):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", arch_list.split)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    if known:
        return machine.check_capability(GPU)
    with pytest.raises(UserError) as error:
        machine.check_capability(GPU)
    for word in ("Tesla V100", "{}.{}".format(*capability), f"for {arch_list}:", "whl/cu126"):
        assert word in str(error.value)

def test_every_gpu_is_checked_at_the_start(monkeypatch):
    """Before anything else is done with it."""
    def refuse(gpu):
        raise UserError(f"checked {gpu}")

    for name, value in {"is_available": True, "device_count": 1, "set_device": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    monkeypatch.setattr(machine, "check_capability", refuse)
    with pytest.raises(UserError, match="checked cuda:0"):
        distributed.init()

# Precision and compiler.

def resolved(device, capsys, use_amp=False, amp_dtype=None, compile=None):
    """What flags.resolve makes of these flags on a device: (dtype, compile, what is said)."""
    args = SimpleNamespace(use_amp=use_amp, amp_dtype=amp_dtype, compile=compile)
    flags.resolve(args, device)
    return args.amp_dtype, args.compile, capsys.readouterr().err

@pytest.fixture
def able(monkeypatch):
    """A function that gives the machine compilers, or none, and bfloat16, or none."""
    def make(compilers=True, bfloat16=True):
        monkeypatch.setattr(machine.shutil, "which", lambda name: name if compilers else None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
        monkeypatch.setattr(torch.cuda, "get_device_capability",
                            lambda device: (8, 0) if bfloat16 else (7, 5))
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bfloat16)
    return make

def test_what_use_amp_means(able, capsys):
    able()
    assert resolved(GPU, capsys) == (None, True, "") and resolved(CPU, capsys) == (None, False, "")
    assert resolved(GPU, capsys, use_amp=True) == (torch.float16, True, "")
    assert resolved(CPU, capsys, use_amp=True) == (torch.bfloat16, False, "")
    for device in (GPU, CPU):
        for name in ("float16", "bfloat16"):
            assert resolved(device, capsys, True, name, False) == (getattr(torch, name), False, "")

def test_emulated_bfloat16_is_said(able, capsys):
    able(bfloat16=False)
    dtype, _, said = resolved(GPU, capsys, amp_dtype="bfloat16")
    assert dtype == torch.bfloat16 and said.count("\n") == 1
    assert "Tesla T4 only emulates bfloat16" in said and "float16 there" in said
    dtype, _, said = resolved(CPU, capsys, use_amp=True)
    assert dtype == torch.bfloat16 and "CPU" in said and "float32, without --use_amp" in said
    assert resolved(GPU, capsys, use_amp=True)[2] == ""

def test_without_a_compiler_it_goes_on_without_compiling(able, capsys):
    able(compilers=False)
    for device, asked, language in ((GPU, None, "C"), (GPU, True, "C"), (CPU, True, "C++")):
        _, compiled, said = resolved(device, capsys, compile=asked)
        assert not compiled and f"without torch.compile, slower: no {language} compiler" in said
        assert said.count("\n") == 1
    assert resolved(CPU, capsys)[1:] == resolved(GPU, capsys, compile=False)[1:] == (False, "")

def test_no_compiler_in_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/no/c++")
    done = run("train.py", "--config", tiny_config(tmp_path), "--compile", "--max_steps", 1)
    assert done.returncode == 0 and "without torch.compile, slower: no C++ compiler" in done.stderr

def test_the_precision_is_said(trained, tmp_path):
    config = trained / "config.yaml"
    assert "; bfloat16 mixed precision" in succeed(*dry(tmp_path, "--use_amp"))
    assert "; float32" in succeed("sample.py", "--config", config, "--n_samples", 1,
                                  "--out", tmp_path / "samples")

# Memory.

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["C", "E", "G", "G_cond"])
def test_half_precision_as_cuda_autocasts_it(monkeypatch, name, dtype):
    """CUDA's autocast makes other operations float32 than the CPU's: nearest upsampling, among
    others. Forward passes of fake tensors on a GPU that need not be there, which keep no more."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args: True)
    config = load_config(ROOT / "config" / "cifar10" / f"{name}.yaml",
                         ["network.is_attn=[false,false,false,false]", "augment=0.1"])
    kept, there = (diffusion.training_bytes(config, device, dtype)[0] for device in (CPU, GPU))
    assert there == pytest.approx(kept, rel=0.1)

@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("net_type", NETS)
def test_what_is_counted_is_what_autograd_keeps(tmp_path, net_type, dtype):
    """Against a step of real tensors, of 5 images."""
    config = load_config(tiny_config(tmp_path, net_type, augment=0.5, network={"dropout": 0.1}))
    kept, besides = (n * 7 / 8 for n in diffusion.training_bytes(config, CPU, dtype))
    edm, found = diffusion.build(config, dtype).to(memory_format=torch.channels_last), {}

    def keep(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    y = torch.randn(5, 1, 8, 8).to(memory_format=torch.channels_last)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = edm(y, torch.randn(5), torch.randn_like(y), augment=torch.randn(5, 9))
    weights = {p.data_ptr() for p in edm.parameters()}
    real = sum(n for pointer, n in found.items() if pointer not in weights)
    assert loss.isfinite().all() and kept > 1000
    copies = 5 * 4 * sum(p.numel() for p in edm.parameters())     # Gradients, moments, EMA.
    assert besides + 5 * kept - copies == pytest.approx(real, rel=0.02)

def test_passes_that_do_not_fit(tmp_path, monkeypatch, capsys):
    config = load_config(ROOT / "config" / "cifar10" / "C.yaml")
    args, count = SimpleNamespace(amp_dtype=torch.float16, batch_gpu=None), diffusion.training_bytes
    monkeypatch.setattr(diffusion, "training_bytes",
                        lambda config, device, dtype: count(config, CPU, dtype))
    for gigabytes, most in ((1, 0), (8, 128), (12, 256), (24, 512)):
        monkeypatch.setattr(machine, "memory", lambda device, n=gigabytes: n * 1e9)
        diffusion.describe_memory(config, GPU, args)
        out, err = capsys.readouterr()
        assert f"in {gigabytes}.0 GB {most or 'none'} of the 512 fit" in out
        assert ("would fit" in err) == (most < 512)
        assert (f"--batch_gpu {most} would" if most else "not even passes of 1 would") in err + (
            "--batch_gpu 512 would")
    args.batch_gpu = 64
    monkeypatch.setattr(machine, "memory", lambda device: 24e9)
    diffusion.describe_memory(config, GPU, args)
    out, err = capsys.readouterr()
    assert "passes of 64 images need about" in out and err == ""

# Other systems.

WITHOUT = """
import importlib, os, pathlib, signal, sys
sys.modules["fcntl"] = None
for module, name in ((os, "sched_getaffinity"), (os, "sysconf"), (signal, "SIGHUP"),
                     (signal, "SIGUSR1")):
    delattr(module, name)
root = pathlib.Path.cwd()
names = sorted(p.stem for p in root.glob("*.py"))
names += sorted(f"edm2.{p.stem}" for p in (root / "edm2").glob("*.py"))
modules = {name: importlib.import_module(name) for name in names}
from edm2.errors import command
for words in sys.argv[1].split(";"):
    sys.argv = words.split()
    try:
        command(modules[sys.argv[0].removesuffix(".py")].main)()
    except SystemExit as e:
        assert e.code == 0, words
print(len(modules), "modules")
"""

def test_without_what_is_linux_s_alone(tmp_path):
    """All modules are imported, and the digits trained, sampled, scored and probed."""
    run = f"--config {tiny_config(tmp_path, linear={'blockname': 'out_2', 'n_epoch': 1})}"
    words = [f"train.py {run} --dry_run", f"train.py {run}", f"sample.py {run} --n_samples 100",
             f"fid.py {run} --features pixels --n_samples 100", f"probe.py {run} --passes 1"]
    done = subprocess.run([sys.executable, "-c", WITHOUT, ";".join(words)], cwd=ROOT,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    n = len([*ROOT.glob("*.py"), *(ROOT / "edm2").glob("*.py")])
    assert f"{n} modules" in done.stdout and "FD(pixels)" in done.stdout
    assert "probe accuracy" in done.stdout and "done: what the run left" in done.stdout
