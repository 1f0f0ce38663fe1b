"""Post-hoc EMA (EDM2 3.1-3.2, App. C): power-function averages of two lengths or more are tracked in training and kept
now and then; an average of any other length is put together from what was kept.

The length of an average is its sigma_rel, the standard deviation of its profile relative to the training so far. The
averages are those of ema_pytorch.PostHocEMA. Its files and its reconstruction are not used: they hold step counters
and Fourier features in half precision, may be cut by a crash, and take an update's number for the time of its profile,
which is one more (the first update counts from 0 to 2).
"""

import torch

from runtime import UserError, warn

WORST = 0.1     # The error of a profile, relative to it in the L2 norm, above which there is no reconstruction.


# ----------------------------------------------------------------------------------------------------------------------
# In training.

def track(net, config):
    """The averages that the config asks for, None without any. They take memory like as many networks."""
    sigma_rels = config["posthoc_ema"]["sigma_rels"]
    if not sigma_rels:
        return None
    from ema_pytorch import PostHocEMA
    averages = PostHocEMA(net, sigma_rels=tuple(sigma_rels), update_every=1, checkpoint_every_num_steps="manual",
                          checkpoint_folder=f"{config['save_dir']}/ema")
    return averages.requires_grad_(False).eval()


def is_due(t):
    """Whether a snapshot follows the step that a Training has just done: evenly over the run."""
    if not t.posthoc:
        return False
    every = max(1, t.total_steps // t.config["posthoc_ema"]["snapshots"])
    return t.step % every == 0


def state(averages):
    """What a checkpoint holds of them, {} without any: the number of updates, their gammas, the names of the network's
    parameters, and state dicts."""
    return {} if not averages else {"updates": averages.step.item(), "gammas": list(averages.gammas),
                                    "parameters": [name for name, _ in averages.model.named_parameters()],
                                    "averages": [average.ema_model.state_dict() for average in averages.ema_models]}


def restore(averages, saved, into):
    """Take over what state() gave; into: checkpoint.restore."""
    for average, weights in zip(averages.ema_models if averages else [], saved["averages"] if saved else [],
                                strict=True):
        into(average.ema_model, weights)
        average.step.fill_(saved["updates"])
        average.initted.fill_(saved["updates"] > 0)


def snapshot(averages, step):
    """What is kept of them after a step: state(), of the parameters alone and in half precision."""
    found = state(averages)
    return found | {"step": step, "averages": [{name: weights[name].half() for name in found["parameters"]}
                                               for weights in found["averages"]]}


# ----------------------------------------------------------------------------------------------------------------------
# Afterwards.

def coefficients(times, gammas, time, gamma):
    """The coefficients (n,) float64 with which averages of length gammas (n,) at `times` (n,) come closest to the one
    of length gamma at `time` (EDM2 Alg. 3), and the error of its profile, relative in the L2 norm.

    Alg. 3 leaves their sum free; here it is 1, so that what does not change stays as it is.
    """
    from ema_pytorch.post_hoc_ema import p_dot_p
    t, g, t_r, g_r = (torch.as_tensor(x, dtype=torch.float64) for x in (times, gammas, time, gamma))
    A = p_dot_p(t[:, None], g[:, None], t[None], g[None])
    b = p_dot_p(t, g, t_r, g_r)
    n, ones = len(t), torch.ones(len(t), 1, dtype=torch.float64)
    # Lagrange's conditions of: least x·A·x - 2 b·x where the sum of x is 1.
    system = torch.cat([torch.cat([A, ones], 1), torch.cat([ones.T, torch.zeros(1, 1, dtype=torch.float64)], 1)])
    x = torch.linalg.lstsq(system, torch.cat([b, torch.ones(1, dtype=torch.float64)])[:, None], driver="gelsd"
                           ).solution[:n, 0]
    own = p_dot_p(t_r, g_r, t_r, g_r)
    error = ((own - 2 * b @ x + x @ A @ x) / own).clamp(min=0).sqrt()
    return x, error.item()


def reconstruct(saved, kept, sigma_rel):
    """The network's state dict with the weights of an average of length sigma_rel, at the time of a checkpoint.

    saved: the checkpoint, as checkpoint.load gives it. kept: snapshots of the same run before it.
    Raises UserError where the run has tracked no averages, or that length cannot be put together.
    """
    from ema_pytorch.post_hoc_ema import sigma_rel_to_gamma
    own = saved["posthoc"]
    if not own:
        raise UserError(f"{saved['config']['save_dir']} was trained without posthoc_ema.sigma_rels: --sigma_rel has "
                        f"nothing to reconstruct from")
    gammas, strangers = own["gammas"], [part["step"] for part in kept if any(
        part[key] != own[key] for key in ("gammas", "parameters"))]
    if strangers:
        warn(f"the snapshots of steps {', '.join(map(str, strangers))} are of another run: left out")
    kept = [part for part in kept if part["updates"] < own["updates"] and part["step"] not in strangers]
    times = [part["updates"] + 1 for part in (*kept, own) for _ in gammas]
    x, error = coefficients(times, gammas * (len(kept) + 1), own["updates"] + 1, sigma_rel_to_gamma(sigma_rel))
    if error > WORST:
        raise UserError(f"--sigma_rel {sigma_rel:g} cannot be reconstructed from posthoc_ema.sigma_rels "
                        f"{saved['config']['posthoc_ema']['sigma_rels']} and the {len(kept)} snapshots before this "
                        f"checkpoint: the profile would be wrong by {error:.0%}; choose a length closer to "
                        f"those, or a later epoch")
    total = {name: torch.zeros_like(own["averages"][0][name]) for name in own["parameters"]}
    for part, row in zip([*kept, own], x.reshape(-1, len(gammas)).tolist(), strict=True):
        for weights, factor in zip(part["averages"], row, strict=True):
            for name in total:
                total[name] += factor * weights[name].float()
    return own["averages"][0] | total                       # The rest, Fourier features, never changes.
