"""What train.py shows and measures of its EMA: sample grids; held-out loss, FID, a probe."""

import math
from pathlib import Path
import numpy as np
import torch
from edm2 import data, diffusion, distributed, features, frechet, image_files, linear_probe
from edm2.errors import UserError, warn

LEVELS = np.geomspace(0.02, 20, 8)      # Noise levels of the held-out loss.
CHUNK = 64                              # Images whose noise is drawn together, and pass together.

def sample_grid(denoiser, images, labels, config, epoch):
    """Write n_sample samples above as many real images to save_dir/grids, with labels at most so
    many, a class a row; return that image."""
    numbers, n_columns = image_files.layout(config.n_sample, denoiser.label_dim)
    n, device = len(numbers), next(denoiser.parameters()).device
    samples = torch.zeros(n, *images.shape[1:], dtype=torch.uint8, device=device)
    mine = range(distributed.rank(), n, distributed.world_size())
    for part in (mine[i:i + CHUNK] for i in range(0, len(mine), CHUNK)):
        samples[list(part)] = diffusion.generate(denoiser, [numbers[i] for i in part], config.seed)
    classes = range(n // n_columns) if denoiser.label_dim else ()
    real = [(labels.cpu() == i).nonzero()[:, 0].repeat(n_columns)[:n_columns] for i in classes]
    real = torch.cat(real or [torch.arange(0, len(images), max(1, len(images) // n))[:n]])
    parts = distributed.all_reduce(samples), images[real.to(images.device)]
    image = torch.cat([image_files.grid(part.cpu(), n_columns, classes) for part in parts], dim=1)
    if distributed.rank() == 0:
        image_files.save_png(image, Path(config.save_dir) / "grids" / f"{epoch:04d}.png")
    return image

class Evaluator:
    """What a config's `eval` asks for. UserError, before training: data or weights are missing."""
    def __init__(self, config, images, labels, device, batch_gpu=None):
        self.config, self.batch_gpu = config, batch_gpu
        try:
            with distributed.rank0_first():
                test = data.load(config, train=False)
        except UserError as e:
            raise UserError(f"eval_every needs the test set, or null: {e}") from None
        n = min(config.eval.images or len(test[0]), len(test[0]))
        spread = torch.arange(n) * (len(test[0]) - 1) // max(n - 1, 1)      # Folders are sorted.
        self.held_out = test[0][spread], test[1][spread]
        self.sets = {linear_probe.TRAIN: (images, labels), linear_probe.TEST: test}
        if config.eval.probe:
            linear_probe.check_blocks(config, [config.linear.blockname])
        if config.eval.fid:
            self.extractor = features.Extractor(config.eval.features, device)
            self.reference = frechet.reference(config, images, self.extractor, batch_gpu)

    def measure(self, denoiser):
        """{name: value} of an EDM, in all processes, which share the work."""
        found, linear = held_out_loss(denoiser, *self.held_out, self.batch_gpu), self.config.linear
        found |= learned_uncertainty(denoiser)
        try:
            if n := self.config.eval.fid:
                found[f"{self.extractor.metric('FID')} n={n}"] = self.fid(denoiser, n)
            if self.config.eval.probe:
                probe = linear_probe.Probe(self.config, denoiser, self.sets, 0, 1, self.batch_gpu)
                found[f"probe t={linear.timestep} {linear.blockname} (%)"], = probe.accuracies(
                    linear.timestep, [linear.blockname])
        except UserError as e:          # In all processes.
            if distributed.rank() == 0:
                warn(f"{e}; not measured, training goes on")
        return found

    def fid(self, denoiser, n):
        """The Fréchet distance of n samples, those of sample.py's seed 0, to the training set."""
        moments = frechet.Moments(len(self.reference.mu), self.extractor.device)
        for start in range(distributed.rank() * CHUNK, n, distributed.world_size() * CHUNK):
            try:
                images = diffusion.generate(denoiser, range(start, min(start + CHUNK, n)))
                moments.add(self.extractor(images)[0])
            except UserError:               # NaN: all processes are to know.
                moments.sum += math.nan
        samples = moments.statistics(f"{n} samples")
        return distributed.on_rank0(frechet.distance, samples, self.reference)

@torch.no_grad()
def learned_uncertainty(denoiser):
    """u(sigma) at LEVELS, by name: e^u is the training loss that is expected (EDM2 Eq. 17-21). Of
    an EDM in training: load_denoiser() has none."""
    sigma = torch.tensor(LEVELS, device=next(denoiser.parameters()).device).float()
    u = denoiser.uncertainty.eval()(sigma.log() / 4)[:, 0]      # E and G: the weights stay.
    return {f"u/{level:.3g}": value for level, value in zip(LEVELS, u.tolist(), strict=True)}

@torch.no_grad()
def held_out_loss(denoiser, images, labels, batch_size=None):
    """The unweighted EDM loss per pixel of images (N,C,H,W) uint8, given their labels (N,), -1 for
    none, at LEVELS, and their mean, by name. Noise is a function of the image's number: the same at
    every level, in every run."""
    n, device = len(images), next(denoiser.parameters()).device
    total = torch.zeros(len(LEVELS), dtype=torch.float64, device=device)
    for chunk in range(distributed.rank(), -(-n // CHUNK), distributed.world_size()):
        index = torch.arange(chunk * CHUNK, min((chunk + 1) * CHUNK, n))
        g = torch.Generator().manual_seed(diffusion.derive_seed(chunk, len(LEVELS)))
        noise = torch.randn(CHUNK, *images.shape[1:], generator=g)[:len(index)].to(device)
        y = data.batch(images, index, device)
        drawn = [t.split(batch_size or CHUNK) for t in (y, noise, labels[index].to(device))]
        for i, level in enumerate(LEVELS):
            for part, eps, given in zip(*drawn, strict=True):
                sigma = torch.full([len(part)], float(level), device=device)
                D_x = denoiser.denoise(part + level * eps, sigma, given)
                loss = diffusion.edm_loss(D_x, part, sigma, denoiser.diffusion.sigma_data)
                total[i] += loss.double().sum()
    losses = (distributed.all_reduce(total) / n).tolist()
    return {"heldout_loss": float(np.mean(losses)), **{
        f"heldout_loss/{level:.3g}": loss for level, loss in zip(LEVELS, losses, strict=True)}}
