"""Layers and blocks of Config C (EDM2 Fig. 17): the EDM block without biases, with one
initialization for all weights, group norm without mean subtraction, and cosine attention.

Activations are (B,C,H,W). Every hunk of `diff blockC.py blockE.py` is a change of the paper."""

import math
import torch
import torch.nn.functional as F
from torch import nn

# Scale to unit mean square over dimensions `dim`, for every norm (Eq. 29).
def normalize(x, dim, eps=1e-4):
    """Return x / (rms(x) + eps), rms over `dim` in fp32; shape and dtype of x are kept."""
    return Normalize.apply(x, x.view_as(x), dim, eps)

class Normalize(torch.autograd.Function):
    """y = s·x, s = 1/(‖x‖/√N + eps), has the gradients s·g and, by way of s, -x/‖x‖·s²/√N·Σg·x over
    `dim`, g = dL/dy: of x, given twice. By hand: autograd's cost twice the time and memory."""
    @staticmethod
    def forward(ctx, x, _, dim, eps):
        norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32)
        scale = 1 / (norm * math.sqrt(norm.numel() / x.numel()) + eps)
        ctx.save_for_backward(x, norm, scale)
        ctx.dim = dim
        return x * as_factor(scale, x)

    @staticmethod
    def backward(ctx, g):
        x, norm, scale = ctx.saved_tensors
        wide = x.float()                                        # float16 could overflow.
        slope = -(g * wide).sum(ctx.dim, keepdim=True) * (scale * scale)
        slope = slope * math.sqrt(norm.numel() / x.numel())
        norm = norm.masked_fill(norm == 0, math.inf)
        through_scale = (wide / as_factor(norm, wide)).mul_(as_factor(slope, wide)).to(x.dtype)
        return g * as_factor(scale, x), through_scale, None, None

def as_factor(scale, x):
    """scale in the dtype of x; of a group one for each channel: so the product is vectorized."""
    scale = scale.to(x.dtype)
    return scale.expand(-1, -1, x.shape[2], -1, -1).contiguous() if x.ndim == 5 else scale

# Learned layers, without biases.
def uniform(*shape):
    """Weights (out,in,...) ~ U(±1/√fan_in), PyTorch's own, for every layer, none from zeros."""
    limit = 1 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(shape).uniform_(-limit, limit)

class Linear(nn.Module):
    """Linear layer, (B,in) to (B,out)."""
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.weight = nn.Parameter(uniform(out_channels, in_channels))

    def forward(self, x):
        return F.linear(x, self.weight)

class Conv2d(nn.Module):
    """Convolution with an odd kernel that keeps the resolution, (B,in,H,W) to (B,out,H,W)."""
    def __init__(self, in_channels, out_channels, kernel_size):
        super().__init__()
        self.weight = nn.Parameter(uniform(out_channels, in_channels, kernel_size, kernel_size))

    def forward(self, x):
        return F.conv2d(x, self.weight, padding=self.weight.shape[-1] // 2)

# Fixed functions.
class GroupNorm(nn.Module):
    """Group norm without mean subtraction, learned scale or bias (Eq. 29), in at most `groups`
    groups of 4 channels or more (EDM's rule). ValueError where they do not divide the channels."""
    def __init__(self, channels, groups=32):
        super().__init__()
        self.groups = min(groups, channels // 4)
        if self.groups == 0 or channels % self.groups:
            raise ValueError(f"{channels} channels: group norm needs multiples of 32 (<128: of 4)")

    def forward(self, x):
        return normalize(x.unflatten(1, (self.groups, -1)), dim=(2, 3, 4)).flatten(1, 2)

class Fourier(nn.Module):
    """Fourier features, (B,) to (B,channels) in fp32: cos(2π(f·c + φ)), f ~ N(0,1), φ ~ U(0,1)."""
    def __init__(self, channels):
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels))
        self.register_buffer("phases", torch.rand(channels))

    def forward(self, c):
        return torch.cos(math.tau * (c.float()[:, None] * self.freqs + self.phases))

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
        return x + self.proj(y)

# U-Net block (Fig. 17): encoder and decoder blocks are the same thing.
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
    ):
        super().__init__()
        self.dropout, self.resample_mode = dropout, resample_mode
        self.norm0 = GroupNorm(in_channels)
        self.conv0 = Conv2d(in_channels, out_channels, 3)
        self.emb = Linear(emb_channels, out_channels)
        self.norm1 = GroupNorm(out_channels)
        self.conv1 = Conv2d(out_channels, out_channels, 3)
        self.skip = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.attention = Attention(out_channels, channels_per_head) if attention else None

    def forward(self, x, emb):
        # Residual branch.
        y = self.conv0(resample(F.silu(self.norm0(x)), self.resample_mode))
        y = self.norm1(y) * (1 + self.emb(emb))[:, :, None, None]
        y = self.conv1(F.dropout(F.silu(y), self.dropout, self.training))
        # Main branch.
        x = resample(x, self.resample_mode)
        if self.skip is not None:
            x = self.skip(x)
        # Join.
        x = x + y
        if self.attention is not None:
            x = self.attention(x)
        return x
