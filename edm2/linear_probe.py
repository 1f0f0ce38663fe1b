"""Linear probe: linear classifiers on the block features of the denoiser (DDAE, arXiv 2303.09769).

The network runs over the images once per draw of noise and flips, up to the last block asked for;
its features are kept, and the epochs of the classifiers take turns on the draws."""

import itertools
from dataclasses import dataclass
import torch
import torch.nn.functional as F
from edm2 import data, diffusion, distributed
from edm2.errors import UserError

DRAW = 256                              # Images whose noise is drawn together, and pass together.
TRAIN, TEST, HEADS, ORDER = 1, 2, 3, 4  # What seeds are for.

def block_widths(config):
    """The decoder blocks in order of execution and their channels, {"out_1": 256, ...}."""
    with torch.device("meta"), torch.no_grad():
        x = torch.empty(1, *config.network.image_shape)
        _, features = diffusion.build(config).denoise(x, torch.empty(1), return_features=True)
    return {name: feature.shape[1] for name, feature in features.items()}

def check_blocks(config, blocks, name="linear.blockname"):
    """Raise UserError for a block that the config's network does not have."""
    widths = block_widths(config)
    if unknown := [block for block in blocks if block not in widths]:
        raise UserError(f"{name} {unknown[0]}: the network's blocks are {', '.join(widths)}")

def sigma_of(config, timestep):
    """The noise level of a timestep t, which counts the sampler's 18 steps from their clean end."""
    return float(diffusion.sigma_steps(config.diffusion)[18 - timestep])

@dataclass
class BlockFeatures:
    """A process's share of n images: values (passes,m,d) float32, the blocks' features side by
    side, labels (m,), and row (n,), where an image lies in the share; -1: with another process."""
    n: int
    values: torch.Tensor
    labels: torch.Tensor
    row: torch.Tensor

class Probe:
    """Test accuracies of linear layers on a denoiser's features.
    sets: {TRAIN: (images (N,C,H,W) uint8, labels (N,) int64), TEST: ...}. seed: of noise, flips,
    order and layers. passes: draws of noise and flips of each training image."""
    def __init__(self, config, denoiser, sets, seed=0, passes=5, batch_gpu=None):
        self.config, self.denoiser, self.sets = config, denoiser, sets
        self.seed, self.passes, self.batch_gpu = seed, passes, batch_gpu or DRAW
        self.device = next(denoiser.parameters()).device
        self.widths = block_widths(config)
        self.n_classes, self.n_tested = (int(labels.max()) + 1 for _, labels in sets.values())

    def accuracies(self, timestep, blocks):
        """The accuracy in per cent of each of the decoder blocks, at a timestep's noise level."""
        if self.n_classes < 2 or not 0 < self.n_tested <= self.n_classes:
            raise UserError(f"a probe needs two classes or more, the same in both sets, not "
                            f"{self.n_classes} and {self.n_tested}, as in {self.config.data_root}")
        train, test = (self.extract(kind, timestep, blocks) for kind in (TRAIN, TEST))
        return self.classify(train, test, timestep, blocks)

    @torch.no_grad()
    def extract(self, kind, timestep, blocks):
        """The BlockFeatures of the TRAIN or TEST set: means over the positions of each block. Noise
        and, in TRAIN, flips, where `linear` says so, are from (seed, pass, image // DRAW)."""
        (images, labels), n_passes = self.sets[kind], self.passes if kind == TRAIN else 1
        n, flip = len(images), 0.5 if kind == TRAIN and self.config.linear.flip else 0
        starts = range(distributed.rank() * DRAW, n, distributed.world_size() * DRAW)
        width, row = sum(self.widths[block] for block in blocks), torch.full([n], -1)
        share = torch.arange(n)
        share = share[share // DRAW % distributed.world_size() == distributed.rank()]
        row[share] = torch.arange(len(share))
        place = data.placement(4 * n_passes * len(share) * width, self.device)
        values = torch.empty(n_passes, len(share), width, device=place)
        images = images.to(data.placement(images.nbytes, self.device))
        sigma, g = sigma_of(self.config, timestep), torch.Generator(self.device)
        with distributed.progress(n_passes * len(share), "img", desc="features") as bar:
            for draw, start in itertools.product(range(n_passes), starts):
                g.manual_seed(diffusion.derive_seed(self.seed, draw, start, kind))
                index = torch.arange(start, start + DRAW).clamp(max=n - 1)     # For torch.compile.
                noise = torch.randn(DRAW, *images.shape[1:], generator=g, device=self.device)
                flips = torch.rand(DRAW, generator=g, device=self.device) < flip
                y = data.batch(images, index, self.device, flips)
                first, m = row[start], min(DRAW, n - start)
                found = self.pooled(y + sigma * noise, sigma, blocks)[:m]
                values[draw, first:first + m] = found.to(place)
                bar.update(m)
        if distributed.all_reduce((~values.sum().isfinite()).float().to(self.device)) > 0:
            raise UserError("the features are NaN or Inf: diverged, or try --amp_dtype bfloat16")
        return BlockFeatures(n, values, labels[share].to(self.device), row)

    def pooled(self, x, sigma, blocks):
        """The blocks' features of noisy images x (B,C,H,W): (B,d), one beside the other."""
        last, found = max(blocks, key=list(self.widths).index), []      # The network ends there.
        for part in x.split(self.batch_gpu):
            sigmas = torch.full([len(part)], sigma, device=x.device)
            _, features = self.denoiser.denoise(part, sigmas, return_features=last)
            found.append(torch.cat([features[block].float().mean((2, 3)) for block in blocks], 1))
        return torch.cat(found)

    def classify(self, train, test, timestep, blocks):
        """The test accuracies (%) of a linear layer per block, by Adam, its rate cosine to 0."""
        linear, widths, layers = self.config.linear, [self.widths[block] for block in blocks], []
        for block, width in zip(blocks, widths, strict=True):
            # As torch.nn.Linear begins; the same whatever other blocks there are.
            seed = self.seed, HEADS, timestep, list(self.widths).index(block) + 1
            g = torch.Generator().manual_seed(diffusion.derive_seed(*seed))
            layers.append([torch.empty(shape).uniform_(-width ** -0.5, width ** -0.5, generator=g)
                           .to(self.device).requires_grad_()
                           for shape in ([width, self.n_classes], [self.n_classes])])
        optimizer = torch.optim.Adam(itertools.chain(*layers), lr=linear.lrate, fused=True)
        steps = linear.n_epoch * -(-train.n // linear.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

        def logits(x):                      # Of each layer, (B,classes).
            parts = x.to(self.device).split(widths, 1)
            return [torch.addmm(b, part, w) for part, (w, b) in zip(parts, layers, strict=True)]

        for rows, draws, size in self.batches(train, steps):
            # Each process takes the images that it holds: their gradients' sum is the batch's.
            y = train.labels[rows.to(self.device)]
            optimizer.zero_grad()
            (sum(F.cross_entropy(z, y, reduction="sum") for z in logits(train.values[draws, rows]))
             / size).backward()
            for p in itertools.chain(*layers):
                distributed.all_reduce(p.grad)
            optimizer.step()
            schedule.step()
        correct = torch.zeros(len(blocks), dtype=torch.int64, device=self.device)
        with torch.no_grad():
            for x, y in zip(test.values[0].split(1024), test.labels.split(1024), strict=True):
                correct += torch.stack([(z.argmax(-1) == y).sum() for z in logits(x)])
        return [100 * right / test.n for right in distributed.all_reduce(correct).tolist()]

    def batches(self, train, steps):
        """This process's rows of each batch, the next draw of each, and the batch's size."""
        linear, seed = self.config.linear, diffusion.derive_seed(self.seed, ORDER)
        with distributed.progress(steps, "step", desc="linear layers") as bar:
            for epoch in range(linear.n_epoch):
                for batch in data.epoch_order(train.n, seed, epoch).split(linear.batch_size):
                    mine = batch[train.row[batch] >= 0]
                    yield train.row[mine], (mine + epoch) % len(train.values), len(batch)
                    bar.update()
