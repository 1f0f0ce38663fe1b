"""U-Net of Config E of EDM2 (changed by blockE.py): the raw network F of the EDM preconditioning.

Every hunk of `diff unetC.py unetE.py` and `diff unetE.py unetG.py` is one change of the paper."""

import math
import torch
import torch.nn.functional as F
from torch import nn
from blockE import Block, Conv2d, Fourier, GroupNorm, Linear

class UNetE(nn.Module):
    """F(x; c_noise), (B,C,H,W) and (B,) to (B,C,H,W). ValueError: widths that do not divide."""
    def __init__(self,
        image_shape = (3, 32, 32),              # Channels, height, width of an image.
        n_channels = 128,                       # Base width.
        ch_mults = (1, 2, 2, 2),                # Width of each level, in multiples of n_channels.
        is_attn = (False, True, False, False),  # Levels with self-attention.
        attn_channels_per_head = None,          # Width of an attention head; None: one head.
        dropout = 0.1,                          # Dropout probability in every block.
        n_blocks = 3,                           # Blocks per level; the encoder's last downsamples.
        label_dim = 0,                          # Number of classes; 0: unconditional.
        augment_dim = 0,                        # Numbers that tell of an augmentation; 0: none.
    ):
        super().__init__()
        emb_channels = 4 * n_channels
        widths = [n_channels * mult for mult in ch_mults]

        def block(in_channels, out_channels, attention=False, resample_mode=None):
            return Block(in_channels, out_channels, emb_channels, dropout, resample_mode,
                         attention, attn_channels_per_head)

        # Noise embedding.
        self.fourier = Fourier(n_channels)
        self.emb0 = Linear(n_channels, emb_channels)
        self.emb1 = Linear(emb_channels, emb_channels)
        self.emb_label = Linear(label_dim, emb_channels) if label_dim else None
        self.emb_augment = Linear(augment_dim, emb_channels) if augment_dim else None

        # Encoder: every output, the stem's too, is a skip.
        self.stem = Conv2d(image_shape[0] + 1, n_channels, 3)
        self.encoder = nn.ModuleList()
        channels, skips = n_channels, [n_channels]
        for level, width in enumerate(widths):
            for _ in range(n_blocks - 1):
                self.encoder.append(block(channels, width, is_attn[level]))
                channels = width
                skips.append(channels)
            if level < len(widths) - 1:
                self.encoder.append(block(channels, channels, resample_mode="down"))
                skips.append(channels)

        # Middle.
        self.middle = nn.ModuleList([block(channels, channels, True), block(channels, channels)])

        # Decoder: all blocks but the upsampling ones take a skip.
        self.decoder = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(n_blocks):
                self.decoder.append(block(channels + skips.pop(), width, is_attn[level]))
                channels = width
            if level > 0:
                self.decoder.append(block(channels, channels, resample_mode="up"))

        # Output.
        self.out_norm = GroupNorm(channels, groups=8)
        self.out_conv = Conv2d(channels, image_shape[0], 3)

    def forward(self, x, c_noise, label=None, augment=None, return_features=False):
        """F (B,C,H,W), given label (B,label_dim), one-hot or zeros, and augment (B,9) or None; with
        return_features also each decoder block's output, {"out_1": ..., ...}; with a block's name
        there, the decoder ends with it and F is None."""
        # Noise embedding.
        emb = F.silu(self.emb0(self.fourier(c_noise)))
        emb = self.emb1(emb)
        if self.emb_label is not None:
            emb = emb + self.emb_label(label * math.sqrt(label.shape[1]))
        if augment is not None:
            emb = emb + self.emb_augment(augment)
        emb = F.silu(emb)

        # Encoder. The channel of ones stands in for the biases.
        x = self.stem(torch.cat([x, torch.ones_like(x[:, :1])], dim=1))
        skips = [x]
        for block in self.encoder:
            x = block(x, emb)
            skips.append(x)

        # Middle.
        for block in self.middle:
            x = block(x, emb)

        # Decoder.
        features = {}
        for i, block in enumerate(self.decoder, 1):
            if block.resample_mode != "up":
                x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, emb)
            features[f"out_{i}"] = x
            if return_features == f"out_{i}":
                return None, features

        # Output.
        x = self.out_conv(F.silu(self.out_norm(x)))
        return (x, features) if return_features else x
