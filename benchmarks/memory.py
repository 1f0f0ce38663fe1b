"""The largest passes (--batch_gpu) of training that fit a GPU, by config and memory: counted of
fake tensors, as `train.py --dry_run` does, not measured.

    python benchmarks/memory.py
"""

import torch
from sides import ROOT
from edm2 import diffusion
from edm2.config import load_config

SIZES = (12, 16, 24, 40, 80)        # GB.

def main():
    """Print the table, of mixed precision in float16."""
    print("| | MB an image | " + " | ".join(f"{n} GB" for n in SIZES) + " |")
    print("|---" * (2 + len(SIZES)) + "|")
    for data in ("cifar10", "tinyimagenet"):
        for letter in "CEG":
            config = load_config(ROOT / "config" / data / f"{letter}.yaml")
            an_image, besides = diffusion.training_bytes(config, torch.device("cpu"), torch.float16)
            size, batch = config.network.image_shape[-1], config.batch_size
            passes = [diffusion.split(batch, int(min((1e9 * n - besides) / an_image, batch)))
                      for n in SIZES]
            print(f"| {size}x{size} {letter}, batch {batch} | {an_image / 1e6:.0f} | "
                  + " | ".join(map(str, passes)) + " |")

if __name__ == "__main__":
    main()
