"""Averages of the weights: the plain EMA, and post-hoc EMA of any length (EDM2 3.1-3.2, App. C).

For the latter power-function averages of two lengths or more are tracked in training and kept now
and then; another length is put together from what was kept. A length is its sigma_rel, the standard
deviation of its profile relative to the training so far. Of ema_pytorch.PostHocEMA the averages are
used, not the files and the reconstruction: they hold counters and Fourier features in half
precision, and take an update's number for the time of its profile, which is one more.
"""

from pathlib import Path

import torch
from torch.nn.functional import pad

from edm2 import checkpoint, diffusion
from edm2.distributed import rank
from edm2.errors import UserError, warn

WORST = 0.1     # Of a profile's error, relative in the L2 norm: above there is no reconstruction.


class Averages:
    """The averages of a run's weights: the plain EMA, which `denoiser` has, and, where the config
    asks for them, those of posthoc_ema.sigma_rels. Each takes memory like a network."""

    def __init__(self, denoiser, config):
        from ema_pytorch import EMA, PostHocEMA
        self.config, self.posthoc = config, None
        # Its counters stay on the CPU, so that no step waits for them.
        self.ema = EMA(denoiser.net, beta=config.ema, update_after_step=0, update_every=1,
                       include_online_model=False, use_foreach=True)
        self.ema.ema_model.eval()
        self.denoiser = diffusion.EDM(self.ema.ema_model, denoiser.uncertainty, config.diffusion,
                                      config.network.image_shape, denoiser.amp_dtype)
        if config.posthoc_ema.sigma_rels:
            self.posthoc = PostHocEMA(
                denoiser.net, sigma_rels=tuple(config.posthoc_ema.sigma_rels), update_every=1,
                checkpoint_every_num_steps="manual", checkpoint_folder=f"{config.save_dir}/ema")
            self.posthoc.requires_grad_(False).eval()

    def update(self):
        """Follow the network by one step."""
        self.ema.update()
        if self.posthoc:
            self.posthoc.update()

    def state(self):
        """What a checkpoint holds of them."""
        p, state = self.posthoc, {"ema": self.ema.ema_model.state_dict(),
                                  "ema_step": self.ema.step.item(), "posthoc": {}}
        return state | ({"posthoc": {
            "updates": p.step.item(), "gammas": list(p.gammas),
            "parameters": [name for name, _ in p.model.named_parameters()],
            "averages": [average.ema_model.state_dict() for average in p.ema_models]}} if p else {})

    def restore(self, saved):
        """Take over what state() gave."""
        found, posthoc = [(self.ema, saved["ema"], saved["ema_step"])], saved["posthoc"]
        if self.posthoc:
            found += [(average, weights, posthoc["updates"]) for average, weights in zip(
                self.posthoc.ema_models, posthoc["averages"], strict=True)]
        for average, weights, step in found:
            checkpoint.restore(average.ema_model, weights)
            average.step.fill_(step)
            average.initted.fill_(step > 0)

    def keep(self, step, total_steps):
        """In rank 0, now and then, write a snapshot of the post-hoc ones: save_dir/ema/*.pth."""
        every = max(1, total_steps // self.config.posthoc_ema.snapshots)
        if self.posthoc and rank() == 0 and step % every == 0:
            checkpoint.save(Path(self.config.save_dir) / "ema" / f"{step}.pth",
                            snapshot(self.state()["posthoc"], step))


def snapshot(posthoc, step):
    """What is kept of state()["posthoc"] after a step: the parameters alone, in half precision."""
    halves = [{name: weights[name].half() for name in posthoc["parameters"]}
              for weights in posthoc["averages"]]
    return posthoc | {"step": step, "averages": halves}


def load_denoiser(config, epoch, weights="ema", sigma_rel=None, amp_dtype=None):
    """The EDM of a checkpoint, on the CPU: with its "ema" or "model" weights, or a post-hoc EMA of
    length sigma_rel. Raises UserError as load, check_same, restore and reconstruct do."""
    state = checkpoint.load(checkpoint.path_of(config, epoch))
    checkpoint.check_same(config, state["config"], checkpoint.NETWORK)
    denoiser = diffusion.build(config, amp_dtype)
    averaged = state["ema" if weights == "ema" else "network"]
    if sigma_rel is not None:
        averaged = reconstruct(state, load_snapshots(config), sigma_rel)
    checkpoint.restore(denoiser.net, averaged)
    return denoiser.eval().requires_grad_(False)


def load_snapshots(config):
    """The snapshots of a run; damaged files are named and left out."""
    kept = []
    for path in sorted((Path(config.save_dir) / "ema").glob("*.pth")):
        try:
            kept.append(checkpoint.load(path, ("step", "updates", "gammas", "averages"), mmap=True))
        except checkpoint.Damaged as e:
            warn(f"{e}: left out")
    return kept


def coefficients(times, gammas, time, gamma):
    """The coefficients (n,) float64 with which averages of length gammas (n,) at `times` (n,) come
    closest to that of length gamma at `time` (EDM2 Alg. 3, but of sum 1: what does not change stays
    as it is), and the error of its profile, relative in the L2 norm."""
    from ema_pytorch.post_hoc_ema import p_dot_p
    t, g, t_r, g_r = (torch.as_tensor(x, dtype=torch.float64) for x in (times, gammas, time, gamma))
    A, b = p_dot_p(t[:, None], g[:, None], t[None], g[None]), p_dot_p(t, g, t_r, g_r)
    # Lagrange's conditions of: least x·A·x - 2 b·x where the sum of x is 1.
    system = pad(A, (0, 1, 0, 1), value=1.0)
    system[-1, -1] = 0
    right = pad(b, (0, 1), value=1.0)[:, None]
    x = torch.linalg.lstsq(system, right, driver="gelsd").solution[:-1, 0]
    own = p_dot_p(t_r, g_r, t_r, g_r)
    return x, ((own - 2 * b @ x + x @ A @ x) / own).clamp(min=0).sqrt().item()


def reconstruct(saved, kept, sigma_rel):
    """The network's state dict with an average of length sigma_rel at the checkpoint `saved`, from
    the snapshots `kept` before it. Raises UserError where that length cannot be put together."""
    from ema_pytorch.post_hoc_ema import sigma_rel_to_gamma
    own, config, parts = saved["posthoc"], saved["config"], []
    if not own:
        raise UserError(f"{config['save_dir']} was trained without posthoc_ema.sigma_rels")
    for part in kept:
        if any(part[key] != own[key] for key in ("gammas", "parameters")):
            warn(f"the snapshot of step {part['step']} is of another run: left out")
        elif part["step"] < saved["step"]:
            parts.append(part)
    parts, gammas = [*parts, own], own["gammas"]
    times = [part["updates"] + 1 for part in parts for _ in gammas]
    x, error = coefficients(times, gammas * len(parts), times[-1], sigma_rel_to_gamma(sigma_rel))
    if error > WORST:
        raise UserError(f"--sigma_rel {sigma_rel:g} cannot be reconstructed from "
                        f"{config['posthoc_ema']['sigma_rels']} and the {len(parts) - 1} snapshots "
                        f"before this checkpoint: choose a closer length, or a later epoch")
    total = {name: torch.zeros_like(own["averages"][0][name]) for name in own["parameters"]}
    for part, row in zip(parts, x.reshape(-1, len(gammas)).tolist(), strict=True):
        for weights, factor in zip(part["averages"], row, strict=True):
            for name in total:
                total[name] += factor * weights[name].float()
    return own["averages"][0] | total                       # Fourier features never change.
