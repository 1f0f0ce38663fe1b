"""Diffusion: preconditioning, loss and sampler against cases that are known in closed form."""

import math

import numpy as np
import pytest
import torch
from conftest import NETS, tiny_config
from torch.utils.flop_counter import FlopCounterMode

import edm
import options

MEAN, STD = 0.3, 0.5        # Of the analytic data distribution N(0.3, 0.5²).


def exact_denoiser(x, sigma):
    """E[y | x] for y ~ N(0.3, 0.5²), x = y + sigma·n."""
    s2 = sigma.reshape(-1, *[1] * (x.ndim - 1)) ** 2
    return (STD ** 2 * x + s2 * MEAN) / (STD ** 2 + s2)


class Zero(torch.nn.Module):
    """A network F that gives 0, so that D = c_skip·x."""

    def forward(self, x, c_noise, return_features=False):
        return torch.zeros_like(x)


def small_edm(net_type, folder, **changes):
    config = options.load_config(tiny_config(folder, net_type, **changes))
    torch.manual_seed(0)
    return edm.build(config)


# ----------------------------------------------------------------------------------------------------------------------
# Sampler.

def heun_on_the_gaussian(n_steps, latents):
    calls = []

    def denoise(x, sigma):
        calls.append(float(sigma[0]))
        return exact_denoiser(x, sigma)

    sigmas = edm.sigma_steps(n_steps)
    x = edm.heun_sampler(denoise, latents, sigmas)
    exact = MEAN + (latents * sigmas[0] - MEAN) * STD / math.sqrt(STD ** 2 + sigmas[0] ** 2)
    return x, (x - exact).square().mean().sqrt().item(), len(calls)


def test_sampler_against_the_exact_solution():
    latents = torch.from_numpy(np.random.default_rng(0).standard_normal((100_000, 1, 1, 1)))
    latents = (latents - latents.mean()) / latents.std()
    results = [heun_on_the_gaussian(n, latents) for n in (18, 36, 72)]
    for (x, _, nfe), n, std in zip(results, (18, 36, 72), (0.5278, 0.5063, 0.5016), strict=True):
        assert x.dtype == torch.float64
        assert x.std().item() == pytest.approx(std, abs=0.001)
        assert x.mean().item() == pytest.approx(MEAN, abs=0.01)
        assert nfe == 2 * n - 1
    errors = [error for _, error, _ in results]
    assert 4 <= errors[0] / errors[1] <= 5
    assert 4 <= errors[1] / errors[2] <= 5


def test_churn_keeps_the_distribution():
    rng = np.random.default_rng(0)
    draws = []

    def noise():
        draws.append(1)
        return torch.from_numpy(rng.standard_normal((100_000, 1, 1, 1)))

    x = edm.heun_sampler(exact_denoiser, noise(), edm.sigma_steps(72), eta=1.0, noise=noise, S_noise=1.0)
    levels = [s for s in edm.sigma_steps(72)[:-1] if 0.01 <= s <= 1]
    assert len(draws) == 1 + len(levels)            # The latents, then once per level within [S_min, S_max].
    assert x.std().item() == pytest.approx(STD, abs=0.02)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.01)


def test_schedule():
    sigmas = edm.sigma_steps()
    assert len(sigmas) == 19 and sigmas[0] == pytest.approx(80) and sigmas[17] == pytest.approx(0.002)
    assert sigmas[18] == 0
    for t, sigma in {1: 0.002, 3: 0.0229, 4: 0.0599, 5: 0.1395}.items():    # The probe counts from the clean end.
        assert sigmas[18 - t] == pytest.approx(sigma, abs=5e-5)


@pytest.mark.parametrize("net_type", NETS)
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_image_i_is_the_same_in_every_batch(tmp_path, net_type, eta):
    model = small_edm(net_type, tmp_path).eval()
    if net_type == "UNetG":                         # At its start G's output is 0.
        model.net.out_gain.data.fill_(1)
    whole = edm.generate(model, range(6), (1, 8, 8), torch.device("cpu"), seed=3, eta=eta)
    parts = [edm.generate(model, part, (1, 8, 8), torch.device("cpu"), seed=3, eta=eta) for part in ([5], [0, 2])]
    for part, numbers in zip(parts, ([5], [0, 2]), strict=True):
        assert (part.int() - whole[numbers].int()).abs().max() <= 1
    assert whole.dtype == torch.uint8 and whole.shape == (6, 1, 8, 8)
    other = edm.generate(model, range(6), (1, 8, 8), torch.device("cpu"), seed=4, eta=eta)
    assert (other.int() - whole.int()).abs().max() > 1
    assert len({image.numpy().tobytes() for image in whole}) == 6


def test_clip_denoised(monkeypatch):
    seen = []

    def one_call(denoise, latents, *args, **kwargs):
        seen.append(denoise(1000 * latents, torch.ones(len(latents))).abs().max().item())
        return latents

    monkeypatch.setattr(edm, "heun_sampler", one_call)
    for clip in (False, True):
        edm.generate(edm.EDM(Zero(), None), range(4), (1, 8, 8), torch.device("cpu"), clip_denoised=clip)
    assert seen[0] > 100 and seen[1] == 1


# ----------------------------------------------------------------------------------------------------------------------
# Preconditioning and loss.

def test_preconditioning_gives_unit_variance_input_and_target():
    seen = {}

    class Spy(torch.nn.Module):
        def forward(self, x, c_noise, return_features=False):
            seen.update(x=x, c_noise=c_noise)
            return torch.ones_like(x)

    model = edm.EDM(Spy(), None)
    for sigma in (0.002, 0.5, 80.0):
        y = 0.5 * torch.randn(64, 3, 32, 32)
        x = y + sigma * torch.randn_like(y)
        D_x = model.denoise(x.double(), torch.full((64,), sigma))
        assert D_x.dtype == torch.float32
        assert seen["x"].std().item() == pytest.approx(1, abs=0.01)
        assert seen["c_noise"][0].item() == pytest.approx(math.log(sigma) / 4, abs=1e-5)
        c_skip, c_out = 0.25 / (sigma ** 2 + 0.25), sigma * 0.5 / math.sqrt(sigma ** 2 + 0.25)
        torch.testing.assert_close(D_x, c_skip * x + c_out, rtol=1e-4, atol=1e-5)
        target = (y - c_skip * x) / c_out                   # What F must learn: unit variance at every noise level.
        assert target.std().item() == pytest.approx(1, abs=0.01)


def test_loss_is_the_mean_per_pixel_and_its_weight_that_of_edm():
    y, sigma = torch.randn(3, 2, 4, 4), torch.tensor([0.1, 1.0, 10.0])
    D_x = y + 0.2
    expected = 0.04 * (sigma ** 2 + 0.25) / (sigma * 0.5) ** 2
    torch.testing.assert_close(edm.edm_loss(D_x, y, sigma, 0.5), expected)
    torch.testing.assert_close(edm.uncertainty_loss(expected, torch.zeros(3)), expected)
    u = torch.tensor([0.5, -1.0, 2.0])
    torch.testing.assert_close(edm.uncertainty_loss(expected, u), expected / u.exp() + u)


def test_the_best_u_is_the_log_of_the_weighted_error():
    """With D = c_skip·x fixed, the loss over a grid of u is least at ln E[λ(D-y)²], at every noise level."""
    torch.manual_seed(0)
    for sigma in (0.02, 0.3, 2.0):
        y = MEAN + STD * torch.randn(20_000, 1, 1, 1)
        levels = torch.full((len(y),), sigma)
        D_x = edm.EDM(Zero(), None).denoise(y + sigma * torch.randn_like(y), levels)
        unweighted = edm.edm_loss(D_x, y, levels, STD)
        u = torch.linspace(-2, 2, 2001)
        losses = edm.uncertainty_loss(unweighted.mean(), u)
        assert u[losses.argmin()].item() == pytest.approx(unweighted.mean().log().item(), abs=0.003)


@pytest.mark.parametrize("net_type", ["UNetC", "UNetG"])
def test_a_trained_u_head_finds_the_weighted_error(tmp_path, net_type):
    """With F = 0 fixed, e^u(sigma) must come within 10 % of the measured weighted error of D = c_skip·x."""
    model = small_edm(net_type, tmp_path).train()
    model.net = Zero()
    optimizer = torch.optim.Adam(model.uncertainty.parameters(), lr=0.02)
    steps = 600
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / steps) + 1e-4
        y = MEAN + STD * torch.randn(512, 1, 4, 4)
        loss, _ = model(y, torch.randn(512), torch.randn_like(y))
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    model.eval()
    for level in (-1.5, -0.5, 0.0, 0.5, 1.5):               # ln(sigma) = p_mean + p_std·level.
        sigma = torch.tensor([math.exp(-1.2 + 1.2 * level)])
        y = MEAN + STD * torch.randn(200_000, 1, 1, 1)
        many = sigma.expand(len(y))
        error = edm.edm_loss(model.denoise(y + sigma * torch.randn_like(y), many), y, many, STD).mean().item()
        with torch.no_grad():
            assert model.uncertainty(sigma.log() / 4).exp().item() == pytest.approx(error, rel=0.1)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("net_type", NETS)
def test_block_features_of_the_denoiser(tmp_path, net_type, dtype):
    model = small_edm(net_type, tmp_path).eval()
    model.amp_dtype = dtype
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.002, 0.06, 0.14])
    D_x, features = model.denoise(x, sigma, return_features=True)
    torch.testing.assert_close(D_x, model.denoise(x, sigma))
    assert {name: tuple(f.shape) for name, f in features.items()} == {
        "out_1": (3, 32, 4, 4), "out_2": (3, 32, 8, 8), "out_3": (3, 32, 8, 8)}
    assert all(f.dtype == (dtype or torch.float32) and torch.isfinite(f).all() for f in features.values())


def test_u_is_not_part_of_the_network(tmp_path):
    model = small_edm("UNetE", tmp_path)
    assert not any("uncertainty" in name for name, _ in model.net.named_parameters())
    assert sum(p.numel() for p in model.uncertainty.parameters()) == 128


def test_cost_of_the_32x32_network(tmp_path):
    config = options.load_config(tiny_config(tmp_path))
    config["network"] = {"image_shape": [3, 32, 32], "attn_channels_per_head": 64}
    n_parameters, gflop = edm.cost(config)
    assert n_parameters == 39_509_888
    assert gflop == pytest.approx(42.6, abs=0.3)


@pytest.mark.parametrize("net_type", NETS)
def test_cost_is_what_torch_counts(tmp_path, net_type):
    """But for the gradient of the noise embedding's input, which nobody asks for."""
    config = options.load_config(tiny_config(tmp_path, net_type, dataset="folder", network={
        "image_shape": [3, 32, 16], "ch_mults": [1, 2, 3], "is_attn": [True, False, True], "n_blocks": 2}))
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = edm.build(config)
        y = torch.empty(1, 3, 32, 16)
        model(y, torch.empty(1), torch.empty_like(y))[0].sum().backward()
    n_parameters, gflop = edm.cost(config)
    assert gflop == pytest.approx(counter.get_total_flops() / 1e9, rel=1e-3)
    assert n_parameters == sum(p.numel() for p in model.net.parameters())
