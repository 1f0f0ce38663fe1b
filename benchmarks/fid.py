"""fid.py against its peers, in turns, in one run: the Fréchet distance, and features per second.

    python benchmarks/fid.py | tee benchmarks/results/fid.md

The distance of two sets of 2048-dimensional statistics: fid.py's, and pytorch-fid's by scipy's
sqrtm. Features of a folder of PNGs by Inception-v3 with random weights of the published layout (on
which the time does not depend): fid.py, torch-fidelity and pytorch-fid, each as its command does
it, from files to features.
"""

import argparse
import shlex
import sys
import tempfile
from pathlib import Path
import numpy as np
import torch
from sides import alternate, machine, table
from edm2 import distributed, features, files, frechet, image_files

def main():
    """Time the sides and print both tables."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--n", type=int, default=4096 if torch.cuda.is_available() else 128,
                   help="images")
    p.add_argument("--d", type=int, default=2048, help="dimensions of the statistics")
    args = p.parse_args()
    print(f"`{shlex.join(['python', *sys.argv])}`, {machine()}\n\n"
          f"Distance in {args.d} dimensions:\n")
    distances = alternate({"fid.py, Cholesky": (distance, args.d),
                           "pytorch-fid, sqrtm": (distance_sqrtm, args.d)}, args.rounds, warmup=1)
    print(table(distances, "pytorch-fid, sqrtm", {"distance": lambda t: f"{t.returned[0]:.6f}"}))

    with tempfile.TemporaryDirectory() as folder:
        g = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (args.n, 3, 32, 32), dtype=torch.uint8, generator=g)
        for i, image in enumerate(images):
            image_files.save_png(image, Path(folder) / f"{i:06d}.png")
        weights = Path(folder) / "weights.pth"
        torch.save(random_weights(), weights)
        sides = {"fid.py": ours, "torch-fidelity": torch_fidelity, "pytorch-fid": pytorch_fid}
        timings = alternate({name: (side, folder, weights) for name, side in sides.items()},
                            args.rounds, warmup=1)
    print(f"\nFeatures of {args.n} images of 32x32, from PNGs:\n")
    print(table(timings, "pytorch-fid",
                {"images per second": lambda t: f"{args.n / t.median:.1f}"}))

# ----------------------------------------------------------------------------------------------
# Distance.

def statistics(d, seed):
    """Mean and covariance of 2 d features whose scales differ."""
    x = np.random.default_rng(seed).standard_normal((2 * d, d)) * np.geomspace(1, 1e-3, d)
    return x.mean(0), np.cov(x, rowvar=False)

def distance(d):
    """fid.py's."""
    a, b = statistics(d, 0), statistics(d, 1)
    return lambda: frechet.frechet_distance(*a, *b)

def distance_sqrtm(d):
    """pytorch-fid's."""
    from pytorch_fid.fid_score import calculate_frechet_distance
    a, b = statistics(d, 0), statistics(d, 1)
    return lambda: float(calculate_frechet_distance(*a, *b))

# ----------------------------------------------------------------------------------------------
# Features.

def random_weights():
    """Random weights in the layout of the FID's Inception-v3: He's, so that activations keep their
    size."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            """There is nothing to load."""

    with tempfile.NamedTemporaryFile() as file:
        torch.save({}, file.name)
        weights = Unloaded("inception-v3-compat", ["2048"],
                           feature_extractor_weights_path=file.name).state_dict()
    for name, tensor in weights.items():
        if name.endswith("conv.weight"):
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5)
    return weights

def ours(folder, weights):
    """fid.py's statistics, features kept."""
    extractor = features.Extractor("inception", distributed.init(), weights, files.sha256(weights))
    return lambda: frechet.compute(frechet.open_set(folder), extractor,
                                   keep=True).features.mean().item()

def torch_fidelity(folder, weights):
    """torch-fidelity's features, with its command's default of 64 images a batch."""
    from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id
    cuda = torch.cuda.is_available()
    extractor = create_feature_extractor("inception-v3-compat", ["2048"], cuda=cuda, verbose=False,
                                         feature_extractor_weights_path=str(weights))
    return lambda: extract_featuresdict_from_input_id(
        1, extractor, input1=str(folder), cuda=cuda, verbose=False,
        batch_size=64)["2048"].mean().item()

def pytorch_fid(folder, weights):
    """pytorch-fid's features, with its command's defaults: 50 images a batch, one worker a core up
    to 8."""
    import os
    from pytorch_fid import fid_score, inception
    inception.load_state_dict_from_url = lambda *args, **kwargs: torch.load(weights,
                                                                            weights_only=True)
    device = distributed.init()
    model = inception.InceptionV3().to(device)
    paths = sorted(Path(folder).glob("*.png"))
    return lambda: fid_score.get_activations(paths, model, device=device,
                                             num_workers=min(os.cpu_count(), 8)).mean().item()

if __name__ == "__main__":
    main()
