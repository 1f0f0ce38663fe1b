"""What this machine can do: its GPU, driver and compiler, and how many images fit its memory."""

import contextlib
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
import torch
from edm2.errors import UserError

# Dense TFLOP/s in float16 with sums in float32, by NVIDIA; the first one in a GPU's name counts.
PEAKS = {"B200": 2250, "H200 NVL": 835, "H100 NVL": 835, "H200": 989, "H100 PCIe": 756, "H100": 989,
         "A100": 312, "L40S": 362, "A40": 150, "V100": 125, "T4": 65,
         "RTX 4090(?! Laptop| D)": 165, "RTX 3090(?! Laptop)": 71}
# These wheels serve drivers from 525 and GPUs from compute capability 5.0.
OLDER = ("pip install --force-reinstall torch torchvision --index-url https://download.pytorch.org"
         "/whl/cu126; with CUDA_VISIBLE_DEVICES=-1 it takes the CPU")

def device_name(device):
    """The name of a device, as it stands beside a result."""
    gpu, n = device.type == "cuda", torch.get_num_threads()
    return torch.cuda.get_device_name(device) if gpu else f"CPU ({n} threads)"

def peak_flops(device):
    """The FLOP/s of a device in mixed precision, of which MFU is a share; None: not known."""
    name = device_name(device)
    return next((1e12 * n for gpu, n in PEAKS.items() if re.search(rf"\b{gpu}\b", name)), None)

def cores():
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

def check_launch():
    """Raise UserError where Slurm started several processes, and torchrun none of them."""
    if (n := os.environ.get("SLURM_NTASKS", "1")) != "1" and "WORLD_SIZE" not in os.environ:
        raise UserError(f"SLURM_NTASKS is {n}, but this is not torchrun: srun starts {n} runs; say "
                        f"srun -n1 torchrun --nproc_per_node={n} ..., or, for one, SLURM_NTASKS=1")

def check_driver():
    """Raise UserError for an NVIDIA GPU that PyTorch cannot use: no one wants the CPU instead, but
    where CUDA_VISIBLE_DEVICES, or a job without GPUs, hides it."""
    try:
        return torch.cuda.init()
    except Exception as e:      # Whatever its version raises.
        reason = re.split(r"\. |\n", str(e))[0]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or "No CUDA GPUs" in reason
    if driver := not hidden and driver_version():
        needs = f"CUDA {torch.version.cuda} needs driver 580 (CUDA 12: 525): update the driver, or "
        raise UserError(f"PyTorch cannot use the NVIDIA GPU with driver {driver} ({reason}): "
                        f"{needs if torch.version.cuda else ''}{OLDER}")

def driver_version():
    """The version of the NVIDIA driver where there is a GPU, None where there is none."""
    with contextlib.suppress(OSError):          # Linux; nvidia-smi is silent after a bad update.
        found = re.search(r"\s(\d+\.[\d.]+)\s", Path("/proc/driver/nvidia/version").read_text())
        if found and Path("/dev/nvidia0").exists():
            return found[1]
    with contextlib.suppress(OSError, subprocess.SubprocessError):      # WSL2, Windows.
        done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                              capture_output=True, text=True, timeout=20, check=True)
        return next(iter(done.stdout.split()), None)

def check_capability(gpu):
    """Raise UserError for a GPU that this build of PyTorch has no code for."""
    capability, built = torch.cuda.get_device_capability(gpu), " ".join(torch.cuda.get_arch_list())
    known = [(kind, (int(n[:-1]), int(n[-1]))) for kind, n in
             re.findall(r"(sm|compute)_(\d+)", built)]
    if known and not any(has <= capability and (kind == "compute" or has[0] == capability[0])
                         for kind, has in known):
        raise UserError("{} has compute capability {}.{}, this PyTorch is built for {}: {}"
                        .format(device_name(gpu), *capability, built, OLDER))

def has_bfloat16(device):
    """Whether a device computes in bfloat16 itself; where it is emulated, float32 is faster."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512") or (
        torch.cpu._is_avx512_bf16_supported())

def has_compiler(device):
    """Whether there is the compiler that torch.compile needs: of C for a GPU, of C++ for a CPU."""
    variable, names = ("CC", "gcc clang") if device.type == "cuda" else ("CXX", "g++ clang++")
    return any(map(shutil.which, (os.environ.get(variable) or names).split()))

def memory(device):
    """The bytes of a device that are free, of a CPU those that there are."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES") if hasattr(os, "sysconf") else ()      # Windows.
    return math.prod(map(os.sysconf, names)) if names else math.inf
