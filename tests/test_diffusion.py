"""Diffusion: preconditioning, loss and sampler against cases that are known in closed form."""

import copy
import math
from types import SimpleNamespace
from unittest.mock import Mock
import numpy as np
import pytest
import torch
from conftest import NETS, tiny_config
from torch.utils.flop_counter import FlopCounterMode
from edm2 import diffusion
from edm2.config import Diffusion, Network, load_config

MEAN, STD = 0.3, 0.5        # Of the analytic data distribution N(0.3, 0.5²).
DEFAULT = Diffusion()

def exact_denoiser(x, sigma):
    """E[y | x] for y ~ N(0.3, 0.5²), x = y + sigma·n."""
    return (STD ** 2 * x + sigma ** 2 * MEAN) / (STD ** 2 + sigma ** 2)

class Constant(torch.nn.Module):
    """A network F of one value: D = c_skip·x + c_out·value. It keeps what it is given."""
    def __init__(self, value=0.0):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value), requires_grad=False)

    def forward(self, x, c_noise, label=None, augment=None, return_features=False):
        self.x, self.c_noise = x, c_noise
        return self.value.expand_as(x)

def constant(value=0.0, section=DEFAULT):
    network = Network(image_shape=[1, 8, 8])
    return diffusion.EDM(Constant(value), None, SimpleNamespace(diffusion=section, network=network))

def small_edm(net_type, folder):
    torch.manual_seed(0)
    path = tiny_config(folder, net_type, diffusion={"sigma_data": STD})
    return diffusion.build(load_config(path))

def weighted_error(model, sigma, n):
    """The mean of λ(D-y)² over n images at one noise level."""
    y, levels = MEAN + STD * torch.randn(n, 1, 1, 1), torch.full((n,), sigma)
    D_x = model.denoise(y + sigma * torch.randn_like(y), levels)
    return diffusion.edm_loss(D_x, y, levels, STD).mean()

def test_sampler_against_the_exact_solution():
    latents = torch.from_numpy(np.random.default_rng(0).standard_normal((100_000, 1, 1, 1)))
    latents, errors = (latents - latents.mean()) / latents.std(), []
    for n, std in ((18, 0.5278), (36, 0.5063), (72, 0.5016)):
        denoise, sigmas = Mock(wraps=exact_denoiser), diffusion.sigma_steps(DEFAULT, n)
        x = diffusion.heun_sampler(denoise, latents, sigmas)
        exact = MEAN + (latents * sigmas[0] - MEAN) * STD / math.sqrt(STD ** 2 + sigmas[0] ** 2)
        errors.append((x - exact).square().mean().sqrt().item())
        assert x.dtype == torch.float64 and denoise.call_count == 2 * n - 1
        assert x.std().item() == pytest.approx(std, abs=0.001)
        assert x.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert 4 <= errors[0] / errors[1] <= 5 and 4 <= errors[1] / errors[2] <= 5
    sigmas = diffusion.sigma_steps(DEFAULT)         # The probe counts from the clean end.
    assert sigmas[::-1][[0, 1, 3, 4, 5, 18]] == pytest.approx(
        [0, 0.002, 0.0229, 0.0599, 0.1395, 80], abs=5e-5)
    assert len(sigmas) == 19 and sigmas[17] == pytest.approx(0.002)

def test_churn_keeps_the_distribution(monkeypatch):
    """With the churn that generate() asks of the sampler; and clip_denoised."""
    heun_sampler, asked = diffusion.heun_sampler, Mock(side_effect=lambda *args: args[1])
    monkeypatch.setattr(diffusion, "heun_sampler", asked)
    for eta, clip in ((1, False), (0.5, True)):
        diffusion.generate(constant(section=Diffusion(S_noise=3)), range(100), 0,
                           diffusion.Sampling(18, eta, clip))
    (free, latents, _, gamma, with_S_noise), (clipped, _, _, half, _) = (
        call.args for call in asked.call_args_list)
    assert latents.std().item() == pytest.approx(1, abs=0.05)
    assert with_S_noise().std().item() == pytest.approx(3, abs=0.15)
    assert gamma(0.5) == 2 * half(0.5) == pytest.approx(math.sqrt(2) - 1)
    most = [denoise(1000 * latents, 1.0).abs().max() for denoise in (free, clipped)]
    assert most[0] > 100 and most[1] == 1
    rng, sigmas = np.random.default_rng(0), diffusion.sigma_steps(DEFAULT, 72)
    noise = Mock(side_effect=lambda: torch.from_numpy(rng.standard_normal((100_000, 1, 1, 1))))
    x = heun_sampler(exact_denoiser, noise(), sigmas, gamma, noise)
    # The latents, then once per level within [S_min, S_max].
    assert noise.call_count == 1 + len([s for s in sigmas[:-1] if 0.01 <= s <= 1])
    assert x.std().item() == pytest.approx(STD, abs=0.02)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.01)

@pytest.mark.parametrize("net_type", NETS)
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_image_i_is_the_same_in_every_batch(tmp_path, net_type, eta):
    """And in channels_last or not: within one grey level."""
    model = small_edm(net_type, tmp_path).eval()
    if net_type == "UNetG":                         # At its start G's output is 0.
        model.net.out_gain.data.fill_(1)
    fast = copy.deepcopy(model).to(memory_format=torch.channels_last)
    how = diffusion.Sampling(eta=eta)
    whole, other = (diffusion.generate(fast, range(6), seed, how) for seed in (3, 4))
    for numbers in ([0, 2], *([i] for i in range(6))):
        part = diffusion.generate(model, numbers, 3, how)
        assert (part.int() - whole[numbers].int()).abs().max() <= 1
    assert whole.dtype == torch.uint8 and whole.shape == (6, 1, 8, 8)
    assert (other.int() - whole.int()).abs().max() > 1
    assert len({image.numpy().tobytes() for image in whole}) == 6

def test_preconditioning_gives_unit_variance_input_and_target():
    model = constant(1.0)
    for sigma in (0.002, 0.5, 80.0):
        y = 0.5 * torch.randn(64, 3, 32, 32)
        x = y + sigma * torch.randn_like(y)
        D_x = model.denoise(x.double(), torch.full((64,), sigma))
        assert D_x.dtype == torch.float32 and model.net.x.std().item() == pytest.approx(1, abs=0.01)
        assert model.net.c_noise[0].item() == pytest.approx(math.log(sigma) / 4, abs=1e-5)
        c_skip, c_out = 0.25 / (sigma ** 2 + 0.25), sigma * 0.5 / math.sqrt(sigma ** 2 + 0.25)
        torch.testing.assert_close(D_x, c_skip * x + c_out, rtol=1e-4, atol=1e-5)
        target = (y - c_skip * x) / c_out       # What F learns: unit variance at every level.
        assert target.std().item() == pytest.approx(1, abs=0.01)

def test_loss_is_the_mean_per_pixel_and_its_weight_that_of_edm():
    y, sigma = torch.randn(3, 2, 4, 4), torch.tensor([0.1, 1.0, 10.0])
    expected = 0.04 * (sigma ** 2 + 0.25) / (sigma * 0.5) ** 2
    torch.testing.assert_close(diffusion.edm_loss(y + 0.2, y, sigma, 0.5), expected)
    model, y, level = constant(), torch.randn(3, 1, 8, 8), torch.tensor([-1.0, 0.0, 2.0])
    model.uncertainty = torch.nn.Sequential(torch.nn.Unflatten(0, (-1, 1)), torch.nn.Linear(1, 1))
    weighted, unweighted = model(y, level, torch.randn_like(y))
    u = model.uncertainty((-1.2 + 1.2 * level) / 4)[:, 0]
    torch.testing.assert_close(weighted, unweighted / u.exp() + u)

@pytest.mark.parametrize("net_type", ["UNetC", "UNetG"])
def test_a_trained_u_head_finds_the_weighted_error(tmp_path, net_type):
    """With D = c_skip·x, e^u(sigma) must come within 10 % of the measured weighted error."""
    model = small_edm(net_type, tmp_path).train()
    model.net, steps = Constant(), 600
    optimizer = torch.optim.Adam(model.uncertainty.parameters(), lr=0.02)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / steps) + 1e-4
        y = MEAN + STD * torch.randn(512, 1, 4, 4)
        loss, _ = model(y, torch.randn(512), torch.randn_like(y))
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    model.eval()
    for level in (-1.5, -0.5, 0.0, 0.5, 1.5):       # ln(sigma) = p_mean + p_std·level.
        log_sigma = torch.tensor([-1.2 + 1.2 * level])
        error = weighted_error(model, log_sigma.exp().item(), 200_000).item()
        with torch.no_grad():
            assert model.uncertainty(log_sigma / 4).exp().item() == pytest.approx(error, rel=0.1)

@pytest.mark.parametrize("net_type", NETS)
def test_cost_is_what_torch_counts(tmp_path, net_type):
    """But for the gradient of the noise embedding's input, which nobody asks for. u is extra."""
    config = load_config(tiny_config(tmp_path, net_type, dataset="folder", network={
        "image_shape": [3, 32, 16], "ch_mults": [1, 2, 3], "is_attn": [True, False, True],
        "n_blocks": 2}))
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = diffusion.build(config)
        y = torch.empty(1, 3, 32, 16)
        model(y, torch.empty(1), torch.empty_like(y))[0].sum().backward()
    n_parameters, gflop = diffusion.cost(config)
    assert gflop == pytest.approx(counter.get_total_flops() / 1e9, rel=1e-3)
    assert n_parameters == sum(p.numel() for p in model.net.parameters())
    assert n_parameters + 128 == sum(p.numel() for p in model.parameters())
    # The 32x32 network of Config C.
    network = Network(image_shape=[3, 32, 32], attn_channels_per_head=64)
    n_parameters, gflop = diffusion.cost(config.model_copy(
        update={"net_type": "UNetC", "network": network}))
    assert n_parameters == 39_509_888 and gflop == pytest.approx(42.6, abs=0.3)
