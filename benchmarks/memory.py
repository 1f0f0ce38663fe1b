"""The largest passes (--batch_gpu) of training that fit a GPU, by config and memory: counted of
fake tensors, as `train.py --dry_run` does, not measured; with the data set on the GPU.

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
            besides += {32: 2e8, 64: 13e8}[config.network.image_shape[-1]]  # The data set as uint8.
            passes = [diffusion.split(batch, int(min((1e9 * n - besides) / an_image, batch)))
                      for n in SIZES]
            print(f"| {size}x{size} {letter}, batch {batch} | {an_image / 1e6:.0f} | "
                  + " | ".join(map(str, passes)) + " |")

if __name__ == "__main__":
    main()
