"""What the tests share: a tiny config, the commands as real processes, and where the real data lie."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
NETS = ["UNetC", "UNetE", "UNetG"]

needs_cifar10 = pytest.mark.skipif(not (DATA / "cifar-10-batches-py").is_dir(), reason=f"no CIFAR-10 in {DATA}")
needs_tiny = pytest.mark.skipif(not (DATA / "tiny-imagenet-200-small.zip").is_file(), reason=f"no zip in {DATA}")


def tiny_config(folder, net_type="UNetC", **changes):
    """Write a config of a small network on the digits, 10 steps an epoch, to folder; return its path."""
    config = {
        "dataset": "digits", "net_type": net_type,
        "network": {"image_shape": [1, 8, 8], "n_channels": 32, "ch_mults": [1, 1], "is_attn": [False, True],
                    "attn_channels_per_head": 16, "dropout": 0.0, "n_blocks": 1},
        "n_epoch": 2, "batch_size": 140, "lrate": 1e-3 if net_type == "UNetC" else 1e-2, "warm_epoch": 0.5,
        "ema": 0.99, "n_sample": 4, "log_every": 5, "save_dir": str(folder / "run"),
    }
    network = config["network"] | changes.pop("network", {})
    path = Path(folder) / "config.yaml"
    path.write_text(yaml.safe_dump(config | {"network": network} | changes))
    return path


def run(script, *args, processes=None, cwd=ROOT, timeout=600):
    """Run a command as a user does, under torchrun where `processes` is given; return the finished process."""
    launcher = [sys.executable]
    if processes:
        launcher = [str(Path(sys.executable).with_name("torchrun")), "--standalone", f"--nproc_per_node={processes}"]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    return subprocess.run([*launcher, str(ROOT / script), *map(str, args)], cwd=cwd, env=env, timeout=timeout,
                          capture_output=True, text=True)


def succeed(*args, **kwargs):
    """Run a command and return its standard output; its errors are the test's."""
    done = run(*args, **kwargs)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def weights(save_dir, epoch, key="network"):
    """One state dict of a checkpoint."""
    return torch.load(Path(save_dir) / "ckpts" / f"model_{epoch}.pth", weights_only=True)[key]


def distance(a, b):
    """L2 of the difference of two state dicts over the L2 of the first."""
    flat_a, flat_b = (torch.cat([v.flatten().double() for v in state.values()]) for state in (a, b))
    return ((flat_a - flat_b).norm() / flat_a.norm()).item()


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """A file with random weights in the layout of the FID's Inception-v3, whose features vary, and its SHA-256."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            """The constructor has nothing to load yet."""

    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save({}, path)
    weights = Unloaded("inception-v3-compat", ["2048"], feature_extractor_weights_path=path).state_dict()
    g = torch.Generator().manual_seed(0)
    for name, tensor in weights.items():
        if name.endswith("conv.weight"):
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=g)      # He: activations keep their size.
        elif name.endswith(("bn.bias", "fc.weight")):
            tensor.normal_(0, 0.1, generator=g)
    torch.save(weights, path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()
