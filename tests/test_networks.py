"""The three networks: parameter counts, magnitudes, precision, features."""

import math

import pytest
import torch
from conftest import NETS

import blockC
import blockE
import blockG
from edm import NETWORKS

SMALL = {"image_shape": (3, 16, 16), "n_channels": 32, "ch_mults": (1, 2), "is_attn": (False, True),
         "attn_channels_per_head": 16, "dropout": 0.0, "n_blocks": 2}


def build(net_type, seed=0, **changes):
    torch.manual_seed(seed)
    return NETWORKS[net_type][0](**SMALL | changes)


def rms(x):
    return x.float().square().mean().sqrt().item()


SIZES = {
    "32x32": {},
    "64x64 Tiny ImageNet": {"image_shape": (3, 64, 64), "n_blocks": 5, "is_attn": (False, False, True, False)},
    "64x64 ImageNet": {"image_shape": (3, 64, 64), "n_channels": 192, "ch_mults": (1, 2, 3, 4), "n_blocks": 4,
                       "is_attn": (False, False, True, True)},
}
COUNTS = {
    "32x32": (39_509_888, 39_509_888, 39_542_685),
    "64x64 Tiny ImageNet": (62_414_720, 62_414_720, 62_447_533),
    "64x64 ImageNet": (277_045_056, 277_045_056, 279_441_253),
}


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts(size):
    for net_type, count in zip(NETS, COUNTS[size], strict=True):
        with torch.device("meta"):
            net = NETWORKS[net_type][0](**SIZES[size])
        assert sum(p.numel() for p in net.parameters() if p.requires_grad) == count, net_type


# ----------------------------------------------------------------------------------------------------------------------
# Magnitude-preserving functions.

def test_mp_silu_keeps_unit_mean_square():
    assert rms(blockG.mp_silu(torch.randn(1_000_000))) ** 2 == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("t", [0.3, 0.5, 0.8])
def test_mp_sum_keeps_unit_mean_square_and_weighs_the_branch(t):
    a, b = torch.randn(2, 1_000_000)
    y = blockG.mp_sum(a, b, t)
    assert rms(y) ** 2 == pytest.approx(1, rel=0.02)
    assert (y * b).mean().item() == pytest.approx(t / math.sqrt((1 - t) ** 2 + t ** 2), abs=0.01)


def test_mp_sum_default_weight():
    a, b = torch.randn(2, 1000)
    torch.testing.assert_close(blockG.mp_sum(a, b), (0.7 * a + 0.3 * b) / math.sqrt(0.58))


@pytest.mark.parametrize("widths", [(64, 64), (256, 128), (32, 96)])
def test_mp_cat_keeps_unit_mean_square_and_equal_shares(widths):
    a, b = (torch.randn(64, width, 16, 16) for width in widths)
    y = blockG.mp_cat(a, b)
    assert rms(y) ** 2 == pytest.approx(1, rel=0.02)
    energy_a, energy_b = (part.square().sum().item() for part in y.split(widths, dim=1))
    assert energy_a / energy_b == pytest.approx(1, rel=0.02)        # t = 0.5: equal contributions.


def test_mp_fourier_keeps_unit_mean_square():
    features = blockG.Fourier(200_000)(torch.tensor([-1.55, 0.0, 1.1]))
    for row in features:
        assert rms(row) ** 2 == pytest.approx(1, rel=0.02)
    assert features.dtype == torch.float32


@pytest.mark.parametrize("block", [blockE, blockG])
def test_mp_layers_keep_unit_mean_square(block):
    x = torch.randn(512, 64, 4, 4)
    conv, linear = block.Conv2d(64, 2048, 3).eval(), block.Linear(1024, 2048).eval()
    inner = conv(x)[:, :, 1:-1, 1:-1]                               # Away from the zero padding.
    assert rms(inner) ** 2 == pytest.approx(1, rel=0.02)
    assert rms(linear(torch.randn(1024, 1024))) ** 2 == pytest.approx(1, rel=0.02)


def test_normalize_gives_unit_mean_square_and_the_eps_of_the_paper():
    x = 7 * torch.randn(4, 64, 8, 8)
    y = blockC.normalize(x, dim=1)
    torch.testing.assert_close(y.square().mean(1), torch.ones(4, 8, 8), rtol=1e-3, atol=0)
    w = torch.randn(5, 30)
    expected = w * math.sqrt(30) / (w.norm(dim=1, keepdim=True) + 1e-4 * math.sqrt(30))
    torch.testing.assert_close(blockE.normalize(w, dim=1), expected)
    assert blockC.normalize(torch.zeros(2, 4, requires_grad=True), 1).sum().backward() is None    # No NaN from zeros.


def test_activations_leave_every_block_of_g_at_unit_magnitude():
    torch.manual_seed(0)
    net = NETWORKS["UNetG"][0](attn_channels_per_head=64).eval()        # The shipped 32x32 network.
    magnitudes = {}
    for name, module in net.named_modules():
        if isinstance(module, blockG.Block):
            module.register_forward_hook(lambda m, args, out, name=name: magnitudes.update({name: rms(out)}))
    with torch.no_grad():
        net(torch.randn(4, 3, 32, 32), torch.randn(4))
    assert len(magnitudes) == 11 + 2 + 15
    assert all(0.75 < m < 1.25 for m in magnitudes.values()), magnitudes


# ----------------------------------------------------------------------------------------------------------------------
# Weights.

@pytest.mark.parametrize("net_type", ["UNetE", "UNetG"])
def test_forced_weight_normalization(net_type):
    net = build(net_type).train()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(3.7)
    net(torch.randn(4, 3, 16, 16), torch.randn(4))
    owned = [m.weight for m in net.modules() if isinstance(getattr(m, "weight", None), torch.nn.Parameter)]
    gains = [p for p in net.parameters() if p.ndim == 0]
    assert len(owned) + len(gains) == len(list(net.parameters()))
    for weight in owned:
        mean_square = weight.square().mean(dim=tuple(range(1, weight.ndim)))
        torch.testing.assert_close(mean_square, torch.ones_like(mean_square), rtol=0, atol=1e-3)
    # The gradient has no component along a weight vector (up to eps).
    net.encoder[0](torch.randn(1, 32, 8, 8), torch.randn(1, 128)).sum().backward()
    w = net.encoder[0].conv0.weight
    along = (w * w.grad).flatten(1).sum(1).abs()
    assert (along < 1e-3 * w.flatten(1).norm(dim=1) * w.grad.flatten(1).norm(dim=1) + 1e-9).all()


@pytest.mark.parametrize("net_type", ["UNetE", "UNetG"])
def test_evaluation_leaves_the_weights_alone(net_type):
    net = build(net_type).eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net(torch.randn(1, 3, 16, 16), torch.randn(1))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_initialization():
    for p in build("UNetC").parameters():           # Uniform He, none from zeros.
        bound = math.sqrt(3 / p[0].numel())
        assert p.abs().max() <= bound
        assert p.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)
    g = build("UNetG")
    assert all(p == 0 for p in g.parameters() if p.ndim == 0)       # Gains.
    assert all(p.std().item() == pytest.approx(1, rel=0.15) for p in g.parameters() if p.ndim > 0)
    assert (g(torch.randn(2, 3, 16, 16), torch.randn(2)) == 0).all()
    assert not any(name.endswith("bias") for net_type in NETS for name, _ in build(net_type).named_parameters())


# ----------------------------------------------------------------------------------------------------------------------
# Norms, attention, resampling.

def test_group_norm_subtracts_no_mean():
    x = torch.full((2, 64, 4, 4), 5.0)
    torch.testing.assert_close(blockC.GroupNorm(64)(x), torch.ones_like(x), rtol=1e-3, atol=0)
    x = torch.randn(2, 64, 4, 4) + 3
    groups = blockC.GroupNorm(64)(x).unflatten(1, (16, 4))          # min(32, 64 // 4) groups of 4 channels.
    torch.testing.assert_close(groups.square().mean((2, 3, 4)), torch.ones(2, 16), rtol=1e-3, atol=0)
    assert groups.mean() > 0.9


@pytest.mark.parametrize(("channels", "groups"), [(16, 4), (64, 16), (128, 32), (512, 32)])
def test_group_count_is_edms_rule(channels, groups):
    assert blockC.GroupNorm(channels).groups == groups
    assert blockC.GroupNorm(channels, 8).groups == min(8, channels // 4)


@pytest.mark.parametrize("block", [blockC, blockE, blockG])
def test_attention_is_softmax_of_unit_magnitude_queries_and_keys(block):
    torch.manual_seed(0)
    attention = block.Attention(32, 16).eval()
    x = torch.randn(2, 32, 3, 5)
    qkv = attention.qkv(x).flatten(2).reshape(2, 3, 2, 16, 15)      # (B, qkv, heads, channels per head, pixels)
    q, k, v = (qkv[:, i] / qkv[:, i].square().mean(2, keepdim=True).sqrt() for i in range(3))
    weight = torch.softmax(torch.einsum("bhcq,bhck->bhqk", q, k) / math.sqrt(16), dim=-1)
    y = attention.proj(torch.einsum("bhqk,bhck->bhcq", weight, v).reshape(2, 32, 3, 5))
    expected = (0.7 * x + 0.3 * y) / math.sqrt(0.58) if block is blockG else x + y
    torch.testing.assert_close(attention(x), expected, rtol=1e-3, atol=1e-3)


def test_resample():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert blockC.resample(x, "down").flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert torch.equal(blockC.resample(x, "up")[0, 0, :2, :2], torch.zeros(2, 2))
    assert blockC.resample(x, None) is x


@pytest.mark.parametrize("block", [blockE, blockG])
def test_blocks_clip(block):
    x = torch.full((1, 32, 4, 4), 1000.0)
    module = block.Block(32, 32, 64, **({"decoder": True} if block is blockG else {})).eval()
    assert module(x, torch.randn(1, 64)).abs().max() == 256


# ----------------------------------------------------------------------------------------------------------------------
# The whole network.

@pytest.mark.parametrize("net_type", NETS)
def test_features_are_the_decoder_blocks_in_order(net_type):
    net = build(net_type).eval()
    x, c_noise = torch.randn(2, 3, 16, 16), torch.randn(2)
    F_x, features = net(x, c_noise, return_features=True)
    assert F_x.shape == x.shape
    torch.testing.assert_close(F_x, net(x, c_noise))
    assert {name: tuple(f.shape[1:]) for name, f in features.items()} == {
        "out_1": (64, 8, 8), "out_2": (64, 8, 8), "out_3": (64, 16, 16), "out_4": (32, 16, 16), "out_5": (32, 16, 16)}
    assert list(features) == [f"out_{i}" for i in range(1, 6)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("net_type", NETS)
def test_autocast_keeps_the_main_path_in_reduced_precision(net_type, dtype):
    net = build(net_type)
    seen = {}
    for name, module in net.named_modules():
        if type(module).__name__ in ("Block", "Conv2d", "Attention", "GroupNorm"):
            module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: out.dtype}))
        if type(module).__name__ == "Fourier":
            module.register_forward_hook(lambda m, args, out: seen.update(fourier=out.dtype))
    with torch.autocast("cpu", dtype=dtype):
        F_x = net(torch.randn(2, 3, 16, 16), torch.randn(2))
    assert seen.pop("fourier") == torch.float32
    assert set(seen.values()) == {dtype}, {k: v for k, v in seen.items() if v != dtype}
    assert torch.isfinite(F_x).all()


@pytest.mark.parametrize("net_type", NETS)
def test_channels_last_gives_the_same_and_stays(net_type):
    net = build(net_type).eval()
    x, c_noise = torch.randn(2, 3, 16, 16), torch.randn(2)
    expected, features = net(x, c_noise, return_features=True)
    net.to(memory_format=torch.channels_last)
    y, features = net(x, c_noise, return_features=True)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for name, feature in features.items():
        assert feature.is_contiguous(memory_format=torch.channels_last), name


@pytest.mark.parametrize(("net_type", "changes", "word"), [
    ("UNetC", {"n_channels": 200}, "group norm"), ("UNetE", {"n_channels": 3}, "group norm"),
    ("UNetG", {"attn_channels_per_head": 48}, "attn_channels_per_head")])
def test_widths_that_do_not_divide_are_refused(net_type, changes, word):
    with pytest.raises(ValueError, match=word):
        build(net_type, **changes)


def test_dropout_only_in_training():
    net = build("UNetC", dropout=0.5)
    x, c_noise = torch.randn(1, 3, 16, 16), torch.randn(1)
    assert not torch.equal(net(x, c_noise), net(x, c_noise))
    net.eval()
    assert torch.equal(net(x, c_noise), net(x, c_noise))
