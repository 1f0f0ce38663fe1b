"""Checkpoints: plain tensors and values, written whole or not at all, checked when they are read.

In save_dir/ckpts: model_{epoch}.pth; latest.pth and latest_before.pth, saves on the way."""

import contextlib
import math
import pickle
import zipfile
from pathlib import Path
import torch
from edm2.errors import UserError, warn
from edm2.files import atomic

# Keys of which a checkpoint is.
NETWORK = "net_type", "network", "diffusion.sigma_data", "label_dropout", "augment"

class Damaged(UserError):
    """A file is not what was written."""

def path_of(config, epoch):
    """The file that epoch `epoch` leaves behind."""
    return Path(config.save_dir) / "ckpts" / f"model_{epoch}.pth"

def latest_paths(config):
    """The two last saves on the way, the newest first."""
    return [path_of(config, 0).with_name(name) for name in ("latest.pth", "latest_before.pth")]

def epochs(config):
    """The epochs whose checkpoints exist, in rising order."""
    names = [path.name for path in path_of(config, 0).parent.glob("model_*.pth")]
    return sorted(int(name[6:-4]) for name in names if name[6:-4].isdecimal())

def existing(config):
    """The checkpoints that exist, the newest first; those that tell no step before all."""
    paths = [path_of(config, epoch) for epoch in epochs(config)] + latest_paths(config)
    return sorted(filter(Path.exists, paths), key=step_of, reverse=True)

def find(config, epoch=None):
    """The epoch meant: None the newest, n_epoch the last. UserError: there is no such one."""
    found, folder = epochs(config), path_of(config, 0).parent
    if not found:
        raise UserError(f"no checkpoints in {folder}: train first")
    asked = found[-1] if epoch is None else epoch
    epoch = asked - 1 if asked == config.n_epoch and asked not in found else asked
    if epoch not in found:
        raise UserError(f"no checkpoint of epoch {epoch} in {folder}, only of {found}")
    return epoch

def save(path, state):
    """Write a dict of tensors and plain values; latest.pth until now becomes latest_before.pth."""
    if path.name == "latest.pth" and path.exists():
        path.replace(path.with_name("latest_before.pth"))
    with atomic(path) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)

def load(path, keys=("network", "ema", "optimizer", "step", "config"), mmap=False):
    """Read what save() wrote, to the CPU; runs no code from it. Raises Damaged for a changed file
    (torch.load ignores the zip's checksums) or code; UserError: unreadable, or without `keys`."""
    try:
        with zipfile.ZipFile(path) as file:
            if part := file.testzip():
                raise zipfile.BadZipFile(f"{part} was changed")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        raise Damaged(f"{path} is refused: it holds more than tensors and plain values") from None
    except (OSError, MemoryError) as e:
        raise UserError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from None
    except Exception as e:          # zipfile and torch raise whatever a damage leads them to.
        raise Damaged(f"{path} is damaged or foreign: {str(e).partition(chr(10))[0]}") from None
    if not isinstance(state, dict) or not set(keys) <= state.keys():
        held = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise UserError(f"{path} is not a checkpoint of this project: it holds {held[:200]}")
    return state

def load_epoch(config, epoch):
    """The checkpoint of an epoch. Raises UserError where it is of another network or epoch."""
    path = path_of(config, epoch)
    state = load(path)
    check_same(config, state["config"], NETWORK)
    if state.get("epoch", epoch) != epoch:
        raise UserError(f"{path} is of epoch {state['epoch']}: it was copied or renamed")
    return state

def check_images(path, state, n, sha256):
    """Raise UserError for another number or SHA-256 of images than a checkpoint was trained on."""
    if (there := (state["n_images"], state.get("images_sha256", sha256))) != (n, sha256):
        raise UserError(f"{path} is of a run on {there[0]:,} images of SHA-256 {there[1][:8]}..., "
                        f"here are {n:,} of {sha256[:8]}...: use its data, or another save_dir")

def step_of(path):
    """The step of a checkpoint, unchecked; infinity where it tells none, as load() will say."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"]
    except Exception:
        return math.inf

def newest(config):
    """The path of the newest whole checkpoint, None without any; damaged ones are named. Raises
    UserError where there are only damaged ones, or one is foreign or cannot be read."""
    for path in (paths := existing(config)):
        try:
            load(path)
            return path
        except Damaged as e:
            warn(f"{e}: looking for one before it")
    if paths:
        raise UserError(f"{paths[0].parent} holds only damaged or foreign files: move them away")

def choose(config, fresh):
    """The path of the checkpoint to go on from, None for a new run: the newest or, unless the run
    has gone on from it, load_epoch's; later ones become *.old. `fresh`: UserError for a run."""
    if fresh and existing(config):
        raise UserError(f"--fresh: {config.save_dir} holds a run: choose another save_dir")
    path = newest(config)
    if config.load_epoch >= 0 and (
            path is None or load(path)["config"]["load_epoch"] != config.load_epoch):
        path = path_of(config, find(config, config.load_epoch))
    if path is None or config.load_epoch >= 0:
        step = step_of(path) if path else 0
        for later in [*existing(config), *(Path(config.save_dir) / "ema").glob("*.pth")]:
            if step_of(later) > step:
                warn(f"{later} is of a later step than {step}: renamed to {later.name}.old")
                later.replace(later.with_name(f"{later.name}.old"))
    return path

def restore(module, state_dict):
    """Load a state dict into a module. Raises UserError naming a tensor that does not fit."""
    here, there = ({(k, x.shape) for k, x in d.items()} for d in (module.state_dict(), state_dict))
    if here != there:
        raise UserError(f"a checkpoint of another network: they differ in {min(here ^ there)[0]}")
    module.load_state_dict(state_dict)

def check_same(config, saved, keys):
    """Raise UserError listing where a Config differs from a checkpoint's in or below `keys`."""
    with contextlib.suppress(ValueError):       # What an older version lacks has its default.
        saved = type(config).model_validate(saved).model_dump()
    here, there = ({f"{key}.{name}".rstrip("."): value for key, section in values.items()
                    for name, value in (section if isinstance(section, dict) else {"": section})
                    .items()} for values in (config.model_dump(), saved))
    differences = [f"{k} {there.get(k)!r} there, {here.get(k)!r} here" for k in here | there
                   if k.startswith(tuple(keys)) and here.get(k) != there.get(k)]
    if differences:
        raise UserError(f"{config.save_dir} holds a run of another config "
                        f"({'; '.join(differences)}): use its config, or another save_dir")
