"""Checkpoints: plain tensors and plain values, with a checksum, written whole or not at all.

save_dir/ckpts/model_{epoch}.pth is what an epoch left behind; latest.pth and latest_before.pth, the two last saves on
the way there, are there until the run is done.
"""

import contextlib
import hashlib
import math
import os
import re
import time
import zlib
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import torch

import edm
import options
import posthoc
from files import atomic, make_folder
from runtime import UserError, warn

# What a checkpoint holds.
KINDS = {"network": dict, "uncertainty": dict, "ema": dict, "ema_step": int, "optimizer": dict, "scaler": dict,
         "step": int, "epoch": int, "loss_sum": torch.Tensor, "window": int, "bad_steps": int, "n_images": int,
         "precision": str, "config": dict}
SNAPSHOT_KINDS = {"step": int, "updates": int, "gammas": list, "parameters": list, "averages": list}
YOUNGER = {"posthoc": {}}       # What those of earlier versions do not hold.
# torch.save makes a zip file. Its zip comment is this, the CRC being that of the step, and then the SHA-256 of all that
# stands before.
COMMENT = b"step %015d crc32 %08x sha256 "
DIGITS = 64
RETRY = 60              # Seconds after a failed save until the next.


# ----------------------------------------------------------------------------------------------------------------------
# Names.

def folder_of(config):
    """The folder of the checkpoints."""
    return Path(config["save_dir"]) / "ckpts"


def path_of(config, epoch):
    """The file that epoch `epoch` leaves behind."""
    return folder_of(config) / f"model_{epoch}.pth"


def latest_paths(config):
    """The two last saves on the way, the newest first."""
    return [folder_of(config) / "latest.pth", folder_of(config) / "latest_before.pth"]


def snapshot_path(config, step):
    """The file of what is kept of the averages of a post-hoc EMA after a step."""
    return Path(config["save_dir"]) / "ema" / f"{step}.pth"


def snapshots(config):
    """The files of the averages that are kept."""
    return sorted(snapshot_path(config, 0).parent.glob("*.pth"))


def samples_folder(config, epoch, variant=""):
    """The folder of the images that sample.py makes from the checkpoint of `epoch`."""
    return Path(config["save_dir"]) / "samples" / f"{epoch}{variant}"


def sigma_rel_suffix(sigma_rel):
    """What the folder's name says of the length of a post-hoc EMA; nothing for None, the plain EMA."""
    return "" if sigma_rel is None else f"_sigma_rel{sigma_rel:g}"


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


# ----------------------------------------------------------------------------------------------------------------------
# Files.

def write(path, state, before=None):
    """Write a checkpoint, sealed with its checksum, so that a crash at any moment leaves the file whole that was there.

    before: what that file is then renamed to; None: it is replaced. Raises UserError where writing fails.
    """
    with atomic(path) as temporary:
        comment = comment_of(state["step"])
        with open(temporary, "w+b") as file:
            torch.save(state, file)
            file.seek(-2, os.SEEK_END)      # A zip file ends in the length of its comment.
            file.write((len(comment) + DIGITS).to_bytes(2, "little") + comment)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.write(digest.encode())
            file.flush()
            os.fsync(file.fileno())
        if before and path.exists():
            path.replace(before)
    with contextlib.suppress(OSError):      # The new name, too, is to outlast a loss of power, where folders can do it.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def comment_of(step):
    """What stands before the SHA-256 in the comment of a checkpoint."""
    return COMMENT % (step, zlib.crc32(b"%d" % step))


def step_in(path):
    """The step that a checkpoint's comment tells; infinity where it has none, as in a file that was cut."""
    length = len(comment_of(0))
    try:
        with open(path, "rb") as file:
            file.seek(-(length + DIGITS), os.SEEK_END)
            comment = file.read(length)
        step = int(comment[5:20])
        return step if comment == comment_of(step) else math.inf
    except (OSError, ValueError):
        return math.inf


class Damaged(UserError):
    """A checkpoint is not what was written."""


def verify(path):
    """Raise Damaged where its checksum says that a checkpoint is damaged, another UserError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - DIGITS))
            told, digest, left = file.read(), hashlib.sha256(), size - DIGITS
            file.seek(0)
            while left > 0 and (block := file.read(min(left, 2 ** 20))):
                digest.update(block)
                left -= len(block)
    except OSError as e:
        hint = " (with several machines, save_dir must be on a disk that they share)" * isinstance(e, FileNotFoundError)
        raise UserError(f"cannot read the checkpoint {path}: {e.strerror}{hint}") from None
    if digest.hexdigest().encode() != told:
        raise Damaged(f"the checkpoint {path} is damaged: " + (
            "it was cut, or is of a version that noted no checksum" if math.isinf(step_in(path)) else
            "it was changed (its SHA-256 is not the one noted)"))


def is_whole(path):
    """True where a checkpoint is there, can be read, and is what was written."""
    try:
        verify(path)
        return True
    except UserError:
        return False


def read(path, kinds, what, mmap=False):
    """Read a checkpoint or snapshot to the CPU. Runs no code from the file. Raises UserError naming a file that is
    damaged, holds anything but tensors and plain values, or is none of this project."""
    verify(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (OSError, MemoryError) as e:     # The content is whole, its checksum says.
        raise UserError(f"cannot read the checkpoint {path}: {e}") from None
    except Exception:                       # Whatever the file leads the unpickler to.
        raise UserError(f"the checkpoint {path} is refused: it holds more than tensors and plain values") from None
    if not isinstance(state, dict) or any(not isinstance(state.get(key), kind) for key, kind in kinds.items()):
        raise UserError(f"{path} is not a {what} of this project")
    return state


def load(path):
    """Read a checkpoint to the CPU, as read() does."""
    state = YOUNGER | read(path, KINDS, "checkpoint")
    state["config"] = options.check_keys(state["config"], options.KEYS)     # Keys that are younger than the file.
    return state


def load_snapshots(config, step):
    """The snapshots for post-hoc EMA before `step`, mapped into memory; damaged ones are named and left out."""
    found = []
    for path in snapshots(config):
        try:
            if path.stem.isdecimal() and int(path.stem) < step:
                found.append(read(path, SNAPSHOT_KINDS, "snapshot", mmap=True))
        except Damaged as e:
            warn(f"{e}: left out")
    return found


def newest(config):
    """The newest whole checkpoint to go on from, None where there are none; damaged ones are named on stderr.

    Raises UserError where there are only damaged ones, or a newer one cannot be read: it may be whole.
    """
    paths = [path_of(config, epoch) for epoch in epochs(config)] + [p for p in latest_paths(config) if p.exists()]
    damaged, found = [], None
    for path in sorted(paths, key=step_in, reverse=True):
        if found and path != latest_paths(config)[0]:   # The next save renames that one, be it old: whole or not?
            continue
        try:
            verify(path)
            found = found or path
        except Damaged as e:
            warn(f"{e}: looking for one before it" if found is None else e)
            damaged.append(path)
        except UserError as e:
            if found is None:
                raise
            warn(e)
            damaged.append(path)
    for path in set(damaged) & set(latest_paths(config)) if found else ():
        path.replace(f"{path}.damaged")                 # Or it would take the place of the one before.
    if damaged and not found:
        raise UserError(f"{folder_of(config)} holds only damaged checkpoints: move them away to begin anew")
    return found


def set_aside(config, step):
    """Rename the checkpoints after `step` to *.old: a run that goes on from an earlier one makes its own."""
    for path in [path_of(config, epoch) for epoch in epochs(config)] + latest_paths(config) + snapshots(config):
        if path.exists() and step_in(path) > step:
            warn(f"{path} is of a later step than {step}: renamed to {path.name}.old")
            path.replace(path.with_name(path.name + ".old"))


def forget_latest(config):
    """Remove latest.pth and the one before, of a run that is done."""
    for path in latest_paths(config):
        path.unlink(missing_ok=True)


class Saver:
    """Saves checkpoints while training goes on: the state is copied, then a thread writes it, one at a time.

    Active in the main process alone. A save that fails is reported to the log, leaves the files as they were, and
    the next one comes after RETRY seconds.
    """

    def __init__(self, config, log):
        self.config, self.log = config, log
        self.thread = ThreadPoolExecutor(1)
        self.writing = None                 # The save under way: a future and the step.
        self.succeeded = True               # The last save, as far as it is known.
        self.minutes = config["save_minutes"]
        self.peak, self.copied = 0, 0       # Bytes of GPU memory that training takes without a copy, and of a copy.
        self.next_save = time.monotonic() + 60 * self.minutes
        if log.active:
            make_folder(folder_of(config))

    def is_due(self):
        """True where a save of latest.pth is due and the one before has ended."""
        return (self.log.active and self.config["save_model"] and self.is_idle()
                and time.monotonic() >= self.next_save)

    def is_idle(self):
        """True where no save is under way. One that has failed since is reported."""
        if self.writing and self.writing[0].done():
            self.finish()
        return self.writing is None

    def save(self, state, path):
        """Begin to write a state to model_{epoch}.pth, latest.pth or a snapshot; waits for a save that is under way."""
        if self.log.active and self.config["save_model"]:
            self.finish()
            self.log.flush()                # No checkpoint is newer than metrics.jsonl.
            if any(self.log.pending.values()):
                self.failed(state["step"], f"cannot write {path} before {self.log.path} and TensorBoard's file")
                return
            if torch.cuda.is_available():   # A copy may have been there at the peak.
                self.peak = max(self.peak, torch.cuda.max_memory_allocated() - self.copied)
                self.copied = max(self.copied, sum(tensor.nbytes for tensor in tensors(state)))
            try:
                copy = copied(state, self.peak)
            except (RuntimeError, MemoryError) as e:
                self.failed(state["step"], f"no memory for a copy of what {path} is to hold: {e}")
                return
            self.writing = self.thread.submit(self.write, copy, path), state["step"]
            if path != snapshot_path(self.config, state["step"]):       # Which no run can go on from.
                self.next_save = time.monotonic() + 60 * self.minutes

    def write(self, state, path):
        """In the thread: write the copy of a state; the latest.pth until now becomes latest_before.pth."""
        self.log.sync()
        latest, before = latest_paths(self.config)
        write(path, state(), before if path == latest else None)

    def finish(self):
        """Wait for the save under way. Return True unless the last one failed."""
        if self.writing is not None:
            (future, step), self.writing = self.writing, None
            try:
                future.result()
                self.succeeded = True
            except (UserError, OSError, RuntimeError, MemoryError) as e:
                self.failed(step, str(e))
        return self.succeeded

    def wait(self):
        """Wait for the save under way, from another thread."""
        if writing := self.writing:
            wait([writing[0]])

    def failed(self, step, message):
        """Report a save that failed, and try again soon."""
        self.succeeded = False
        self.next_save = time.monotonic() + min(RETRY, 60 * self.minutes)
        self.log.failed(step, f"{message}; the checkpoints until now are whole and the next save tries again")

    def close(self):
        """Wait for the save under way, and end."""
        self.finish()
        self.thread.shutdown()


def tensors(value):
    """All tensors in a state."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


def copied(state, peak):
    """Copy a state, so that training can go on; return a function that gives the copy, on the CPU, once.

    On a GPU the copy is made there, at the speed of its memory, and brought to the CPU later, beside the training; not
    where it would leave too little for the next step, whose peak is known in bytes.
    """
    def each(value, function):
        if isinstance(value, torch.Tensor):
            return function(value)
        if isinstance(value, dict):
            return {key: each(item, function) for key, item in value.items()}
        return type(value)(each(item, function) for item in value) if isinstance(value, list | tuple) else value

    if not torch.cuda.is_available():
        return [each(state, torch.clone)].pop
    size = sum(tensor.nbytes for tensor in tensors(state))
    try:
        if size > torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - peak:
            raise torch.OutOfMemoryError
        copy = [each(state, torch.clone)]
    except torch.OutOfMemoryError:
        return [each(state, lambda tensor: tensor.to("cpu", copy=True))].pop
    made = torch.cuda.current_stream().record_event()

    def fetch():
        stream = torch.cuda.Stream()        # Not the stream of the training, which need not wait.
        stream.wait_event(made)
        with torch.cuda.stream(stream):
            return each(copy.pop(), torch.Tensor.cpu)
    return fetch


# ----------------------------------------------------------------------------------------------------------------------
# What is in them.

def restore(module, state_dict):
    """Load a state dict into a module. Raises UserError naming the first tensor that does not fit."""
    own = module.state_dict()
    for name in [*own, *state_dict]:
        if name not in state_dict or name not in own or own[name].shape != state_dict[name].shape:
            raise UserError(f"the checkpoint is of another network: they differ in {name}")
    module.load_state_dict(state_dict)


def load_edm(config, epoch, weights, args, device, sigma_rel=None):
    """The EDM for sampling and features, with the "ema" or "model" weights of a checkpoint, or a post-hoc EMA of length
    sigma_rel, and the precision, memory layout and compilation that the command line says.
    Raises UserError as load, check_same_network, restore and posthoc.reconstruct do."""
    state = load(path_of(config, epoch))
    check_same_network(config, state["config"])
    denoiser = edm.build(config, options.amp_dtype(args))
    if sigma_rel is not None:
        restore(denoiser.net, posthoc.reconstruct(state, load_snapshots(config, state["step"]), sigma_rel))
    else:
        restore(denoiser.net, state["ema" if weights == "ema" else "network"])
    denoiser.to(device).eval().requires_grad_(False)
    if args.channels_last:
        denoiser.to(memory_format=torch.channels_last)
    if args.compile if args.compile is not None else device.type == "cuda":
        denoiser.net.compile()
    return denoiser


def check_same_run(config, saved):
    """Raise UserError listing the keys that shape the result and differ between a config and a checkpoint's."""
    free = {"n_epoch", "load_epoch", "data_root", "cache_dir", "classes", "save_dir", "save_model", "save_every",
            "save_minutes", "log_every", "n_sample", "linear", "dynamics_every", "eval_every", "eval"}
    refuse_differences(config, saved, [key for key in config if key not in free], "choose another save_dir")


def check_same_network(config, saved):
    """Raise UserError listing what differs between the networks of a config and of a checkpoint."""
    refuse_differences(config, saved, ["net_type", "network"], "use the config it was trained with")
    if config["diffusion"]["sigma_data"] != saved["diffusion"]["sigma_data"]:
        raise UserError(f"{config['save_dir']} holds a run of another config (diffusion.sigma_data "
                        f"{saved['diffusion']['sigma_data']} there, {config['diffusion']['sigma_data']} here): use the "
                        f"config it was trained with")


def refuse_differences(config, saved, keys, remedy):
    """Raise UserError listing those of `keys` in which two configs differ."""
    def flat(values, prefix=""):
        for key, value in values.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    here, there = (dict(flat({key: values.get(key) for key in keys})) for values in (config, saved))
    differences = [f"{key} {there.get(key)!r} there, {here.get(key)!r} here"
                   for key in here | there if here.get(key) != there.get(key)]
    if differences:
        raise UserError(f"{config['save_dir']} holds a run of another config ({'; '.join(differences)}): {remedy}")
