"""The three networks: parameter counts, magnitudes, precision, features."""

import math
from types import SimpleNamespace
import pytest
import torch
from conftest import NETS
import blockC
import blockE
import blockG
from edm2.config import Diffusion, Network
from edm2.diffusion import EDM, NETWORKS

SMALL = {"image_shape": (3, 16, 16), "n_channels": 32, "ch_mults": (1, 2), "is_attn": (False, True),
         "attn_channels_per_head": 16, "dropout": 0.0, "n_blocks": 2}
UNIT = pytest.approx(1, rel=0.02)

def build(net_type, **changes):
    torch.manual_seed(0)
    return getattr(NETWORKS[net_type], net_type)(**SMALL | changes)

def inputs(n=2):
    return torch.randn(n, 3, 16, 16), torch.randn(n)

def mean_square(x, *dim):
    return x.float().square().mean(dim) if dim else x.float().square().mean().item()

@pytest.mark.parametrize(("size", "counts"), [
    ({}, (39_509_888, 39_509_888, 39_542_685)),
    ({"image_shape": (3, 64, 64), "n_blocks": 5, "is_attn": (False, False, True, False)},
     (62_414_720, 62_414_720, 62_447_533)),
    ({"image_shape": (3, 64, 64), "n_channels": 192, "ch_mults": (1, 2, 3, 4), "n_blocks": 4,
      "is_attn": (False, False, True, True)}, (277_045_056, 277_045_056, 279_441_253))])
def test_parameter_counts(size, counts):
    for net_type, count in zip(NETS, counts, strict=True):
        with torch.device("meta"):
            nets = [getattr(NETWORKS[net_type], net_type)(**size, **more)
                    for more in ({}, {"label_dim": 10}, {"label_dim": 1000}, {"augment_dim": 9})]
        width, is_g = 4 * size.get("n_channels", 128), net_type == "UNetG"
        assert [sum(p.numel() for p in net.parameters() if p.requires_grad) for net in nets] == [
            count, count + 10 * width, count + 1000 * width, count + 9 * width + is_g], net_type

def test_mp_functions_keep_unit_mean_square():
    """mp_sum also weighs the branch, mp_cat gives both equal shares (t = 0.5)."""
    a, b = torch.randn(2, 1_000_000)
    for t in (0.3, 0.5, 0.8):
        y, weight = blockG.mp_sum(a, b, t), t / math.sqrt((1 - t) ** 2 + t ** 2)
        assert mean_square(y) == UNIT and (y * b).mean().item() == pytest.approx(weight, abs=0.01)
    torch.testing.assert_close(blockG.mp_sum(a, b), (0.7 * a + 0.3 * b) / math.sqrt(0.58))
    for widths in ((64, 64), (256, 128), (32, 96)):
        y = blockG.mp_cat(*(torch.randn(64, width, 16, 16) for width in widths))
        energy_a, energy_b = (part.square().sum().item() for part in y.split(widths, dim=1))
        assert mean_square(y) == UNIT and energy_a / energy_b == UNIT
    assert mean_square(blockG.mp_silu(a)) == UNIT
    features = blockG.Fourier(200_000)(torch.tensor([-1.55, 0.0, 1.1]))
    assert features.dtype == torch.float32 and all(mean_square(row) == UNIT for row in features)

@pytest.mark.parametrize("block", [blockE, blockG])
def test_mp_layers_keep_unit_mean_square_and_blocks_clip(block):
    conv, linear = block.Conv2d(64, 2048, 3).eval(), block.Linear(1024, 2048).eval()
    inner = conv(torch.randn(512, 64, 4, 4))[:, :, 1:-1, 1:-1]      # Away from the zero padding.
    assert mean_square(inner) == UNIT and mean_square(linear(torch.randn(1024, 1024))) == UNIT
    module = block.Block(32, 32, 64, **({"decoder": True} if block is blockG else {})).eval()
    assert module(torch.full((1, 32, 4, 4), 1000.0), torch.randn(1, 64)).abs().max() == 256

def test_resample():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert blockC.resample(x, "down").flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert torch.equal(blockC.resample(x, "up")[0, 0, :2, :2], torch.zeros(2, 2))
    assert blockC.resample(x, None) is x

def composed(x, dim, eps=1e-4, gain=1):
    """normalize of PyTorch's functions, in fp32, with autograd's gradient."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32)
    rms = norm * math.sqrt(norm.numel() / x.numel())
    return (x.float() * (gain / (rms + eps))).to(x.dtype)

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("block", "shape", "dim", "gain"), [
    *((block, (4, 8, 8, 6, 6), (2, 3, 4), 1) for block in (blockC, blockE)),        # Groups,
    *((block, (2, 3, 4, 36, 16), -1, 1) for block in (blockC, blockE, blockG)),     # heads,
    (blockG, (4, 64, 6, 6), 1, 1),                                                  # pixels,
    *((block, (48, 32, *kernel), (1, 2, 3)[:1 + len(kernel)], 0.1) for block in (blockE, blockG)
      for kernel in ((3, 3), ()))])                                                 # weights.
def test_the_gradient_of_normalize_is_autograd_s(block, shape, dim, gain, dtype):
    """Bit for bit in fp32, where x has other gradients too; to rounding in half precision."""
    x, g, found = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), []
    for function in (composed, block.normalize):
        leaf = x.clone().requires_grad_()
        inner = leaf * 1
        y = function(inner, dim, **({"gain": gain} if gain != 1 else {}))
        (y * g + 3 * inner).sum().backward()
        found.append((y.detach(), leaf.grad))
    for old, new in zip(*found, strict=True):
        assert old.dtype == new.dtype == dtype and old.stride() == new.stride()
        if dtype == torch.float32:
            assert torch.equal(old, new)
        else:
            error = (old - new).float().norm() / old.float().norm()
            assert error < (1e-2 if dtype == torch.bfloat16 else 1e-3), error

def test_normalize_and_group_norm_give_unit_mean_square():
    """With the eps of the paper, EDM's number of groups, and no mean subtracted."""
    y = blockC.normalize(7 * torch.randn(4, 64, 8, 8), dim=1)
    torch.testing.assert_close(mean_square(y, 1), torch.ones(4, 8, 8), rtol=1e-3, atol=0)
    w = torch.randn(5, 30)
    expected = w * math.sqrt(30) / (w.norm(dim=1, keepdim=True) + 1e-4 * math.sqrt(30))
    torch.testing.assert_close(blockE.normalize(w, dim=1), expected)
    zeros = torch.zeros(2, 4, requires_grad=True)
    blockC.normalize(zeros, 1).sum().backward()
    assert torch.isfinite(zeros.grad).all()                         # No NaN from zeros.
    x = torch.full((2, 64, 4, 4), 5.0)
    torch.testing.assert_close(blockC.GroupNorm(64)(x), torch.ones_like(x), rtol=1e-3, atol=0)
    groups = blockC.GroupNorm(64)(torch.randn(2, 64, 4, 4) + 3).unflatten(1, (16, 4))
    found = mean_square(groups, 2, 3, 4)            # Of min(32, 64 // 4) groups of 4 channels.
    torch.testing.assert_close(found, torch.ones(2, 16), rtol=1e-3, atol=0)
    assert groups.mean() > 0.9
    for channels, count in ((16, 4), (64, 16), (128, 32), (512, 32)):
        assert blockC.GroupNorm(channels).groups == count
        assert blockC.GroupNorm(channels, 8).groups == min(8, channels // 4)

def test_activations_leave_every_block_of_g_at_unit_magnitude():
    torch.manual_seed(0)
    net = NETWORKS["UNetG"].UNetG(attn_channels_per_head=64).eval()    # The shipped 32x32 network.
    found = {}
    for name, module in net.named_modules():
        if isinstance(module, blockG.Block):
            module.register_forward_hook(
                lambda m, args, out, name=name: found.update({name: math.sqrt(mean_square(out))}))
    with torch.no_grad():
        net(torch.randn(4, 3, 32, 32), torch.randn(4))
    assert len(found) == 11 + 2 + 15 and all(0.75 < m < 1.25 for m in found.values()), found

@pytest.mark.parametrize("net_type", ["UNetE", "UNetG"])
def test_forced_weight_normalization(net_type):
    """In training alone."""
    net = build(net_type).train()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(3.7)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net.eval()(*inputs())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    net.train()(*inputs())
    owned = [m.weight for m in net.modules()
             if isinstance(getattr(m, "weight", None), torch.nn.Parameter)]
    gains = [p for p in net.parameters() if p.ndim == 0]
    assert len(owned) + len(gains) == len(list(net.parameters()))
    for weight in owned:
        found = mean_square(weight, *range(1, weight.ndim))
        torch.testing.assert_close(found, torch.ones_like(found), rtol=0, atol=1e-3)
    # The gradient has no component along a weight vector (up to eps).
    net.encoder[0](torch.randn(1, 32, 8, 8), torch.randn(1, 128)).sum().backward()
    w = net.encoder[0].conv0.weight
    along = (w * w.grad).flatten(1).sum(1).abs()
    norms = w.flatten(1).norm(dim=1) * w.grad.flatten(1).norm(dim=1)
    assert (along < 1e-3 * norms + 1e-9).all()

def test_initialization():
    for p in build("UNetC").parameters():           # U(±1/√fan_in), none from zeros.
        bound = 1 / math.sqrt(p[0].numel())
        assert p.abs().max() <= bound
        assert p.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)
    g = build("UNetG")
    assert all(p == 0 for p in g.parameters() if p.ndim == 0)       # Gains.
    assert all(p.std().item() == pytest.approx(1, rel=0.15) for p in g.parameters() if p.ndim > 0)
    assert (g(*inputs()) == 0).all()
    for net_type in NETS:
        assert not any(name.endswith("bias") for name, _ in build(net_type).named_parameters())

@pytest.mark.parametrize("block", [blockC, blockE, blockG])
def test_attention_is_softmax_of_unit_magnitude_queries_and_keys(block):
    torch.manual_seed(0)
    attention, x = block.Attention(32, 16).eval(), torch.randn(2, 32, 3, 5)
    # (B, qkv, heads, channels per head, pixels)
    qkv = attention.qkv(x).flatten(2).reshape(2, 3, 2, 16, 15)
    q, k, v = (qkv[:, i] / qkv[:, i].square().mean(2, keepdim=True).sqrt() for i in range(3))
    weight = torch.softmax(torch.einsum("bhcq,bhck->bhqk", q, k) / math.sqrt(16), dim=-1)
    y = attention.proj(torch.einsum("bhqk,bhck->bhcq", weight, v).reshape(2, 32, 3, 5))
    expected = (0.7 * x + 0.3 * y) / math.sqrt(0.58) if block is blockG else x + y
    torch.testing.assert_close(attention(x), expected, rtol=1e-3, atol=1e-3)

@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("net_type", NETS)
def test_features_are_the_decoder_blocks_in_order(net_type, dtype):
    """Of the denoiser; in channels_last they are the same and stay so."""
    config = SimpleNamespace(diffusion=Diffusion(), network=Network(image_shape=[3, 16, 16]))
    model = EDM(build(net_type).eval(), None, config, dtype)
    x, sigma = torch.randn(3, 3, 16, 16), torch.tensor([0.002, 0.06, 0.14])
    F_x = model.net(x, sigma)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=memory_format)
        torch.testing.assert_close(model.net(x, sigma), F_x, rtol=1e-4, atol=1e-4)
        D_x, features = model.denoise(x, sigma, return_features=True)
        torch.testing.assert_close(D_x, model.denoise(x, sigma))
        assert D_x.shape == x.shape and D_x.dtype == torch.float32
        assert [(name, tuple(f.shape[1:])) for name, f in features.items()] == [
            ("out_1", (64, 8, 8)), ("out_2", (64, 8, 8)), ("out_3", (64, 16, 16)),
            ("out_4", (32, 16, 16)), ("out_5", (32, 16, 16))]
        for name, f in features.items():
            assert f.dtype == (dtype or torch.float32) and torch.isfinite(f).all()
            assert f.is_contiguous(memory_format=memory_format), name

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("net_type", NETS)
def test_autocast_keeps_the_main_path_in_reduced_precision(net_type, dtype):
    net, seen = build(net_type), {}
    for name, module in net.named_modules():
        if type(module).__name__ in ("Block", "Conv2d", "Attention", "GroupNorm", "Fourier"):
            module.register_forward_hook(
                lambda m, args, out, name=name: seen.update({name: out.dtype}))
    with torch.autocast("cpu", dtype=dtype):
        assert torch.isfinite(net(*inputs())).all()
    assert seen.pop("fourier") == torch.float32
    assert set(seen.values()) == {dtype}, {k: v for k, v in seen.items() if v != dtype}

@pytest.mark.parametrize(("net_type", "changes", "word"), [
    ("UNetC", {"n_channels": 200}, "group norm"), ("UNetE", {"n_channels": 3}, "group norm"),
    ("UNetG", {"attn_channels_per_head": 48}, "attn_channels_per_head")])
def test_widths_that_do_not_divide_are_refused(net_type, changes, word):
    with pytest.raises(ValueError, match=word):
        build(net_type, **changes)

def test_dropout_only_in_training():
    net, x = build("UNetC", dropout=0.5), inputs(1)
    assert not torch.equal(net(*x), net(*x))
    assert torch.equal(net.eval()(*x), net(*x))
