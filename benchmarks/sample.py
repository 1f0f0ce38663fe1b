"""Sampling: sample.py against the plain path, in turns, in one run.

    python benchmarks/sample.py | tee benchmarks/results/sample.md
    python benchmarks/sample.py --n 50000 --rounds 1 --amp_dtype float16            # on a GPU

Untrained networks: the time is the same. plain: eager, NCHW, PNGs written after each batch, one by
one. Both write n PNGs.
"""

import argparse
import json
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import torch
from PIL import Image
from sides import ROOT, alternate, machine, table, times_faster
import sample
from edm2 import diffusion, distributed
from edm2.config import load_config

def main():
    """Time each config's sides and print a table."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--configs", nargs="+", default=["cifar10/C", "cifar10/E", "cifar10/G"])
    p.add_argument("--n", type=int, default=64, help="images")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--steps", type=int, default=18)
    p.add_argument("--amp_dtype", choices=["float16", "bfloat16"])
    p.add_argument("--and_bfloat16", action="store_true", help="sample.py in bfloat16, too")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    p.add_argument("--json", type=Path, metavar="FILE", help="the table, for benchmarks/gpu.py")
    args = p.parse_args()
    on_gpu, rows = torch.cuda.is_available(), []
    print(f"`{shlex.join(['python', *sys.argv])}`, {machine()}, {args.n} images in {args.steps} "
          f"steps\n")
    for name in args.configs:
        config = load_config(ROOT / "config" / f"{name}.yaml", args.set)
        ways = {"sample.py": (fast, args.amp_dtype), "plain": (plain, args.amp_dtype)}
        ways |= {"sample.py in bfloat16": (fast, "bfloat16")} if args.and_bfloat16 else {}
        with tempfile.TemporaryDirectory() as folder:
            timings = alternate({f"{name}, {way}": (side, config, args, dtype, Path(folder) / way)
                                 for way, (side, dtype) in ways.items()},
                                args.rounds, warmup=int(on_gpu))        # It compiles.
            most = max(np.abs(read(f"{folder}/sample.py", i) - read(f"{folder}/plain", i)).max()
                       for i in range(args.n))
        print(table(timings, f"{name}, plain", {
            "images per second": lambda t: f"{args.n / t.median:.2f}",
            "most a pixel of sample.py differs from plain (grey levels)":
                lambda t, most=most: f"{most}"}), flush=True)
        rows += [{"side": side, "seconds": t.median, "img_per_s": args.n / t.median,
                  "memory": t.memory, "faster": times_faster(t, timings[f"{name}, plain"])}
                 for side, t in timings.items()]
    if args.json:
        args.json.write_text(json.dumps(rows))

def read(folder, i):
    """The pixels of an image."""
    return np.asarray(Image.open(Path(folder) / "images" / f"{i:06d}.png")).astype(int)

def denoiser(config, amp_dtype):
    """An untrained network whose output is not 0."""
    torch.manual_seed(0)
    model = diffusion.build(config, amp_dtype and getattr(torch, amp_dtype))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("gain"):
                p.fill_(1)
    return model.eval().requires_grad_(False)

def fast(config, args, amp_dtype, folder):
    """What sample.py does with a network that is loaded."""
    device = distributed.init()
    model = diffusion.deploy(denoiser(config, amp_dtype), device, compiled=device.type == "cuda")
    settings = SimpleNamespace(n_samples=args.n, seed=0, batch_gpu=None)
    sampling = diffusion.Sampling(args.steps)

    def run():
        make_anew(folder)
        sample.write_images(model, range(args.n), settings, sampling, folder)
    return run

def plain(config, args, amp_dtype, folder):
    """The plain path: batches of 64 on the CPU and of 500 on a GPU."""
    device = distributed.init()
    model = denoiser(config, amp_dtype).to(device)
    size = 500 if device.type == "cuda" else 64

    def run():
        make_anew(folder)
        for start in range(0, args.n, size):
            indices = range(start, min(start + size, args.n))
            images = diffusion.generate(model, indices, 0, diffusion.Sampling(args.steps)).cpu()
            for i, image in zip(indices, images, strict=True):
                Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).save(
                    folder / "images" / f"{i:06d}.png")
    return run

def make_anew(folder):
    """An empty folder for images."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)

if __name__ == "__main__":
    main()
