"""What a user can say: every YAML key with its check and default, and the flags that the commands share."""

import argparse
import difflib
import math
from pathlib import Path

import torch
import yaml

from runtime import UserError

# ----------------------------------------------------------------------------------------------------------------------
# Checks: each returns the value it accepts, or raises ValueError with the words for what it expects.

def number(low=-math.inf, high=math.inf):
    """Check for a finite number in [low, high]; strings such as 2e-2, which YAML 1.1 does not read as a number, too."""
    def check(value):
        try:
            if isinstance(value, bool) or not low <= float(value) <= high or math.isinf(float(value)):
                raise ValueError
            return float(value)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"a number{describe_range(low, high)}") from None
    return check


def positive(value):
    """Check for a finite number above 0."""
    try:
        value = number(0)(value)
    except ValueError:
        value = 0
    if value == 0:
        raise ValueError("a number above 0")
    return value


def fraction(value):
    """Check for a number in [0, 1)."""
    value = number(0, 1)(value)
    if value == 1:
        raise ValueError("below 1")
    return value


def integer(low=-math.inf, high=math.inf):
    """Check for a whole number in [low, high]."""
    def check(value):
        try:
            exact = number(low, high)(value)
            if not exact.is_integer():
                raise ValueError
            return value if isinstance(value, int) else int(exact)
        except ValueError:
            raise ValueError(f"a whole number{describe_range(low, high)}") from None
    return check


def describe_range(low, high):
    """The words for the range [low, high] in an error."""
    if math.isinf(low) and math.isinf(high):
        return ""
    return f" of {low:g} or more" if math.isinf(high) else f" from {low:g} to {high:g}"


def boolean(value):
    """Check for true or false."""
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def text(value):
    """Check for a non-empty string."""
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError("a text")
    return value


def one_of(*choices, **aliases):
    """Check for one of a few words, after replacing aliases."""
    def check(value):
        value = aliases.get(value, value) if isinstance(value, str) else value
        if value not in choices:
            raise ValueError("one of " + ", ".join([*choices, *aliases]))
        return value
    return check


def list_of(check_item, length=None):
    """Check for a list (of `length` items), each of which passes check_item."""
    def check(value):
        if not isinstance(value, list) or not value or length not in (None, len(value)):
            raise ValueError(f"a list of {length}" if length else "a list")
        return [check_item(item) for item in value]
    return check


def optional(check):
    """Check that lets null pass."""
    return lambda value: None if value is None else check(value)


# ----------------------------------------------------------------------------------------------------------------------
# The keys of a config: (check, default); REQUIRED has no default.

REQUIRED = object()

KEYS = {
    # Data.
    "dataset": (one_of("digits", "cifar10", "cifar100", "tinyimagenet", "folder",
                       cifar="cifar10", tiny="tinyimagenet"), REQUIRED),
    "data_root": (text, "./data"),                          # Where the data sets lie or are downloaded to.
    "classes": (optional(integer(1)), None),                # Number of classes; for the linear probe.
    "flip": (boolean, False),                               # Flip half of the training images left to right.
    # Network and diffusion.
    "model_type": (one_of("EDM"), "EDM"),
    "net_type": (one_of("UNetC", "UNetE", "UNetG"), REQUIRED),
    "network": {
        "image_shape": (list_of(integer(1, 4096), 3), [3, 32, 32]),     # Channels, height, width.
        "n_channels": (integer(4, 8192), 128),
        "ch_mults": (list_of(integer(1, 64)), [1, 2, 2, 2]),
        "is_attn": (list_of(boolean), [False, True, False, False]),
        "attn_channels_per_head": (optional(integer(1)), None),
        "dropout": (fraction, 0.1),
        "n_blocks": (integer(1, 64), 3),
    },
    "diffusion": {
        "sigma_data": (positive, 0.5),
        "p_mean": (number(), -1.2),
        "p_std": (positive, 1.2),
        "sigma_min": (number(1e-6, 1e6), 0.002),
        "sigma_max": (number(1e-6, 1e6), 80.0),
        "rho": (number(0.5, 100), 7.0),
        "S_min": (number(0), 0.01),
        "S_max": (number(0), 1.0),
        "S_noise": (number(0), 1.007),
    },
    # Training.
    "n_epoch": (integer(1), REQUIRED),
    "batch_size": (integer(1), REQUIRED),                   # Images per step, over all processes.
    "lrate": (positive, REQUIRED),
    "warm_epoch": (number(0), 0.0),                         # Linear warm-up over this many epochs.
    "tref_epoch": (optional(positive), None),               # Start of the 1/√t decay; null: constant.
    "optim": (one_of("Adam", "AdamW"), "Adam"),
    "optim_args": {
        "betas": (list_of(fraction, 2), [0.9, 0.999]),
        "eps": (number(0), 1e-8),
        "weight_decay": (optional(number(0)), None),        # null: PyTorch's, 0 for Adam and 0.01 for AdamW.
    },
    "ema": (fraction, 0.9993),
    "seed": (integer(0, 2**62), 0),
    "load_epoch": (integer(-1), -1),                        # Go on from this checkpoint; -1: from the newest, if any.
    # Output.
    "save_dir": (text, REQUIRED),
    "save_model": (boolean, True),
    "save_every": (integer(1), 100),                        # Epochs between checkpoints.
    "log_every": (integer(1), 50),                          # Steps between lines of metrics.
    "n_sample": (integer(1, 10000), 64),                    # Images in a sample grid.
    # Linear probe.
    "linear": {
        "n_epoch": (integer(1), 15),
        "batch_size": (integer(1), 128),
        "lrate": (positive, 1e-3),
        "timestep": (integer(1, 18), 4),
        "blockname": (text, "out_6"),
    },
}


# ----------------------------------------------------------------------------------------------------------------------
# Reading a config.

def check_keys(values, keys, where=""):
    """Return `values` with every key checked against `keys` and defaults filled in.

    Raises UserError for a key that is unknown (naming the nearest), missing, or of the wrong type or range.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where.rstrip('.') or 'the file'} must hold keys and values, not {values!r}")
    for key in values:
        if key not in keys:
            near = difflib.get_close_matches(str(key), list(keys), 1, 0.5)
            raise UserError(f"unknown key {where}{key}" + (f"; did you mean {where}{near[0]}?" if near else
                            f"; the keys are {', '.join(keys)}"))
    checked = {}
    for key, rule in keys.items():
        if isinstance(rule, dict):
            checked[key] = check_keys({} if values.get(key) is None else values[key], rule, f"{where}{key}.")
            continue
        check, default = rule
        if key not in values:
            if default is REQUIRED:
                raise UserError(f"key {where}{key} is missing")
            checked[key] = default
            continue
        try:
            checked[key] = check(values[key])
        except ValueError as e:
            raise UserError(f"{where}{key} must be {e}, not {values[key]!r}") from None
    return checked


def check_together(config):
    """Raise UserError for values that are right one by one and wrong together."""
    network, diffusion = config["network"], config["diffusion"]
    levels = len(network["ch_mults"])
    if len(network["is_attn"]) != levels:
        raise UserError(f"network.is_attn has {len(network['is_attn'])} entries and network.ch_mults {levels}: "
                        f"each needs one per level")
    if any(size % 2 ** (levels - 1) for size in network["image_shape"][1:]):
        raise UserError(f"network.image_shape {network['image_shape']} cannot be halved {levels - 1} times, "
                        f"as the {levels} levels of network.ch_mults need")
    if diffusion["sigma_min"] >= diffusion["sigma_max"]:
        raise UserError("diffusion.sigma_min must be below diffusion.sigma_max")


def load_config(path, overrides=()):
    """Read a YAML file, apply overrides such as "network.dropout=0", check all and fill in the defaults.

    Raises UserError for what check_keys and check_together find, a missing file and a file that is no YAML.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"cannot read the config {path}: {e.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as e:       # ValueError: such as a date of month 13.
        raise UserError(f"the config {path} is not valid YAML: {e}") from None
    if not isinstance(values, dict):
        raise UserError(f"the config {path} must hold keys and values")
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"--set {override}: expected key=value")
        *parents, last = name.strip().split(".")
        target = values
        for parent in parents:
            if not isinstance(target.get(parent), dict):
                target[parent] = {}
            target = target[parent]
        try:
            target[last] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise UserError(f"--set {override}: {value!r} is not valid YAML") from None
    try:
        config = check_keys(values, KEYS)
        check_together(config)
    except UserError as e:
        raise UserError(f"config {path}: {e}") from None
    return config


# ----------------------------------------------------------------------------------------------------------------------
# Command line: what the commands share.

def parser(docstring, config_required=True):
    """An argument parser with the flags that every command takes."""
    p = argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--config", required=config_required, help="YAML file, such as config/cifar10/C.yaml")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the YAML")
    p.add_argument("--batch_gpu", type=argument(integer(1)), metavar="N", help="images per process and pass at most")
    return p


def network_flags(p):
    """Add the flags of the commands that run the network."""
    p.add_argument("--use_amp", action="store_true", help="mixed precision")
    p.add_argument("--amp_dtype", choices=["float16", "bfloat16"],
                   help="mixed precision of this kind (default of --use_amp: float16, in training with a GradScaler)")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)")
    p.add_argument("--channels_last", action=argparse.BooleanOptionalAction, default=True,
                   help="memory layout (B,H,W,C) of the activations")


def argument(check):
    """An argparse type from a check of a key."""
    def convert(value):
        try:
            return check(value)
        except ValueError as e:
            raise argparse.ArgumentTypeError(f"must be {e}, not {value!r}") from None
    return convert


def comma_list(check):
    """An argparse type: items with commas between, each of which passes `check`."""
    return lambda value: [argument(check)(item.strip()) for item in value.split(",")]


def span(low, high):
    """An argparse type: whole numbers and ranges of them in [low, high], such as 1-4,8."""
    def convert(value):
        numbers = []
        for item in value.split(","):
            first, dash, last = item.partition("-")
            first = argument(integer(low, high))(first)
            last = argument(integer(low, high))(last) if dash else first
            numbers += range(first, last + 1)
        if not numbers:
            raise argparse.ArgumentTypeError(f"{value!r} is an empty range")
        return sorted(set(numbers))
    return convert


def epochs(value):
    """An argparse type: epochs with commas between, or "all"."""
    return value if value == "all" else comma_list(integer(0))(value)


def amp_dtype(args):
    """The dtype that --use_amp and --amp_dtype ask for: torch.float16, torch.bfloat16 or None for fp32."""
    if args.use_amp or args.amp_dtype:
        return getattr(torch, args.amp_dtype or "float16")
    return None


def precision(args):
    """The words for the precision: "float32", "float16 mixed precision" or "bfloat16 mixed precision"."""
    dtype = amp_dtype(args)
    return f"{str(dtype).removeprefix('torch.')} mixed precision" if dtype else "float32"
