"""What a user can say: every YAML key with its check and default, and the flags that the commands share."""

import argparse
import difflib
import math
import os
import reprlib

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
    """Check for a number above 0, of at most 1e9."""
    try:
        value = number(0, 1e9)(value)
    except ValueError:
        value = 0
    if value == 0:
        raise ValueError("a number above 0, of at most 1e+09")
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
    """Check for a non-empty string that can be a file's name."""
    try:
        if not isinstance(value, str) or not 0 < len(value) <= 1000 or b"\0" in value.encode():
            raise ValueError
        return value
    except ValueError:                      # encode() raises one of its own for half of a surrogate pair, "\\ud800".
        raise ValueError("a text of 1 to 1000 characters") from None


def folder(value):
    """Check for the name of a folder; ~ is the user's own."""
    return os.path.expanduser(text(value))          # noqa: PTH111 - Path's own would raise where there is no home.


def one_of(*choices, **aliases):
    """Check for one of a few words, after replacing aliases."""
    def check(value):
        value = aliases.get(value, value) if isinstance(value, str) else value
        if value not in choices:
            raise ValueError("one of " + ", ".join([*choices, *aliases]))
        return value
    return check


def list_of(check_item, shortest, longest=None):
    """Check for a list of shortest..longest items (longest None: exactly shortest), each of which passes check_item."""
    longest = longest or shortest
    def check(value):
        if not isinstance(value, list) or not shortest <= len(value) <= longest:
            raise ValueError(f"a list of {shortest}" + (f" to {longest}" if longest > shortest else ""))
        try:
            return [check_item(item) for item in value]
        except ValueError as e:
            raise ValueError(f"a list of which each is {e}") from None
    return check


def optional(check):
    """Check that lets null pass."""
    return lambda value: None if value is None else check(value)


# ----------------------------------------------------------------------------------------------------------------------
# The keys of a config: (check, default); REQUIRED has no default.

REQUIRED = object()
MOST = 10**9        # Of what can be counted or measured: no run comes near it, and no arithmetic breaks below it.
MAX_LEVELS = 8
SIGMA_REL = 0.02, 0.28      # Of an EMA: for shorter ones a snapshot's rounding counts; none is longer than 0.289.
MAX_WIDTH = 8192    # Channels of a level.

# Image shapes (C,H,W) of the data sets that have only one.
SHAPES = {"digits": [1, 8, 8], "cifar10": [3, 32, 32], "cifar100": [3, 32, 32], "tinyimagenet": [3, 64, 64]}

KEYS = {
    # Data.
    "dataset": (one_of("digits", "cifar10", "cifar100", "tinyimagenet", "folder",
                       cifar="cifar10", tiny="tinyimagenet"), REQUIRED),
    "data_root": (folder, "./data"),                        # Where the data sets lie or are downloaded to.
    "cache_dir": (optional(folder), "./cache"),             # Decoded data sets and FID statistics; null: keep none.
    "classes": (optional(integer(1, MOST)), None),          # Number of classes; for the linear probe.
    "flip": (boolean, False),                               # Flip half of the training images left to right.
    # Network and diffusion.
    "model_type": (one_of("EDM"), "EDM"),
    "net_type": (one_of("UNetC", "UNetE", "UNetG"), REQUIRED),
    "network": {
        "image_shape": (list_of(integer(1, 2048), 3), [3, 32, 32]),     # Channels, height, width.
        "n_channels": (integer(4, MAX_WIDTH), 128),
        "ch_mults": (list_of(integer(1, 64), 1, MAX_LEVELS), [1, 2, 2, 2]),
        "is_attn": (list_of(boolean, 1, MAX_LEVELS), [False, True, False, False]),
        "attn_channels_per_head": (optional(integer(1, MAX_WIDTH)), None),
        "dropout": (fraction, 0.1),
        "n_blocks": (integer(1, 16), 3),
    },
    "diffusion": {
        "sigma_data": (number(1e-6, 1e6), 0.5),
        "p_mean": (number(-20, 20), -1.2),
        "p_std": (number(1e-6, 20), 1.2),
        "sigma_min": (number(1e-6, 1e6), 0.002),
        "sigma_max": (number(1e-6, 1e6), 80.0),
        "rho": (number(0.5, 100), 7.0),
        "S_min": (number(0, 1e6), 0.01),
        "S_max": (number(0, 1e6), 1.0),
        "S_noise": (number(0, 1e6), 1.007),
    },
    # Training.
    "n_epoch": (integer(1, MOST), REQUIRED),
    "batch_size": (integer(1, MOST), REQUIRED),             # Images per step, over all processes.
    "lrate": (positive, REQUIRED),
    "warm_epoch": (number(0, MOST), 0.0),                   # Linear warm-up over this many epochs.
    "tref_epoch": (optional(positive), None),               # Start of the 1/√t decay; null: constant.
    "optim": (one_of("Adam", "AdamW"), "Adam"),
    "optim_args": {
        "betas": (list_of(fraction, 2), [0.9, 0.999]),
        "eps": (number(0, 1), 1e-8),
        "weight_decay": (optional(number(0, 1e6)), None),   # null: PyTorch's, 0 for Adam and 0.01 for AdamW.
    },
    "ema": (fraction, 0.9993),
    "seed": (integer(0, 2**62), 0),
    "load_epoch": (integer(-1, MOST), -1),                  # Go on from this checkpoint; -1: from the newest, if any.
    # Measured on the way.
    "dynamics_every": (optional(integer(0, MOST)), None),   # Steps between records; null: about 200 a run; 0: none.
    "eval_every": (optional(integer(1, MOST)), None),       # Epochs between evaluations of the EMA; null: none.
    "eval": {
        "images": (optional(integer(1, MOST)), None),       # Test images of the held-out loss, evenly; null: all.
        "fid": (integer(0, MOST), 0),                       # Samples of an FID; 0: none.
        "features": (one_of("inception", "dinov2-vit-b-14", "pixels"), "inception"),        # Its features.
        "probe": (boolean, False),                          # A linear probe, as `linear` says.
    },
    "posthoc_ema": {
        "sigma_rels": (list_of(number(*SIGMA_REL), 0, 8), []),     # Relative lengths that are tracked; []: none.
        "snapshots": (integer(2, 10000), 64),               # Of each, kept over the run.
    },
    # Output.
    "save_dir": (folder, REQUIRED),
    "save_model": (boolean, True),
    "save_every": (integer(1, MOST), 100),                  # Epochs between checkpoints.
    "save_minutes": (positive, 10.0),                       # Minutes between saves of ckpts/latest.pth, mid-epoch too.
    "log_every": (integer(1, MOST), 50),                    # Steps between lines of metrics.
    "n_sample": (integer(1, 10000), 64),                    # Images in a sample grid.
    # Linear probe.
    "linear": {
        "n_epoch": (integer(1, MOST), 15),
        "batch_size": (integer(1, MOST), 128),
        "lrate": (positive, 1e-3),
        "timestep": (integer(1, 18), 4),
        "blockname": (text, "out_6"),
    },
}


# ----------------------------------------------------------------------------------------------------------------------
# Reading a config.

MAX_LENGTH, MAX_NODES = 100_000, 10_000     # Of a YAML text, in characters, and of what it unfolds to.

brief = reprlib.Repr()                      # An error's line stays one, whatever the value in it.
brief.maxlevel, brief.maxstring, brief.maxother, brief.maxlong = 2, 60, 60, 60


def show(value):
    """A value as it stands in an error: repr, cut where it is long."""
    try:
        return brief.repr(value)
    except ValueError:                      # A hexadecimal number beyond the digits that Python writes out.
        return f"a {type(value).__name__} of that size"


def check_keys(values, keys, where=""):
    """Return `values` with every key checked against `keys` and defaults filled in.

    Raises UserError for a key that is unknown (naming the nearest), missing, or of the wrong type or range.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where.rstrip('.') or 'the file'} must hold keys and values, not {show(values)}")
    for key in values:
        if key not in keys:
            name = show(key).strip("'")
            near = difflib.get_close_matches(name, list(keys), 1, 0.5)
            raise UserError(f"unknown key {where}{name}" + (f"; did you mean {where}{near[0]}?" if near else
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
            raise UserError(f"{where}{key} must be {e}, not {show(values[key])}") from None
    return checked


def check_together(config):
    """Raise UserError for values that are right one by one and wrong together."""
    network, diffusion, dataset = config["network"], config["diffusion"], config["dataset"]
    shape, levels = network["image_shape"], len(network["ch_mults"])
    if shape != SHAPES.get(dataset, shape):
        raise UserError(f"{dataset} has images of shape {SHAPES[dataset]}, but network.image_shape is {shape}")
    if shape[0] not in (1, 3):
        raise UserError(f"network.image_shape {shape}: image files have 1 or 3 channels, not {shape[0]}")
    if len(network["is_attn"]) != levels:
        raise UserError(f"network.is_attn has {len(network['is_attn'])} entries and network.ch_mults {levels}: "
                        f"each needs one per level")
    if any(size % 2 ** (levels - 1) for size in shape[1:]):
        raise UserError(f"network.image_shape {shape} cannot be halved {levels - 1} times, "
                        f"as the {levels} levels of network.ch_mults need")
    check_widths(network, config["net_type"])
    sigma_rels = config["posthoc_ema"]["sigma_rels"]
    if len(sigma_rels) == 1 or len(set(sigma_rels)) < len(sigma_rels):
        raise UserError(f"posthoc_ema.sigma_rels {sigma_rels}: other lengths are reconstructed from two or more "
                        f"different ones, such as [0.05, 0.10]")
    if len(sigma_rels) * config["posthoc_ema"]["snapshots"] > 4000:
        raise UserError("posthoc_ema: more than 4000 snapshots of all lengths together are too many")
    if config["eval"]["fid"] == 1:
        raise UserError("eval.fid is the number of samples: one has no covariance")
    if config["eval_every"] is None and (config["eval"]["fid"] or config["eval"]["probe"]):
        raise UserError("eval asks for an FID or a probe, but eval_every does not say every how many epochs")
    if diffusion["sigma_min"] >= diffusion["sigma_max"]:
        raise UserError("diffusion.sigma_min must be below diffusion.sigma_max")


def check_widths(network, net_type):
    """Raise UserError where a level is too wide, or attention heads or group norm cannot divide a block's channels."""
    n_channels, n_blocks = network["n_channels"], network["n_blocks"]
    widths = [n_channels * mult for mult in network["ch_mults"]]
    given = f"network.n_channels {n_channels}, network.ch_mults {network['ch_mults']}"
    if max(widths) > MAX_WIDTH:
        raise UserError(f"{given}: a level of {max(widths)} channels is wider than the {MAX_WIDTH} allowed")

    # Channels along the U-Net: the encoder's outputs are the skips that the decoder's blocks take.
    channels, skips = n_channels, [n_channels]
    for width in widths:
        channels = width if n_blocks > 1 else channels
        skips += [channels] * n_blocks          # The lowest level gives one less:
    skips.pop()
    middle = channels
    inputs = []
    for width in reversed(widths):
        for _ in range(n_blocks):
            inputs.append(channels + skips.pop())
            channels = width

    if net_type != "UNetG":                     # Which has no group norm.
        for width, most in [(width, 32) for width in (n_channels, *widths, *inputs)] + [(widths[0], 8)]:
            groups = min(most, width // 4)
            if width % groups:
                raise UserError(f"{given}: {width} channels cannot be divided into {groups} groups by group norm; "
                                f"choose a network.n_channels that is a multiple of 32")
    per_head = network["attn_channels_per_head"]
    attention = [(f"level {level}, which network.is_attn gives attention", width)
                 for level, (width, flag) in enumerate(zip(widths, network["is_attn"], strict=True)) if flag]
    for place, width in [*attention, ("the middle block, which always has attention", middle)]:
        if per_head and width % per_head:
            raise UserError(f"network.attn_channels_per_head {per_head} does not divide the {width} channels of "
                            f"{place} ({given}): choose a divisor, or null for one head")


def check_nodes(text):
    """Raise UserError for a YAML text where a key stands twice (PyYAML takes the last), or aliases unfold too far."""
    nodes, n_nodes = [yaml.compose(text, yaml.SafeLoader)], 0
    while nodes:
        node = nodes.pop()
        n_nodes += 1
        if n_nodes > MAX_NODES:                 # An alias within its own anchor unfolds for ever.
            raise UserError(f"its aliases unfold to more than {MAX_NODES} values: write them out")
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        if isinstance(node, yaml.MappingNode):
            lines = {}
            for key, value in node.value:
                nodes += [key, value]
                if isinstance(key, yaml.ScalarNode):
                    line = key.start_mark.line + 1
                    if key.value in lines:
                        raise UserError(f"key {show(key.value)} stands twice, in lines {lines[key.value]} and {line}: "
                                        f"remove one")
                    lines[key.value] = line


def parse_yaml(text):
    """The value of a YAML text. Raises UserError where it is too long, no YAML, or says something twice."""
    if len(text) > MAX_LENGTH:
        raise UserError(f"it is longer than {MAX_LENGTH} characters, as no config is")
    try:
        check_nodes(text)
        return yaml.safe_load(text)
    except UserError:
        raise
    except Exception as e:                      # PyYAML raises whatever a strange date, tag or nesting leads it to.
        mark = getattr(e, "problem_mark", None)
        raise UserError(f"not valid YAML: {f'line {mark.line + 1}: {e.problem}' if mark else e}"[:300]) from None


def load_config(path, overrides=()):
    """Read a YAML file, apply overrides such as "network.dropout=0", check all and fill in the defaults.

    Raises UserError for what check_keys and check_together find, a missing file and a file that is no YAML.
    """
    values = read(path)
    override(values, overrides)
    try:
        config = check_keys(values, KEYS)
        check_together(config)
    except UserError as e:
        raise UserError(f"config {path}: {e}") from None
    return config


def read(path):
    """The keys and values of a YAML file. Raises UserError where there are none."""
    try:
        with open(path, encoding="utf-8") as f:
            values = parse_yaml(f.read(MAX_LENGTH + 1))
    except OSError as e:
        raise UserError(f"cannot read the config {path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"config {path}: not valid YAML: {e}") from None
    except UserError as e:
        raise UserError(f"config {path}: {e}") from None
    if not isinstance(values, dict):
        raise UserError(f"config {path} must hold keys and values")
    return values


def override(values, assignments):
    """Write what --set says, such as "network.dropout=0", into the values of a config."""
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise UserError(f"--set {assignment}: expected key=value")
        *parents, last = name.strip().split(".")
        target = values
        for parent in parents:
            if not isinstance(target.get(parent), dict):
                target[parent] = {}
            target = target[parent]
        try:
            target[last] = parse_yaml(value)
        except UserError as e:
            raise UserError(f"--set {name}: {e}") from None


# ----------------------------------------------------------------------------------------------------------------------
# Command line: what the commands share.

def parser(docstring, config_required=True):
    """An argument parser with the flags that every command takes."""
    p = argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--config", required=config_required, help="YAML file, such as config/cifar10/C.yaml")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the YAML")
    p.add_argument("--batch_gpu", type=argument(integer(1)), metavar="N", help="images per process and pass at most")
    return p


def sigma_rel_flag(p):
    """Add the flag of the commands that use an EMA."""
    p.add_argument("--sigma_rel", type=argument(number(*SIGMA_REL)), metavar="S",
                   help="with the EMA of this relative length, 0.02 to 0.28 (of a run with posthoc_ema.sigma_rels)")


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
            raise argparse.ArgumentTypeError(f"must be {e}, not {show(value)}") from None
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
