"""Checkpoints save_dir/ckpts/model_{epoch}.pth: plain tensors and plain values, written whole or not at all."""

import re
from pathlib import Path

import torch

import edm
import options
from runtime import UserError, atomic

# What a checkpoint holds.
KINDS = {"network": dict, "uncertainty": dict, "ema": dict, "ema_step": int, "optimizer": dict, "scaler": dict,
         "step": int, "epoch": int, "config": dict}


def path_of(config, epoch):
    """The file that epoch `epoch` leaves behind."""
    return Path(config["save_dir"]) / "ckpts" / f"model_{epoch}.pth"


def samples_folder(config, epoch, variant=""):
    """The folder of the images that sample.py makes from the checkpoint of `epoch`."""
    return Path(config["save_dir"]) / "samples" / f"{epoch}{variant}"


def epochs(config):
    """The epochs whose checkpoints exist, in rising order."""
    names = (re.fullmatch(r"model_(\d+)\.pth", p.name) for p in path_of(config, 0).parent.glob("model_*.pth"))
    return sorted(int(match[1]) for match in names if match)


def find(config, epoch=None):
    """The epoch of the checkpoint meant by `epoch`: None the newest, n_epoch the last one of a whole run.

    Raises UserError with the list of existing ones where there is none.
    """
    existing = epochs(config)
    folder = path_of(config, 0).parent
    if not existing:
        raise UserError(f"no checkpoints in {folder}: train first")
    if epoch is None:
        return existing[-1]
    if epoch not in existing and epoch == config["n_epoch"]:
        epoch -= 1
    if epoch not in existing:
        raise UserError(f"no checkpoint of epoch {epoch} in {folder}; there are {', '.join(map(str, existing))}")
    return epoch


def save(config, epoch, state):
    """Write a checkpoint. Raises UserError where writing fails; an older file of that name is then still whole."""
    with atomic(path_of(config, epoch)) as temporary:
        torch.save(state, temporary)


def load(config, epoch):
    """Read a checkpoint to the CPU. Runs no code from the file. Raises UserError naming a file that is damaged."""
    path = path_of(config, epoch)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:                  # The unpickler raises whatever a damaged file leads it to.
        reason = str(e).partition("\n")[0] or "it is cut"
        raise UserError(f"cannot read the checkpoint {path}: {reason} (with several machines, save_dir must be on a "
                        f"disk that they share)") from None
    if not isinstance(state, dict) or any(not isinstance(state.get(key), kind) for key, kind in KINDS.items()):
        raise UserError(f"{path} is not a checkpoint of this project")
    state["config"] = options.check_keys(state["config"], options.KEYS)     # Keys that are younger than the file.
    return state


def restore(module, state_dict):
    """Load a state dict into a module. Raises UserError naming the first tensor that does not fit."""
    own = module.state_dict()
    for name in [*own, *state_dict]:
        if name not in state_dict or name not in own or own[name].shape != state_dict[name].shape:
            raise UserError(f"the checkpoint is of another network: they differ in {name}")
    module.load_state_dict(state_dict)


def load_edm(config, epoch, weights, args, device):
    """The EDM for sampling and features, with the "ema" or "model" weights of a checkpoint and the precision, memory
    layout and compilation that the command line says. Raises UserError as load, check_same_network and restore do."""
    state = load(config, epoch)
    check_same_network(config, state["config"])
    denoiser = edm.build(config, options.amp_dtype(args))
    restore(denoiser.net, state["ema" if weights == "ema" else "network"])
    denoiser.to(device).eval().requires_grad_(False)
    if args.channels_last:
        denoiser.to(memory_format=torch.channels_last)
    if args.compile if args.compile is not None else device.type == "cuda":
        denoiser.net.compile()
    return denoiser


def check_same_run(config, saved):
    """Raise UserError listing the keys that shape the result and differ between a config and a checkpoint's."""
    free = {"n_epoch", "load_epoch", "data_root", "classes", "save_dir", "save_model", "save_every", "log_every",
            "n_sample", "linear"}
    refuse_differences(config, saved, [key for key in config if key not in free], "choose another save_dir")


def check_same_network(config, saved):
    """Raise UserError listing what differs between the networks of a config and of a checkpoint."""
    refuse_differences(config, saved, ["net_type", "network"], "use the config it was trained with")


def refuse_differences(config, saved, keys, remedy):
    """Raise UserError listing those of `keys` in which two configs differ."""
    differences = [f"{key} {saved.get(key)!r} there, {config[key]!r} here"
                   for key in keys if config[key] != saved.get(key)]
    if differences:
        raise UserError(f"{config['save_dir']} holds a run of another config ({'; '.join(differences)}): {remedy}")
