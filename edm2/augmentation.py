"""Non-leaky augmentation: an affine map of each image, of which the network is told in 9 numbers;
when it samples, they are 0, for nothing done (EDM, arXiv 2206.00364, appendix F.2)."""

import math
import torch
from torch.nn.functional import grid_sample

N_NUMBERS = 9

def draw(n, p, g):
    """What to do to n images, (n,8), 0 for nothing: flips of x and y (1), the normal number of an
    isotropic scaling, the angle of a rotation, normal number and axis of an anisotropic scaling,
    two normal numbers of a translation. x is flipped with probability 1/2. The others come with
    probability p each; of them y is flipped, and the axis turned, in half of the cases."""
    u, z = (f(n, k, generator=g, device=g.device) for f, k in ((torch.rand, 10), (torch.randn, 4)))
    half, angles = u[:, :3] < 0.5, (2 * u[:, 3:5] - 1) * math.pi
    done = torch.stack([half[:, 1], z[:, 0], angles[:, 0], z[:, 1], angles[:, 1] * half[:, 2],
                        z[:, 2], z[:, 3]], dim=1)
    applied = u[:, 5:] < p              # Flip of y, scaling, rotation, anisotropic, translation.
    return torch.cat([half[:, :1], torch.where(applied[:, [0, 1, 2, 3, 3, 4, 4]], done, 0)], dim=1)

def numbers(done):
    """The 9 numbers, (n,9), that the network is told of what draw() gave."""
    flip_x, flip_y, scale, angle, aniso, axis, dx, dy = done.unbind(1)
    return torch.stack([flip_x, flip_y, scale, angle.cos() - 1, angle.sin(),
                        aniso * axis.cos(), aniso * axis.sin(), dx, dy], dim=1)

def transform(images, done):
    """Images (n,C,H,W), flipped, scaled by 2^(0.2·scale), rotated, scaled by 2^(±0.2·aniso) along
    and across the axis, moved by W/8·dx and H/8·dy pixels, in this order; reflected beyond their
    border, bicubic."""
    def diagonal(*values):
        return torch.diag_embed(torch.stack(values, dim=1))

    def rotation(t):
        return torch.stack([t.cos(), -t.sin(), t.sin(), t.cos()], dim=1).view(-1, 2, 2)

    flip_x, flip_y, scale, angle, aniso, axis, dx, dy = done.unbind(1)
    H, W = images.shape[2:]
    # From where each pixel comes, in pixels from the centre: the inverse of all, the last first.
    inverse = (diagonal(1 - 2 * flip_x, 1 - 2 * flip_y) * (-0.2 * scale).exp2()[:, None, None]
               @ rotation(-angle) @ rotation(axis)
               @ diagonal((-0.2 * aniso).exp2(), (0.2 * aniso).exp2()) @ rotation(-axis))
    y, x = (torch.arange(n, device=done.device) - (n - 1) / 2 for n in (H, W))
    target = torch.cartesian_prod(y, x).flip(1) - torch.stack([dx * W, dy * H], 1)[:, None] / 8
    x, y = (target @ inverse.mT).view(-1, H, W, 2).unbind(3)
    source = torch.stack([x * (2 / W), y * (2 / H)], dim=3)         # The image is -1 to 1.
    return grid_sample(images, source, mode="bicubic", padding_mode="reflection",
                       align_corners=False)
