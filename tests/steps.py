"""The loop train.train for a few steps on random images, in this process, watched step by step."""

from types import SimpleNamespace
import numpy as np
import pytest
import torch
from conftest import tiny_config
import train
from edm2.config import load_config

IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (32, 1, 8, 8), np.uint8))
LABELS = torch.arange(32) % 10
SIGNALS = SimpleNamespace(defer=lambda deferred: None, agree=lambda save: (0, False))

def train_steps(folder, net_type="UNetE", dtype=None, n=4, begin=id, after=id, **changes):
    """Train the tiny config on 8 n of IMAGES for an epoch of n steps, in passes of 4; return the
    train.Run. begin(run) is called before the first step, after(run) after each."""
    class Watched(train.Run):
        def __init__(self, *args):
            super().__init__(*args)
            runs.append(self)
            begin(self)

        def count_step(self, grad_norm):
            super().count_step(grad_norm)
            after(self)

    runs, path = [], tiny_config(folder, net_type, batch_size=8, n_epoch=1, **changes)
    args = SimpleNamespace(amp_dtype=dtype and getattr(torch, dtype), batch_gpu=4, compile=False,
                           channels_last=True, fresh=False, max_steps=n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Run", Watched)
        train.train(load_config(path), args, IMAGES[:8 * n], LABELS[:8 * n], None, SIGNALS)
    return runs[0]
