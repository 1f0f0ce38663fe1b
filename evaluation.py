"""What train.py measures of its EMA every `eval_every` epochs: the loss on the test set, FID, a probe."""

from types import SimpleNamespace

import numpy as np
import torch

import data
import edm
import features
import fid
import probe
import runtime
from runtime import UserError

LEVELS = np.geomspace(0.02, 20, 8)      # Noise levels of the held-out loss.
CHUNK = 64                              # Images whose noise is drawn together, and that pass together.
LOSS = "heldout_loss"                   # The name of its mean over the levels.


class Evaluator:
    """What the config's `eval` asks for, and all that it needs.

    images, labels: the training set's. Raises UserError, before training, where data or weights are missing.
    """

    def __init__(self, config, args, rt, images, labels):
        self.config, self.rt, self.ask = config, rt, config["eval"]
        try:
            with rt.in_turns():
                self.test = data.load(config, train=False)
        except UserError as e:
            raise UserError(f"eval_every needs the test set, or null: {e}") from None
        n = len(self.test[0])
        self.chosen = self.test[0]
        if self.ask["images"] and self.ask["images"] < n:       # Spread over the set: a folder's is sorted by class.
            self.chosen = self.test[0][torch.linspace(0, n - 1, self.ask["images"]).long()]
        self.train = images, labels
        self.args = SimpleNamespace(seed=0, batch_gpu=args.batch_gpu, passes=1, timesteps=None, blocks=None, grid=False)
        if self.ask["probe"]:
            self.pairs = probe.choose_pairs(config, self.args)
        if self.ask["fid"]:
            self.extractor = features.Extractor(self.ask["features"], rt)
            self.reference = fid.reference(config, images, self.extractor, self.args, rt, keep=False)
            self.width = rt.on_main(lambda: len(self.reference.mu))     # Others need not have it.

    def figures(self, denoiser):
        """{name: value} of an EDM, in all processes, which share the work; the same however many they are."""
        found = held_out_loss(denoiser, self.chosen, self.rt, self.args.batch_gpu)
        for asked, measure in ((self.ask["fid"], self.sampled_fid), (self.ask["probe"], self.probed)):
            try:
                found |= measure(denoiser) if asked else {}
            except UserError as e:          # In all processes.
                if self.rt.is_main:
                    runtime.warn(f"{e}; not measured, training goes on")
        return found

    def probed(self, denoiser):
        """The accuracy of the config's linear probe, by one draw of noise and flips, in per cent."""
        sets = [probe.extract(denoiser, *part, self.pairs, 1, kind, self.config, self.args, self.rt)
                for part, kind in ((self.train, probe.TRAIN), (self.test, probe.TEST))]
        classes = max(int(labels.max()) + 1 for _, labels in (self.train, self.test))
        accuracy = probe.probe(*sets, self.pairs, classes, self.config["linear"], 0, self.rt)[0]
        return {f"probe t={self.pairs[0].timestep} {self.pairs[0].block} (%)": accuracy}

    def sampled_fid(self, denoiser):
        """The Fréchet distance of samples, those of sample.py's seed 0, to the training set."""
        n, rt, shape = self.ask["fid"], self.rt, self.config["network"]["image_shape"]
        moments = fid.Moments(self.width, rt.device)
        for start in range(rt.rank * CHUNK, n, rt.world_size * CHUNK):
            images = edm.generate(denoiser, range(start, min(start + CHUNK, n)), shape, rt.device)
            moments.add(self.extractor(images)[0])
        samples = fid.Statistics(f"{n} samples", *moments.finish(rt), n)
        value = rt.on_main(lambda: fid.distance(samples, self.reference))
        return {f"{self.extractor.figure('FID')} n={n}": value}


@torch.no_grad()
def held_out_loss(denoiser, images, rt, batch_size=None):
    """The unweighted EDM loss λ·(D-y)² per pixel of images (N,C,H,W) uint8, at each of LEVELS: {"heldout_loss": mean
    over them, "heldout_loss/0.02": ..., ...}.

    The noise of an image is a function of its number alone, the same at every level, in every run and process.
    """
    n, shape, total = len(images), images.shape[1:], torch.zeros(len(LEVELS), dtype=torch.float64, device=rt.device)
    for chunk in range(rt.rank, -(-n // CHUNK), rt.world_size):
        index = torch.arange(chunk * CHUNK, min((chunk + 1) * CHUNK, n))
        g = torch.Generator().manual_seed(runtime.mix(chunk, len(LEVELS)))
        noise = torch.randn(CHUNK, *shape, generator=g)[:len(index)].to(rt.device)
        y = images[index.to(images.device)].to(rt.device).float() / 127.5 - 1
        for i, level in enumerate(LEVELS):
            for part, eps in zip(y.split(batch_size or CHUNK), noise.split(batch_size or CHUNK), strict=True):
                sigma = torch.full([len(part)], float(level), device=rt.device)
                D_x = denoiser.denoise(part + level * eps, sigma)
                total[i] += edm.edm_loss(D_x, part, sigma, denoiser.sigma_data).double().sum()
    losses = (rt.all_reduce(total) / n).tolist()
    return {LOSS: float(np.mean(losses)),
            **{f"{LOSS}/{level:.3g}": loss for level, loss in zip(LEVELS, losses, strict=True)}}
