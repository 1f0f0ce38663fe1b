"""EDM preconditioning, uncertainty-weighted loss and Heun sampler: what Configs C, E and G share.

Sources: EDM (arXiv 2206.00364, Table 1 and Alg. 2), EDM2 (arXiv 2312.02696, Eq. 14-21)."""

import inspect
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
import numpy as np
import torch
import yaml
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
import unetC
import unetE
import unetG
from edm2 import augmentation, machine
from edm2.distributed import print0, rank, world_size
from edm2.errors import UserError, warn

NETWORKS = {"UNetC": unetC, "UNetE": unetE, "UNetG": unetG}

class EDM(nn.Module):
    """Denoiser D(x; sigma) and its training loss around a raw network F(x; c_noise).
    net: F, (B,C,H,W) and c_noise (B,) to (B,C,H,W). uncertainty: u, c_noise (B,) to (B,1), for the
    loss alone. config: of it the image_shape (C,H,W), label_dim and diffusion. amp_dtype: of F;
    None: fp32. Labels are classes (B,) int64, -1 or None for none; without label_dim ignored."""
    def __init__(self, net, uncertainty, config, amp_dtype=None):
        super().__init__()
        self.net, self.uncertainty, self.amp_dtype = net, uncertainty, amp_dtype
        self.diffusion, self.label_dim = config.diffusion, config.network.label_dim
        self.image_shape = tuple(config.network.image_shape)

    def denoise(self, x, sigma, labels=None, augment=None, return_features=False):
        """D(x; sigma) in fp32 (EDM Eq. 7), x (B,C,H,W), sigma (B,), augment (B,9) or None; with
        return_features also the decoder blocks' {"out_1": (B,C',H',W'), ...}; after a block's name,
        the last, D is None."""
        x, sigma = x.float(), sigma.float()
        s, s_d = sigma[:, None, None, None], self.diffusion.sigma_data
        c_skip = s_d ** 2 / (s ** 2 + s_d ** 2)
        c_out = s * s_d / (s ** 2 + s_d ** 2).sqrt()
        c_in = 1 / (s ** 2 + s_d ** 2).sqrt()
        c_noise = sigma.log() / 4
        with torch.autocast(x.device.type, self.amp_dtype) if self.amp_dtype else nullcontext():
            F_x = self.net(c_in * x, c_noise, self.one_hot(labels, x), augment, return_features)
        F_x, features = F_x if return_features else (F_x, None)
        D_x = None if F_x is None else c_skip * x + c_out * F_x.float()
        return (D_x, features) if return_features else D_x

    def one_hot(self, labels, x):
        """Labels (B,) as (B,label_dim), zeros for none; None where the network takes none."""
        if not self.label_dim:
            return None
        labels = x.new_full([len(x)], -1) if labels is None else labels
        return (labels[:, None] == torch.arange(self.label_dim, device=x.device)).float()

    def forward(self, y, level, noise, labels=None, augment=None):
        """Training loss of images y (B,C,H,W) in [-1,1], given level (B,) and noise (B,C,H,W), both
        ~ N(0,1): loss/e^u + u (EDM2 Eq. 17-21), (B,), and the loss itself, (B,)."""
        sigma = (self.diffusion.p_mean + self.diffusion.p_std * level).exp()
        D_x = self.denoise(y + sigma[:, None, None, None] * noise, sigma, labels, augment)
        u = self.uncertainty(sigma.log() / 4)[:, 0]
        unweighted = edm_loss(D_x, y, sigma, self.diffusion.sigma_data)
        return unweighted / u.exp() + u, unweighted     # Least where e^u is the expected loss.

def edm_loss(D_x, y, sigma, sigma_data):
    """λ(sigma)·(D-y)², λ = (sigma²+sigma_data²)/(sigma·sigma_data)², the mean per pixel, (B,)."""
    weight = (sigma ** 2 + sigma_data ** 2) / (sigma * sigma_data) ** 2
    return weight * (D_x - y).square().mean(dim=(1, 2, 3))

def build(config, amp_dtype=None):
    """An EDM from a Config. UserError: widths that the network's layers cannot divide."""
    module = NETWORKS[config.net_type]
    try:
        net = getattr(module, config.net_type)(**arguments(config))
    except ValueError as e:
        raise UserError(f"network: {e}") from None
    uncertainty = nn.Sequential(module.Fourier(128), module.Linear(128, 1))
    return EDM(net, uncertainty, config, amp_dtype)

def arguments(config):
    """The network's constructor arguments of a Config. UserError for a key that it does not take,
    but for a default, which is of another network."""
    net_type, network = config.net_type, config.network
    known = inspect.signature(getattr(NETWORKS[net_type], net_type)).parameters
    for name, field in type(network).model_fields.items():
        if name not in known and getattr(network, name) != field.default:
            raise UserError(f"network.{name} is no key of {net_type}")
    given = network.model_dump(include=set(known))
    return given | {"augment_dim": augmentation.N_NUMBERS if config.augment else 0}

def deploy(denoiser, device, channels_last=True, compiled=False):
    """Bring an EDM for sampling or features to a device, and compile it if asked."""
    denoiser.to(device, memory_format=torch.channels_last if channels_last else None)
    if compiled:
        denoiser.net.compile()
    return denoiser

def cost(config):
    """Trainable parameters of the network, and GFLOP of one training image: two for each product of
    convolutions, linear layers and attention, four in the backward pass. Allocates nothing."""
    with torch.device("meta"):
        denoiser = build(config)
    net, pixels = denoiser.net, math.prod(denoiser.image_shape[1:])
    # The images need no gradient.
    products = pixels * (net.stem.weight.numel() * 2 / 3 + net.out_conv.weight.numel())
    products += sum(p.numel() for p in denoiser.parameters() if p.ndim == 2)
    for block in [*net.encoder, *net.middle, *net.decoder]:
        pixels *= {"down": 1 / 4, "up": 4, None: 1}[block.resample_mode]
        products += pixels * sum(p.numel() for p in block.parameters() if p.ndim == 4)
        if block.attention is not None:     # q·k and its product with v.
            products += 2 * pixels ** 2 * block.attention.proj.weight.shape[0]
    return sum(p.numel() for p in net.parameters()), 3 * 2 * products / 1e9

def derive_seed(*numbers):
    """A 63-bit seed of non-negative numbers; all that is random is a function of such a seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))

def sigma_steps(diffusion, n_steps=18):
    """Noise levels sigma_max = sigma_0 > ... > sigma_{n-1} = sigma_min > 0, (n+1,) (EDM Eq. 5)."""
    rho = diffusion.rho
    high, low = diffusion.sigma_max ** (1 / rho), diffusion.sigma_min ** (1 / rho)
    return np.append((high + np.linspace(0, 1, n_steps) * (low - high)) ** rho, 0)

def heun_sampler(denoise, latents, sigmas, gamma=lambda sigma: 0, noise=None):
    """Heun's second-order method on the probability-flow ODE, with churn (EDM Alg. 2).
    denoise: D(x; sigma), of x (B,C,H,W) float64 and a number. latents: (B,C,H,W) ~ N(0,1).
    sigmas: falling, ending in 0. gamma: the churn at a noise level; where it is above 0, noise()
    gives (B,C,H,W) ~ N(0,S_noise²). Return x (B,C,H,W) float64."""
    def slope(x, sigma):
        return (x - denoise(x, sigma)) / sigma

    x = latents.double() * sigmas[0]
    for sigma, sigma_next in pairwise(sigmas):
        # Raise the noise level (churn).
        if gamma(sigma) > 0:
            sigma_hat = sigma * (1 + gamma(sigma))
            x = x + math.sqrt(sigma_hat ** 2 - sigma ** 2) * noise()
            sigma = sigma_hat
        # Euler step.
        d = slope(x, sigma)
        x_next = x + (sigma_next - sigma) * d
        # Second-order correction.
        if sigma_next > 0:
            x_next = x + (sigma_next - sigma) * (d + slope(x_next, sigma_next)) / 2
        x = x_next
    return x

@dataclass
class Sampling:
    """How images are sampled."""
    steps: int = 18                 # Of the sampler: 35 evaluations.
    eta: float = 0.0                # Churn in [0,1]: gamma = (√2-1)·eta in [S_min, S_max].
    clip_denoised: bool = False     # Clip D to [-1,1]?
    classes: list | None = None     # Image i has class classes[i % len(classes)]; None: all.
    guidance: float = 1.0           # w in D_ref + w·(D - D_ref); 1: none,
    interval: tuple = (0, math.inf) # for noise levels above the first, up to the second.
    guide: EDM | None = None        # Has D_ref (autoguidance); None: D without label.

    def guided(self, sigma):
        """Whether the guide is asked at this noise level."""
        return bool(self.guidance != 1 and self.interval[0] < sigma <= self.interval[1])

    def evaluations(self, diffusion):
        """How often the sampler evaluates the network for an image, and how often the guide."""
        asked = []
        heun_sampler(lambda x, sigma: asked.append(sigma) or x, torch.zeros(1, 1, 1, 1),
                     sigma_steps(diffusion, self.steps), self.churn(diffusion), lambda: 0)
        return len(asked), sum(map(self.guided, asked))

    def churn(self, diffusion):
        """heun_sampler's gamma."""
        gamma = (math.sqrt(2) - 1) * self.eta
        return lambda sigma: gamma if diffusion.S_min <= sigma <= diffusion.S_max else 0

def guided_denoise(denoiser, x, sigma, labels, sampling):
    """D_ref + w·(D - D_ref), in fp32, of x (B,C,H,W) at noise level `sigma`: by the same network
    without labels, in one batch (classifier-free, arXiv 2207.12598), or by a worse one with them
    (autoguidance, arXiv 2406.02507); D alone outside of the interval (arXiv 2404.07724)."""
    sigmas = x.new_full((len(x),), sigma)
    if not sampling.guided(sigma):
        return denoiser.denoise(x, sigmas, labels)
    if sampling.guide is None:
        none = torch.full_like(labels, -1)
        D_x, D_ref = denoiser.denoise(torch.cat([x, x]), torch.cat([sigmas, sigmas]),
                                      torch.cat([labels, none])).chunk(2)
    else:
        D_x, D_ref = (one.denoise(x, sigmas, labels) for one in (denoiser, sampling.guide))
    return D_ref + sampling.guidance * (D_x - D_ref)

@torch.no_grad()
def generate(denoiser, indices, seed=0, sampling=None):
    """Images number `indices`, (B,C,H,W) uint8 on the denoiser's device, each from its own seed.
    sampling: a Sampling; None: the default. UserError: NaN or Inf."""
    sampling, device = sampling or Sampling(), next(denoiser.parameters()).device
    diffusion = denoiser.diffusion
    streams = [np.random.default_rng((seed, i)) for i in indices]
    classes = sampling.classes or range(denoiser.label_dim)
    labels = [classes[i % len(classes)] for i in indices] if classes else None
    labels = labels and torch.tensor(labels, device=device)

    def noise():
        x = torch.from_numpy(np.stack([s.standard_normal(denoiser.image_shape) for s in streams]))
        # Pinned, so that nobody waits until the GPU has it.
        return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)

    def denoise(x, sigma):
        D_x = guided_denoise(denoiser, x, sigma, labels, sampling)
        return (D_x.clamp(-1, 1) if sampling.clip_denoised else D_x).double()

    x = heun_sampler(denoise, noise(), sigma_steps(diffusion, sampling.steps),
                     sampling.churn(diffusion), lambda: diffusion.S_noise * noise())
    if not torch.isfinite(x).all():         # As bytes they would look like pixels.
        raise UserError("the samples are NaN or Inf: the network has diverged, or mixed precision "
                        "is too coarse: try --amp_dtype bfloat16, or neither it nor --use_amp")
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)

def processes_on(device):
    """How many processes there are, on what device."""
    return f"{world_size()} process{'es' * (world_size() > 1)} on {machine.device_name(device)}"

def describe(config, device, precision):
    """Print the configuration, the network's size and cost, the processes and the precision."""
    (n_parameters, gflop), n = cost(config), world_size()
    if config.batch_size % n:
        raise UserError(f"batch_size {config.batch_size} is not divisible by the {n} processes")
    text = yaml.safe_dump(config.model_dump(), sort_keys=False, default_flow_style=None)
    print0(f"{text}--- {config.net_type}: {n_parameters:,} parameters, {gflop:.1f} GFLOP "
           f"per training image; {processes_on(device)}; {precision}")

def split(batch, most):
    """The largest pass of at most `most` images of which a batch holds a whole number: passes of
    one size are one shape for torch.compile."""
    return next(n for n in range(max(1, min(most, batch)), 0, -1) if batch % n == 0)

def training_bytes(config, device, amp_dtype=None):
    """(bytes an image of a pass, bytes besides) that training needs, about: what autograd keeps of
    one image and of two (fake tensors); weights, gradients, moments, EMAs; an eighth to spare."""
    totals = []
    with FakeTensorMode(), torch.device(device):
        denoiser = build(config, amp_dtype)
        weights = {p.untyped_storage()._cdata: p.numel() for p in denoiser.parameters()}
        for n in (1, 2):
            y, kept = torch.empty(n, *denoiser.image_shape), []
            y = y.to(memory_format=torch.channels_last)
            with torch.autograd.graph.saved_tensors_hooks(
                    lambda x, kept=kept: kept.append(x.untyped_storage()) or x, lambda x: x):
                denoiser(y, torch.zeros(n), y)
            sizes = {storage._cdata: storage.nbytes() for storage in kept}
            totals.append(sum(sizes[key] for key in sizes.keys() - weights.keys()))
    copies = (5 + len(config.posthoc_ema.sigma_rels)) * 4 * sum(weights.values())
    return (totals[1] - totals[0]) * 8 / 7, (2 * totals[0] - totals[1] + copies) * 8 / 7

def describe_memory(config, device, args):
    """Print what training needs of a device's memory, and warn where the passes are too large."""
    batch, free = config.batch_size // world_size(), machine.memory(device)
    an_image, besides = training_bytes(config, device, args.amp_dtype)
    fit = max(0, int(min((free - besides) / an_image, batch)))
    most, size = fit and split(batch, fit), split(batch, args.batch_gpu or batch)
    words = f"passes of {size} images need about {(besides + size * an_image) / 1e9:.1f} GB"
    print0(f"memory: {an_image / 1e9:.4f} GB an image of a pass, {besides / 1e9:.2f} GB besides: "
           f"{words}; in {free / 1e9:.1f} GB {most or 'none'} of the {batch} fit")
    if size > most and device.type == "cuda" and rank() == 0:
        warn(f"{words}: {f'--batch_gpu {most}' if most else 'not even passes of 1'} would fit")

class Throughput:
    """Speed of training since the last reading, pauses apart, and memory."""
    def __init__(self, config, device, amp_dtype, step):
        self.batch_size, self.gflop = config.batch_size, cost(config)[1]
        self.peak = machine.peak_flops(device) if amp_dtype else None
        self.restart(step)

    def read(self, step):
        """What is logged of the steps since, of all processes."""
        seconds = (time.perf_counter() - self.time) / (step - self.step)
        self.restart(step)
        tflops = self.gflop * self.batch_size / seconds / 1e3
        return {"img_per_s": self.batch_size / seconds, "step_time_s": seconds,
                "TFLOP_per_s": tflops,
                "MFU": tflops * 1e12 / (self.peak * world_size()) if self.peak else None,
                "gpu_memory_GB": torch.cuda.max_memory_allocated() / 1e9 or None}

    def restart(self, step):
        """Measure the time anew, from this step on."""
        self.step, self.time = step, time.perf_counter()
