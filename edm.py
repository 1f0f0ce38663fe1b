"""EDM preconditioning, uncertainty-weighted loss, Heun sampler and block features: what Configs C, E and G share.

Sources: EDM (arXiv 2206.00364, Table 1 and Alg. 2), EDM2 (arXiv 2312.02696, Eq. 14-21). Pixels are in [-1,1].
"""

import contextlib
import math
from itertools import pairwise

import numpy as np
import torch
from torch import nn

import blockC
import blockE
import blockG
from runtime import UserError
from unetC import UNetC
from unetE import UNetE
from unetG import UNetG

NETWORKS = {"UNetC": (UNetC, blockC), "UNetE": (UNetE, blockE), "UNetG": (UNetG, blockG)}


class EDM(nn.Module):
    """Denoiser D(x; sigma) and its training loss around a raw network F(x; c_noise)."""

    def __init__(self,
        net,                        # F: (B,C,H,W), c_noise (B,) to (B,C,H,W).
        uncertainty,                # u: c_noise (B,) to (B,1); used in the loss, thrown away after training.
        sigma_data = 0.5,           # RMS of the pixels in [-1,1].
        p_mean = -1.2,              # Mean of ln(sigma) in training.
        p_std = 1.2,                # Standard deviation of ln(sigma) in training.
        sigma_min = 0.002,          # Sampler: last noise level.
        sigma_max = 80.0,           # Sampler: first noise level.
        rho = 7.0,                  # Sampler: exponent of the schedule.
        S_min = 0.01,               # Sampler: churn begins above this noise level,
        S_max = 1.0,                # ends below this one,
        S_noise = 1.007,            # and its noise has this standard deviation.
        amp_dtype = None,           # Precision of F: torch.float16, torch.bfloat16, or None for fp32.
    ):
        super().__init__()
        self.net = net
        self.uncertainty = uncertainty
        self.sigma_data = sigma_data
        self.p_mean = p_mean
        self.p_std = p_std
        self.schedule = {"sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho}
        self.churn = {"S_min": S_min, "S_max": S_max, "S_noise": S_noise}
        self.amp_dtype = amp_dtype

    def denoise(self, x, sigma, return_features=False):
        """D(x; sigma) in fp32 (EDM Eq. 7 and Table 1), x (B,C,H,W), sigma (B,); with return_features also the
        outputs of the decoder blocks, {"out_1": (B,C',H',W'), ...}; with a block's name the network ends there and D
        is None."""
        x, sigma = x.float(), sigma.float()
        s, s_d = sigma[:, None, None, None], self.sigma_data
        c_skip = s_d ** 2 / (s ** 2 + s_d ** 2)
        c_out = s * s_d / (s ** 2 + s_d ** 2).sqrt()
        c_in = 1 / (s ** 2 + s_d ** 2).sqrt()
        c_noise = sigma.log() / 4
        with torch.autocast(x.device.type, dtype=self.amp_dtype) if self.amp_dtype else contextlib.nullcontext():
            F_x = self.net(c_in * x, c_noise, return_features=return_features)
        F_x, features = F_x if return_features else (F_x, None)
        D_x = None if F_x is None else c_skip * x + c_out * F_x.float()
        return (D_x, features) if return_features else D_x

    def forward(self, y, level, noise):
        """Training loss of images y (B,C,H,W), given level and noise ~ N(0,1), (B,) and (B,C,H,W).

        Return each image's mean per pixel, (B,): the uncertainty-weighted loss and the unweighted EDM loss λ·(D-y)².
        """
        sigma = (self.p_mean + self.p_std * level).exp()
        D_x = self.denoise(y + sigma[:, None, None, None] * noise, sigma)
        u = self.uncertainty(sigma.log() / 4)[:, 0]
        unweighted = edm_loss(D_x, y, sigma, self.sigma_data)
        return uncertainty_loss(unweighted, u), unweighted


def edm_loss(D_x, y, sigma, sigma_data):
    """λ(sigma)·(D-y)², λ = (sigma²+sigma_data²)/(sigma·sigma_data)², averaged over the pixels: (B,) (EDM Table 1)."""
    weight = (sigma ** 2 + sigma_data ** 2) / (sigma * sigma_data) ** 2
    return weight * (D_x - y).square().mean(dim=(1, 2, 3))


def uncertainty_loss(unweighted, u):
    """loss/e^u + u (EDM2 Eq. 17-21): least where e^u is the expected loss at that noise level, so every level counts
    the same. All (B,)."""
    return unweighted / u.exp() + u


def build(config, amp_dtype=None):
    """An EDM from a checked config. Raises UserError for widths that the network's layers cannot divide."""
    UNet, block = NETWORKS[config["net_type"]]
    try:
        net = UNet(**config["network"])
    except ValueError as e:
        raise UserError(f"network: {e}") from None
    uncertainty = nn.Sequential(block.Fourier(128), block.Linear(128, 1))
    return EDM(net, uncertainty, **config["diffusion"], amp_dtype=amp_dtype)


def cost(config):
    """Trainable parameters of the network, and GFLOP of one training image (forward and backward).

    Counted are convolutions, linear layers and attention: a multiplication and an addition each in the forward pass,
    and twice that in the backward pass. Raises UserError as build does. Allocates nothing.
    """
    with torch.device("meta"):
        edm = build(config)
    net = edm.net
    _, H, W = config["network"]["image_shape"]
    pixels = H * W
    products = pixels * (net.stem.weight.numel() * 2 / 3 + net.out_conv.weight.numel())     # No gradient of the images.
    products += sum(p.numel() for p in edm.parameters() if p.ndim == 2)
    for block in [*net.encoder, *net.middle, *net.decoder]:
        pixels *= {"down": 1 / 4, "up": 4, None: 1}[block.resample_mode]
        products += pixels * sum(p.numel() for p in block.parameters() if p.ndim == 4)
        if block.attention is not None:
            products += 2 * pixels ** 2 * block.attention.proj.weight.shape[0]      # q·k and its product with v.
    return sum(p.numel() for p in net.parameters()), 3 * 2 * products / 1e9


def block_widths(config):
    """The decoder blocks in order of execution and their channels, {"out_1": 256, ...}; allocates nothing."""
    with torch.device("meta"), torch.no_grad():
        x = torch.empty(1, *config["network"]["image_shape"])
        _, features = build(config).denoise(x, torch.empty(1), return_features=True)
    return {name: feature.shape[1] for name, feature in features.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Sampler.

def sigma_steps(n_steps=18, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """Noise levels sigma_0 = sigma_max > ... > sigma_{n-1} = sigma_min > 0, (n_steps+1,) float64 (EDM Eq. 5)."""
    ramp = np.linspace(0, 1, n_steps) if n_steps > 1 else np.zeros(1)
    sigmas = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return np.append(sigmas, 0)


def heun_sampler(denoise, latents, sigmas, eta=0.0, noise=None, S_min=0.01, S_max=1.0, S_noise=1.007):
    """Heun's second-order method on the probability-flow ODE, with churn where eta > 0 (EDM Alg. 2).

    denoise: D(x; sigma), called with x (B,C,H,W) float64 and sigma (B,) float64.
    latents: (B,C,H,W) ~ N(0,1). sigmas: falling noise levels that end in 0. The state is float64.
    eta: churn in [0,1]: gamma = (√2-1)·eta for sigma in [S_min, S_max]; noise() then gives (B,C,H,W) ~ N(0,1).
    Return x (B,C,H,W) float64.
    """
    def slope(x, sigma):
        return (x - denoise(x, x.new_full((len(x),), sigma))) / sigma

    x = latents.double() * sigmas[0]
    for sigma, sigma_next in pairwise(sigmas):
        # Raise the noise level (churn).
        if eta > 0 and S_min <= sigma <= S_max:
            sigma_hat = sigma * (1 + (math.sqrt(2) - 1) * eta)
            x = x + math.sqrt(sigma_hat ** 2 - sigma ** 2) * S_noise * noise()
            sigma = sigma_hat
        # Euler step.
        d = slope(x, sigma)
        x_next = x + (sigma_next - sigma) * d
        # Second-order correction.
        if sigma_next > 0:
            x_next = x + (sigma_next - sigma) * (d + slope(x_next, sigma_next)) / 2
        x = x_next
    return x


@torch.no_grad()
def generate(edm, indices, image_shape, device, seed=0, n_steps=18, eta=0.0, clip_denoised=False):
    """Sample the images number `indices`, each from its own seed: the same whatever the batch or the process.

    Return (len(indices),C,H,W) uint8 on `device`.
    """
    streams = [np.random.default_rng((seed, i)) for i in indices]

    def noise():
        x = torch.from_numpy(np.stack([s.standard_normal(image_shape) for s in streams]))
        if torch.device(device).type == "cuda":
            x = x.pin_memory()              # So that nobody waits until the GPU has it.
        return x.to(device, non_blocking=True)

    def denoise(x, sigma):
        D_x = edm.denoise(x, sigma)
        return (D_x.clamp(-1, 1) if clip_denoised else D_x).double()

    x = heun_sampler(denoise, noise(), sigma_steps(n_steps, **edm.schedule), eta, noise, **edm.churn)
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)
