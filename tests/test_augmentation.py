"""Augmentation: each transformation against SciPy's, its numbers, that it stays with its image."""

import math
import numpy as np
import pytest
import torch
from scipy import ndimage
from edm2 import augmentation

def image(h=48, w=64):
    """A smooth image without symmetries, (3,h,w) in [-1,1]."""
    y, x = np.mgrid[:h, :w] / 10
    return np.stack([np.sin(x + k) * np.cos(0.7 * y + x / 3 + k) for k in range(3)])

def by_scipy(source, forward, shift=(0, 0)):
    """`source` (3,h,w) under x' = forward·x + shift, in pixels (x,y) from the centre."""
    h, w = source.shape[1:]
    centre, back = np.array([h - 1, w - 1]) / 2, np.linalg.inv(forward)[::-1, ::-1]     # (y,x)
    offset = centre - back @ (centre + np.array(shift[::-1]))
    return np.stack([ndimage.affine_transform(channel, back, offset, order=3, mode="reflect")
                     for channel in source])

def turn(t):
    return np.array([[math.cos(t), -math.sin(t)], [math.sin(t), math.cos(t)]])

ANISO = turn(0.5) @ np.diag([2 ** 0.26, 2 ** -0.26]) @ turn(-0.5)

@pytest.mark.parametrize(("done", "forward", "shift", "numbers"), [
    ([1, 0, 0, 0, 0, 0, 0, 0], np.diag([-1, 1]), (0, 0), [1, 0, 0, 0, 0, 0, 0, 0, 0]),
    ([0, 1, 0, 0, 0, 0, 0, 0], np.diag([1, -1]), (0, 0), [0, 1, 0, 0, 0, 0, 0, 0, 0]),
    ([0, 0, -1.5, 0, 0, 0, 0, 0], 2 ** -0.3 * np.eye(2), (0, 0), [0, 0, -1.5, 0, 0, 0, 0, 0, 0]),
    ([0, 0, 0, 2.0, 0, 0, 0, 0], turn(2.0), (0, 0),
     [0, 0, 0, math.cos(2) - 1, math.sin(2), 0, 0, 0, 0]),
    ([0, 0, 0, 0, 1.3, 0.5, 0, 0], ANISO, (0, 0),
     [0, 0, 0, 0, 0, 1.3 * math.cos(0.5), 1.3 * math.sin(0.5), 0, 0]),
    ([0, 0, 0, 0, 0, 0, 0.7, -1.1], np.eye(2), (5.6, -6.6), [0, 0, 0, 0, 0, 0, 0, 0.7, -1.1]),
    ([1, 0, 0.5, -1.0, 1.3, 0.5, 0.7, -1.1],        # All of them, in this order.
     ANISO @ turn(-1.0) @ (2 ** 0.1 * np.diag([-1, 1])), (5.6, -6.6),
     [1, 0, 0.5, math.cos(1) - 1, -math.sin(1), 1.3 * math.cos(0.5), 1.3 * math.sin(0.5), 0.7,
      -1.1])])
def test_each_transformation_against_scipy(done, forward, shift, numbers):
    source, given = image(), torch.tensor([done, [0] * 8], dtype=torch.float32)
    found = augmentation.transform(torch.tensor(source).float().expand(2, -1, -1, -1), given)
    assert np.abs(found[1].numpy() - source).max() < 1e-5       # Nothing done.
    error = np.abs(found[0].numpy() - by_scipy(source, forward, shift))
    print(f"largest difference {error.max():.4f}, mean {error.mean():.5f}")
    assert error.mean() < 2e-3 and error.max() < 0.01
    assert np.abs(found[0].numpy() - source).mean() > 0.1
    torch.testing.assert_close(augmentation.numbers(given)[0], torch.tensor(numbers).float())
    assert not augmentation.numbers(given)[1].any()
