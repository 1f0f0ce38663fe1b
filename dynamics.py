"""Training dynamics: how large activations, weights, gradients and updates are while a network trains (EDM2 Fig. 3, 4).

train.py records them in save_dir/dynamics.jsonl and TensorBoard; `results.py --dynamics` draws them.
"""

import math

import torch

import runtime

POINTS, APART = 200, 25     # Records over a run at most and steps between two at least, if the config does not say.
N_IMAGES = 8        # That the activations are of.


def block_groups(net, H, W):
    """{"encoder.0": "encoder 32x32", ...}: where a block stands and the height and width of its output, those of the
    images being H and W. The middle is of the decoder's kind and counted there."""
    groups = {"stem": f"encoder {H}x{W}", "out_conv": f"decoder {H}x{W}"}
    for part in ("encoder", "middle", "decoder"):
        for i, block in enumerate(getattr(net, part)):
            factor = {"down": 0.5, "up": 2, None: 1}[block.resample_mode]
            H, W = int(H * factor), int(W * factor)
            groups[f"{part}.{i}"] = f"{'encoder' if part == 'encoder' else 'decoder'} {H}x{W}"
    return groups


def default_every(total_steps):
    """Steps between records, such that they take less than 1 % of the time (benchmarks/README.md)."""
    return max(APART, -(-total_steps // POINTS))


class Recorder:
    """The root mean squares (RMS) that a run's dynamics consist of, in the main process.

    Activations: of every block's output, as the network in evaluation mode (without dropout) makes it of the same
    images, noise levels and noise each time: N_IMAGES training images at as many quantiles of the training's levels.
    Weights, gradients and updates: of every weight of the network, as the step's forward pass has left it (in E and G
    normalized); the update is its change by the optimizer, relative to its RMS: the effective learning rate (EDM2 2.2).
    """

    def __init__(self, training):
        t = self.training = training
        every = t.config["dynamics_every"]
        self.every = default_every(t.total_steps) if every is None else every
        net, diffusion = t.edm.net, t.config["diffusion"]
        self.groups = block_groups(net, *t.config["network"]["image_shape"][1:])
        self.blocks = {name: net.get_submodule(name) for name in self.groups if "." in name}
        self.weights = {name.removesuffix(".weight"): p for name, p in net.named_parameters() if p.ndim > 1}
        g = torch.Generator().manual_seed(runtime.mix(0, N_IMAGES))
        index = torch.linspace(0, len(t.images) - 1, N_IMAGES).long()
        y = t.images[index.to(t.images.device)].to(t.rt.device).float() / 127.5 - 1
        level = torch.special.ndtri((torch.arange(N_IMAGES) + 0.5) / N_IMAGES)
        self.sigma = (diffusion["p_mean"] + diffusion["p_std"] * level).exp().to(y.device)
        self.noisy = y + self.sigma[:, None, None, None] * torch.randn(y.shape, generator=g).to(y.device)
        self.record = None

    def is_due(self):
        """Whether the present step is to be recorded: the first, every so many, and the last."""
        t = self.training
        return t.rt.is_main and self.every > 0 and (t.step % self.every == 0 or t.step == t.total_steps - 1)

    @torch.no_grad()
    def before_update(self):
        """Between the backward pass and the optimizer."""
        weights = list(self.weights.values())
        self.found = {"activation": self.activations(), "weight": torch._foreach_norm(weights),
                      "gradient": torch._foreach_norm([p.grad for p in weights])}
        self.before = [p.clone() for p in weights]

    @torch.no_grad()
    def after_update(self):
        """After the optimizer: complete the record. Everything comes from the device at once."""
        t, weights = self.training, list(self.weights.values())
        self.found["update"] = torch._foreach_norm(torch._foreach_sub(weights, self.before))
        numbers = iter(torch.stack([norm.float() for norms in self.found.values() for norm in norms]).tolist())
        roots = [math.sqrt(p.numel()) for p in weights]
        rms = {"activation": {name: next(numbers) for name in self.blocks}}
        for kind in ("weight", "gradient", "update"):
            rms[kind] = {name: next(numbers) / root for name, root in zip(self.weights, roots, strict=True)}
        rms["update"] = {name: value / rms["weight"][name] if rms["weight"][name] else math.nan
                         for name, value in rms["update"].items()}
        self.record = {"dataset": t.config["dataset"], "net_type": t.config["net_type"],
                       "Mimg": (t.step + 1) * t.config["batch_size"] / 1e6,
                       **{kind: self.grouped(values) for kind, values in rms.items()}}
        self.before = self.found = None

    def activations(self):
        """The RMS of each block's output, a list of scalar tensors."""
        denoiser, out = self.training.edm, []
        hooks = [block.register_forward_hook(lambda block, inputs, x: out.append(x.float().square().mean().sqrt()))
                 for block in self.blocks.values()]
        denoiser.eval()                     # Here E and G leave the stored weights as they are.
        try:
            denoiser.denoise(self.noisy, self.sigma)        # Not compiled: that is only what EDM.forward is.
        finally:
            denoiser.train()
            for hook in hooks:
                hook.remove()
        return out

    def grouped(self, values):
        """{group: {name: RMS}} of {name: RMS}; what is NaN or Inf becomes None."""
        found = {}
        for name, value in values.items():
            found.setdefault(self.group(name), {})[name] = value if math.isfinite(value) else None
        return found

    def group(self, name):
        """The group of a block or weight, such as "encoder 16x16" or "embedding"."""
        part, number, *rest = [*name.split("."), ""]
        if part.startswith("emb") or rest[:1] == ["emb"]:
            return "embedding"
        return self.groups[f"{part}.{number}" if number else part]

    def take(self):
        """The record that has been completed since the last call, or None."""
        record, self.record = self.record, None
        return record
