"""Does the judge see what pixels do not? Its FD and FD(pixels) of real images of CIFAR-10's test
set with a fault, relative to those without, and how well a linear classifier does on its features.

    pip install -r benchmarks/requirements.txt
    python benchmarks/judge_check.py --data_root data [--size 16]
"""

import argparse
import shlex
import sys
import judge
import torch
from sides import ROOT, machine
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import avg_pool2d
from torchvision.transforms.functional import gaussian_blur
from edm2 import data, distributed, features, frechet
from edm2.config import load_config
from edm2.errors import command

FAULTS = {                  # {what: function of images (N,3,H,W) uint8 and their labels (N,)}.
    "none": lambda x, y: x,
    "noise of 0.05": lambda x, y: (x + 0.05 * 127.5 * torch.randn(
        x.shape, generator=torch.Generator().manual_seed(0))).round().clamp(0, 255).byte(),
    "blur, sigma 0.5": lambda x, y: gaussian_blur(x, 3, 0.5),
    "two classes missing": lambda x, y: x[y >= 2],
    "colours swapped": lambda x, y: x.flip(1)}

def main():
    """Print the table."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data_root", default="data")
    p.add_argument("--n", type=int, default=2500, help="images with a fault")
    p.add_argument("--size", type=int, choices=[16, 32], default=32)
    args = p.parse_args()
    config = load_config(ROOT / "config" / "cifar10" / "C.yaml", [f"data_root={args.data_root}"])
    images, labels = data.load(config, train=False)
    if args.size == 16:
        images = avg_pool2d(images.float(), 2).round().byte()
    n, device, found = args.n, distributed.init(), {}
    for words in (["pixels", device], [judge.NAME, device, judge.register()[1]]):
        extractor = features.Extractor(*words)

        def statistics(some, extractor=extractor):
            return frechet.compute(features.ImageSet("test images", some), extractor, 50, True)

        reference = statistics(images[2 * n:])
        for fault, make in FAULTS.items():
            kept = statistics(make(images[:2 * n], labels[:2 * n])[:n])     # Of all as many.
            found[fault] = [*found.get(fault, []), frechet.distance(kept, reference)]
            if fault == "none":
                classifier = LogisticRegression(C=0.01, max_iter=300)
                classifier.fit(reference.features / reference.features.std(), labels[2 * n:])
                right = classifier.score(kept.features / reference.features.std(), labels[:n])
                print(f"classes right by {extractor.label}: {right:.1%}", flush=True)
    print(f"\n`{shlex.join(['python', *sys.argv])}`, {machine()}\n\n| fault of {n:,} images "
          f"| FD(pixels) | FD({judge.NAME}) |\n|---|---|---|")
    for fault, values in found.items():
        cells = [f"{value:.4g} ({value / plain - 1:+.0%})"
                 for value, plain in zip(values, found["none"], strict=True)]
        print(f"| {fault} | {' | '.join(cells)} |")

if __name__ == "__main__":
    command(main)()
