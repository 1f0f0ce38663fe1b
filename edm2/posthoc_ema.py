"""Averages of the weights: the plain EMA, and post-hoc EMA of any length (EDM2 3.1-3.2, App. C).

For the latter power-function averages of two lengths or more are tracked in training and kept now
and then; another length is put together from what was kept. A length is its sigma_rel, the standard
deviation of its profile relative to the training so far. Not with ema_pytorch.PostHocEMA: its files
hold counters in half precision, and it takes an update's number for the time, which is one more."""

from pathlib import Path
import torch
from torch.nn.functional import pad
from edm2 import checkpoint, diffusion, distributed
from edm2.errors import UserError

WORST = 0.1     # Of a profile's error, relative in the L2 norm: above there is no reconstruction.

class Averages:
    """The averages of a run's weights: the plain EMA, which `denoiser` has, and, where the config
    asks for them, those of posthoc_ema.sigma_rels. Each takes memory like a network."""
    def __init__(self, denoiser, config):
        from ema_pytorch import EMA
        from ema_pytorch.post_hoc_ema import KarrasEMA
        self.config = config
        # Its counters stay on the CPU, so that no step waits for them.
        self.ema = EMA(denoiser.net, beta=config.ema, update_after_step=0, update_every=1,
                       include_online_model=False, use_foreach=True)
        self.ema.ema_model.eval()
        self.denoiser = diffusion.EDM(self.ema.ema_model, denoiser.uncertainty, config,
                                      denoiser.amp_dtype)
        self.posthoc = [KarrasEMA(denoiser.net, sigma_rel=length, update_every=1)
                        for length in config.posthoc_ema.sigma_rels]

    def update(self):
        """Follow the network by one step."""
        for average in (self.ema, *self.posthoc):
            average.update()

    def state(self):
        """What a checkpoint holds of them."""
        model, step = self.ema.ema_model, self.ema.step.item()
        posthoc = self.posthoc and {"updates": step, "gammas": [one.gamma for one in self.posthoc],
            "parameters": [name for name, _ in model.named_parameters()],
            "averages": [average.ema_model.state_dict() for average in self.posthoc]}
        return {"ema": model.state_dict(), "ema_step": step, "posthoc": posthoc or {}}

    def restore(self, saved):
        """Take over what state() gave."""
        weights = [saved["ema"], *saved["posthoc"].get("averages", [])]
        for average, state_dict in zip([self.ema, *self.posthoc], weights, strict=True):
            checkpoint.restore(average.ema_model, state_dict)
            average.step.fill_(saved["ema_step"])
            average.initted.fill_(saved["ema_step"] > 0)

    def keep(self, step, total_steps):
        """In rank 0, now and then, write a snapshot of the post-hoc ones: save_dir/ema/*.pth."""
        every = max(1, total_steps // self.config.posthoc_ema.snapshots)
        if self.posthoc and distributed.rank() == 0 and step % every == 0:
            path = Path(self.config.save_dir) / "ema" / f"{step}.pth"
            checkpoint.save(path, snapshot(self.state()["posthoc"], step))

def snapshot(posthoc, step):
    """What is kept of state()["posthoc"] after a step: the parameters alone, in half precision."""
    halves = [{n: w[n].half() for n in posthoc["parameters"]} for w in posthoc["averages"]]
    return posthoc | {"step": step, "averages": halves}

def load_denoiser(config, epoch, weights="ema", sigma_rel=None, amp_dtype=None, trained_on=None):
    """The EDM of a checkpoint, on the CPU: with its "ema" or "model" weights, or a post-hoc EMA of
    length sigma_rel. trained_on: the number and SHA-256 of the images, to be compared. Raises
    UserError as load_epoch, check_images, restore and reconstruct do."""
    state = checkpoint.load_epoch(config, epoch)
    if trained_on:
        checkpoint.check_images(checkpoint.path_of(config, epoch), state, *trained_on)
    denoiser = diffusion.build(config, amp_dtype)
    found = (state["ema" if weights == "ema" else "network"] if sigma_rel is None else
             reconstruct(state, load_snapshots(config), sigma_rel))
    checkpoint.restore(denoiser.net, found)
    return denoiser.eval().requires_grad_(False)

def load_snapshots(config):
    """The snapshots of a run. Raises UserError for a damaged one."""
    return [checkpoint.load(path, ("step", "updates", "gammas", "averages"), mmap=True)
            for path in sorted((Path(config.save_dir) / "ema").glob("*.pth"))]

def coefficients(times, gammas, time, gamma):
    """Coefficients (n,) float64, of sum 1, by which averages of length gammas (n,) at times (n,)
    come closest to length gamma at `time` (EDM2 Alg. 3); the profile's relative error in L2."""
    from ema_pytorch.post_hoc_ema import p_dot_p
    t, g, t_r, g_r = (torch.as_tensor(x, dtype=torch.float64) for x in (times, gammas, time, gamma))
    A, b = p_dot_p(t[:, None], g[:, None], t[None], g[None]), p_dot_p(t, g, t_r, g_r)
    # Lagrange's conditions of: least x·A·x - 2 b·x where the sum of x is 1 (a constant stays).
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
    if not (own := saved["posthoc"]):
        raise UserError(f"{saved['config']['save_dir']} was trained without posthoc_ema.sigma_rels")
    parts = [*(part for part in kept if part["step"] < saved["step"]), own]
    if strange := [part for part in parts if any(
            part[key] != own[key] for key in ("gammas", "parameters"))]:
        raise UserError(f"the snapshot of step {strange[0]['step']} is of another run: remove it")
    times = [part["updates"] + 1 for part in parts for _ in own["gammas"]]
    gammas, gamma = own["gammas"] * len(parts), sigma_rel_to_gamma(sigma_rel)
    x, error = coefficients(times, gammas, times[-1], gamma)
    if error > WORST:
        raise UserError(f"--sigma_rel {sigma_rel:g} cannot be reconstructed from the "
                        f"{len(parts) - 1} snapshots before: choose a closer one, or a later epoch")
    averages = [weights for part in parts for weights in part["averages"]]
    total = {name: sum(factor * weights[name].float() for factor, weights in zip(
        x.tolist(), averages, strict=True)) for name in own["parameters"]}
    return own["averages"][0] | total                       # Fourier features never change.
