"""Layers and blocks of Config G (EDM2 Fig. 21): Config E without group norms (Config F, B.6) and
with magnitude-preserving fixed functions (Config G, Eq. 68-104).

Activations are (B,C,H,W). Every hunk of `diff blockE.py blockG.py` is a change of the paper."""

import math
import torch
import torch.nn.functional as F
from torch import nn

# Scale to unit mean square over dimensions `dim`, for every norm (Eq. 29) and weight (Eq. 47).
def normalize(x, dim, eps=1e-4, gain=1):
    """Return gain · x / (rms(x) + eps), rms over `dim` in fp32; shape and dtype of x are kept."""
    return Normalize.apply(x, x.view_as(x), dim, eps, gain)

def unit_scale(x, dim, eps=1e-4):
    """‖x‖ and the factor of normalize, in fp32, s = 1 / (‖x‖/√N + eps), of size 1 along `dim`."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32)
    return norm, 1 / (norm * math.sqrt(norm.numel() / x.numel()) + eps)

class Normalize(torch.autograd.Function):
    """y = a·s·x, a the gain, has the gradients a·s·g and, by way of s, -a·x/‖x‖·s²/√N·Σg·x over
    `dim`, g = dL/dy: of x, given twice. By hand: autograd's cost twice the time and memory."""
    @staticmethod
    def forward(ctx, x, _, dim, eps, gain):
        norm, scale = unit_scale(x, dim, eps)
        ctx.save_for_backward(x, norm, scale)
        ctx.dim, ctx.gain = dim, gain
        return x * (scale * gain).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        x, norm, scale = ctx.saved_tensors
        wide = x.float()                                        # float16 could overflow.
        slope = -(g * wide).sum(ctx.dim, keepdim=True) * ctx.gain
        slope = slope * (scale * scale) * math.sqrt(norm.numel() / x.numel())
        norm = norm.masked_fill(norm == 0, math.inf)
        through_scale = (wide / norm).mul_(slope).to(x.dtype)
        return g * (scale * ctx.gain).to(x.dtype), through_scale, None, None, None

# Learned layers, without biases.
def magnitude_preserving(weight, training):
    """Return normalize(weight)/√fan_in, weight (out,in,...), per output in fp32 (Config D, Eq. 47).
    In training the stored weight is itself replaced by its normalized self (Config E, forced
    weight normalization, Eq. 60-67 and Alg. 1): so the gradient is orthogonal to it and the
    learning rate alone sets its speed of rotation."""
    dim = tuple(range(1, weight.ndim))
    if training:
        stored = weight.detach()  # Not no_grad: torch.compile's gradient would see the old weight.
        stored.mul_(unit_scale(stored, dim)[1])
    return normalize(weight, dim, gain=1 / math.sqrt(weight[0].numel()))

class Linear(nn.Module):
    """Magnitude-preserving linear layer (Eq. 47), (B,in) to (B,out)."""
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels))     # Alg. 1

    def forward(self, x):
        return F.linear(x, magnitude_preserving(self.weight, self.training))

class Conv2d(nn.Module):
    """Magnitude-preserving convolution (Eq. 47) with an odd kernel, (B,in,H,W) to (B,out,H,W)."""
    def __init__(self, in_channels, out_channels, kernel_size):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))

    def forward(self, x):
        weight = magnitude_preserving(self.weight, self.training)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)

# Fixed functions.
def mp_silu(x):
    """Magnitude-preserving SiLU (Eq. 81): silu(x)/0.596, of unit mean square for x ~ N(0,1)."""
    return F.silu(x).div_(0.596)

def mp_sum(a, b, t=0.3):
    """Magnitude-preserving sum of path a and branch b: ((1-t)·a + t·b)/√((1-t)² + t²) (Eq. 88)."""
    return torch.lerp(a, b, t).div_(math.sqrt((1 - t) ** 2 + t ** 2))

def mp_cat(a, b, t=0.5):
    """Magnitude-preserving concatenation of a and b along channels, b with weight t (Eq. 103)."""
    Na, Nb = a.shape[1], b.shape[1]
    gain = math.sqrt((Na + Nb) / ((1 - t) ** 2 + t ** 2))
    return torch.cat([a * (gain * (1 - t) / math.sqrt(Na)), b * (gain * t / math.sqrt(Nb))], dim=1)

class Fourier(nn.Module):
    """Fourier features, (B,) to (B,channels) in fp32: √2·cos(2π(f·c + φ)), random f, φ (Eq. 75)."""
    def __init__(self, channels):
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels))
        self.register_buffer("phases", torch.rand(channels))

    def forward(self, c):
        return math.sqrt(2) * torch.cos(math.tau * (c.float()[:, None] * self.freqs + self.phases))

def resample(x, mode):
    """(B,C,H,W) at half ("down": 2x2 mean), twice ("up": nearest) or the same resolution (None)."""
    if mode == "down":
        return F.avg_pool2d(x, 2)
    if mode == "up":
        return F.interpolate(x, scale_factor=2, mode="nearest").to(x.dtype)  # fp32 on CUDA.
    return x

# Self-attention over the pixels, queries, keys and values normalized (cosine attention, Eq. 30-34).
class Attention(nn.Module):
    """Multi-head self-attention joined to its input, (B,C,H,W) to the same; one head where
    channels_per_head is None. Raises ValueError where the heads do not divide the channels."""
    def __init__(self, channels, channels_per_head=None):
        super().__init__()
        self.channels_per_head = channels_per_head or channels
        if channels % self.channels_per_head:
            raise ValueError(f"attn_channels_per_head {channels_per_head} cannot divide {channels}")
        self.qkv = Conv2d(channels, 3 * channels, 1)
        self.proj = Conv2d(channels, channels, 1)

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(x).permute(0, 2, 3, 1).reshape(B, H * W, 3, -1, self.channels_per_head)
        q, k, v = normalize(qkv, dim=-1).permute(2, 0, 3, 1, 4)  # (B,heads,H·W,channels_per_head)
        y = F.scaled_dot_product_attention(q, k, v)              # softmax(q·k/√channels_per_head)·v
        y = y.transpose(1, 2).reshape(B, H, W, C).permute(0, 3, 1, 2)
        return mp_sum(x, self.proj(y))                           # Eq. 88

# U-Net block (Fig. 21): encoder blocks begin with a pixel norm, decoder blocks do not (Config F).
class Block(nn.Module):
    """Residual block, (B,in,H,W) and embedding (B,emb) to (B,out,H',W') as resample_mode says."""
    def __init__(self,
        in_channels,                # Channels of the input.
        out_channels,               # Channels of the output.
        emb_channels,               # Width of the noise embedding.
        dropout = 0.0,              # Dropout probability before the last convolution.
        resample_mode = None,       # None, "down" or "up".
        attention = False,          # Self-attention after the residual sum?
        channels_per_head = None,   # Width of an attention head; None: one head.
        decoder = False,            # Decoder kind: no pixel norm, residual branch on unprojected x.
    ):
        super().__init__()
        self.dropout, self.resample_mode = dropout, resample_mode
        self.decoder = decoder
        self.conv0 = Conv2d(in_channels if decoder else out_channels, out_channels, 3)
        self.emb = Linear(emb_channels, out_channels)
        self.gain = nn.Parameter(torch.zeros([]))  # Of the conditioning, from 0 (Config G, Fig. 21)
        self.conv1 = Conv2d(out_channels, out_channels, 3)
        self.skip = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.attention = Attention(out_channels, channels_per_head) if attention else None

    def forward(self, x, emb):
        # Main branch of the encoder: pixel norm (Config F, Eq. 30).
        x = resample(x, self.resample_mode)
        if not self.decoder:
            if self.skip is not None:
                x = self.skip(x)
            x = normalize(x, dim=1)
        # Residual branch.
        y = self.conv0(mp_silu(x))
        y = y * (1 + self.gain * self.emb(emb))[:, :, None, None]
        y = self.conv1(F.dropout(mp_silu(y), self.dropout, self.training))
        # Main branch of the decoder.
        if self.decoder and self.skip is not None:
            x = self.skip(x)
        # Join.
        x = mp_sum(x, y)                            # Eq. 88
        if self.attention is not None:
            x = self.attention(x)
        return F.hardtanh_(x, -256, 256)            # Clipped: keeps float16 in range
