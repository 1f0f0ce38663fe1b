"""A run's YAML: every key with its type, range and default."""

import contextlib
import difflib
import os
import reprlib
from typing import Annotated, Literal
import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError
from edm2.data import SETS
from edm2.diffusion import NETWORKS
from edm2.errors import UserError

FREE = {"n_epoch", "load_epoch", "data_root", "cache_dir", "classes", "save_dir", "save_model",
        "save_every", "save_minutes", "log_every", "n_sample", "linear", "dynamics_every",
        "eval_every", "eval"}       # Keys that do not shape the result: a run may change them.
TEXTS = {"data_root", "cache_dir", "save_dir", "linear.blockname"}      # Whose --set is no YAML.

def to_number(value):
    """A text such as 2e-2, which YAML 1.1 does not read as a number, and 3.0, as the number."""
    with contextlib.suppress(ValueError):
        value = float(value) if isinstance(value, str) else value
    return int(value) if isinstance(value, float) and value.is_integer() else value

Number = Annotated[float, BeforeValidator(to_number), Field(allow_inf_nan=False, ge=-1e9, le=1e9)]
NotNegative, Positive = Annotated[Number, Field(ge=0)], Annotated[Number, Field(gt=0)]
Fraction, Unit = Annotated[Number, Field(ge=0, lt=1)], Annotated[Number, Field(ge=0, le=1)]
Sigma = Annotated[Number, Field(ge=1e-6, le=1e6)]       # A noise level, of pixels in [-1,1].
SigmaRel = Annotated[Number, Field(ge=0.02, le=0.28)]   # Of an EMA: none is longer than 0.289.
Whole = Annotated[int, BeforeValidator(to_number), Field(le=2**53)]
Count, Index = Annotated[Whole, Field(ge=1, le=10**9)], Annotated[Whole, Field(ge=0)]
Width = Annotated[Count, Field(le=8192)]                # Channels, or pixels of a side.
Timestep = Annotated[Count, Field(le=18)]               # Of the sampler's 18, from the clean end.
Label = Annotated[Index, Field(le=100_000)]             # A class, or how many there are.
Levels = Field(min_length=1, max_length=8)              # A list with an item per level.
Folder = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(os.path.expanduser)]
Alias = BeforeValidator(lambda s: {"cifar": "cifar10", "tiny": "tinyimagenet"}.get(str(s), s))

class Section(BaseModel, strict=True, extra="forbid", frozen=True):
    """Keys and values of the types, ranges and defaults below; no others."""

class Network(Section):
    """The networks' constructor arguments, and their defaults."""
    image_shape: Annotated[list[Width], Field(min_length=3, max_length=3)] = [3, 32, 32]
    n_channels: Annotated[Width, Field(ge=4)] = 128
    ch_mults: Annotated[list[Annotated[Count, Field(le=64)]], Levels] = [1, 2, 2, 2]
    is_attn: Annotated[list[bool], Levels] = [False, True, False, False]
    attn_channels_per_head: Width | None = None
    dropout: Fraction = 0.1
    n_blocks: Annotated[Count, Field(le=16)] = 3
    label_dim: Label = 0                # Number of classes; 0: unconditional.

class Diffusion(Section):
    """Preconditioning, loss and sampler (EDM Table 1)."""
    sigma_data: Sigma = 0.5             # RMS of the pixels.
    p_mean: Annotated[Number, Field(ge=-20, le=20)] = -1.2      # Mean of ln(sigma) in training
    p_std: Annotated[Number, Field(ge=1e-6, le=20)] = 1.2       # and its standard deviation.
    sigma_min: Sigma = 0.002            # Sampler: last noise level
    sigma_max: Sigma = 80.0             # and first one,
    rho: Annotated[Number, Field(ge=0.5, le=100)] = 7.0         # exponent of the schedule,
    S_min: NotNegative = 0.01           # churn from this noise level
    S_max: NotNegative = 1.0            # to this one,
    S_noise: NotNegative = 1.007        # standard deviation of its noise.

class OptimArgs(Section):
    """Arguments of torch.optim's class."""
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    eps: Unit = 1e-8
    weight_decay: NotNegative | None = None         # null: PyTorch's, 0 for Adam, 0.01 for AdamW.

class Eval(Section):
    """What is measured every eval_every epochs, besides the held-out loss."""
    images: Count | None = None         # Test images of the held-out loss, evenly; null: all.
    fid: Index = 0                      # Samples of an FID; 0: none.
    features: Literal["inception", "dinov2", "pixels"] = "inception"
    probe: bool = False                 # A linear probe, as `linear` says.

class PosthocEma(Section):
    """Power-function averages for --sigma_rel (EDM2 section 3)."""
    sigma_rels: Annotated[list[SigmaRel], Field(max_length=8)] = []     # Lengths tracked.
    snapshots: Annotated[Count, Field(ge=2, le=500)] = 64       # Of each, kept over the run.

class Linear(Section):
    """The linear probe."""
    n_epoch: Count = 15
    batch_size: Count = 128
    lrate: Positive = 1e-3
    flip: bool = True                   # Flip half of the training images, draw by draw.
    timestep: Timestep = 4
    blockname: str = "out_6"

class Config(Section):
    """A run."""
    # Data.
    dataset: Annotated[Literal[tuple(SETS)], Alias]
    data_root: Folder = "./data"                # Where the data sets lie or are downloaded to.
    cache_dir: Folder | None = "./cache"        # Decoded data, FID statistics; null: keep none.
    classes: Count | None = None                # That the data must have; null: any.
    flip: bool = False                          # Flip half of the training images left to right.
    augment: Unit = 0.0                         # Probability of each augmentation (flips with it).
    model_type: Literal["EDM"] = "EDM"
    net_type: Literal[tuple(NETWORKS)]
    network: Network = Network()
    # Probability that a training image loses its label; default: 0.1, without label_dim 0.
    label_dropout: Unit = Field(
        default_factory=lambda known: 0.1 if known.get("network", Network()).label_dim else 0.0)
    diffusion: Diffusion = Diffusion()
    # Training.
    n_epoch: Count
    batch_size: Count                           # Images per step, over all processes.
    lrate: Positive
    warm_epoch: NotNegative = 0.0               # Linear warm-up over this many epochs.
    tref_epoch: Positive | None = None          # Start of the 1/√t decay; null: constant.
    optim: Literal["Adam", "AdamW"] = "Adam"
    optim_args: OptimArgs = OptimArgs()
    ema: Fraction = 0.9993
    seed: Index = 0
    load_epoch: Annotated[Whole, Field(ge=-1)] = -1     # From this checkpoint; -1: the newest.
    dynamics_every: Index | None = None         # Steps between records; null: 200 a run; 0: none.
    eval_every: Count | None = None             # Epochs between evaluations; null: none.
    eval: Eval = Eval()
    posthoc_ema: PosthocEma = PosthocEma()
    # Output.
    save_dir: Folder
    save_model: bool = True
    save_every: Count = 100                     # Epochs between checkpoints.
    save_minutes: Positive = 10.0               # Minutes between saves of ckpts/latest.pth.
    log_every: Count = 50                       # Steps between lines of metrics.
    n_sample: Annotated[Count, Field(le=10000)] = 64    # Images in a sample grid.
    linear: Linear = Linear()

    def model_post_init(self, context):
        """Check what may be right key by key and is wrong together."""
        shape, levels = self.network.image_shape, len(self.network.ch_mults)
        n_attn, sigma_rels = len(self.network.is_attn), self.posthoc_ema.sigma_rels
        known = SETS[self.dataset][1] or shape
        assert shape == known, f"network.image_shape is {shape}, but {self.dataset} has {known}"
        assert shape[0] in (1, 3), f"network.image_shape {shape}: images have 1 or 3 channels"
        assert n_attn == levels, f"network.is_attn has {n_attn} entries, network.ch_mults {levels}"
        assert not any(size % 2 ** (levels - 1) for size in shape[1:]), (
            f"network.image_shape {shape} cannot be halved for the {levels} levels of ch_mults")
        assert len(sigma_rels) == len(set(sigma_rels)) != 1, (
            f"posthoc_ema.sigma_rels {sigma_rels} must be two or more different lengths")
        assert self.eval.fid != 1, "eval.fid is the number of samples: one has no covariance"
        assert self.eval_every or not (self.eval.fid or self.eval.probe), "eval needs eval_every"
        assert self.diffusion.sigma_min < self.diffusion.sigma_max, "sigma_min is above sigma_max"

def load_config(path, overrides=()):
    """The Config of a YAML file, after overrides such as "network.dropout=0". Raises UserError for
    what is no YAML, and for a key that is unknown, missing, doubled, of a wrong type or range."""
    try:
        with open(path, encoding="utf-8") as file:
            values = parse_yaml(file.read(), f"config {path}")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read the config {path}: {getattr(e, 'strerror', e)}") from None
    if not isinstance(values, dict):
        raise UserError(f"config {path} must hold keys and values")
    for assignment in overrides:
        name, equals, text = map(str.strip, assignment.partition("="))
        if not equals:
            raise UserError(f"--set {name}: say --set KEY=VALUE")
        (*parents, last), target = name.split("."), values
        for parent in parents:
            below = target.get(parent)
            target[parent] = target = below if isinstance(below, dict) else {}
        is_yaml = text[:1] + text[-1:] in ("''", '""') or text.lower() in ("null", "~")
        target[last] = parse_yaml(text, f"--set {name}") if is_yaml or name not in TEXTS else text
    for name, field in Config.model_fields.items():     # A section may be there and empty.
        if values.get(name, name) is None and isinstance(field.default, Section):
            del values[name]
    try:
        return Config.model_validate(values)
    except ValidationError as e:
        raise UserError(f"config {path}: {explain(e)}") from None

class Loader(yaml.SafeLoader):
    """PyYAML's, but a key that stands twice is an error: PyYAML takes the last."""
    def compose_mapping_node(self, anchor):
        """The node of a mapping."""
        node = super().compose_mapping_node(anchor)
        for i, (key, _) in enumerate(node.value):
            if key.value in [earlier.value for earlier, _ in node.value[:i]]:
                raise ValueError(f"line {key.start_mark.line + 1}: {key.value!r} stands twice")
        return node

def parse_yaml(text, where):
    """The value of a YAML text. Raises UserError where it is none, or says a key twice."""
    try:
        return yaml.load(text, Loader)
    except Exception as e:                      # PyYAML raises whatever a strange text leads it to.
        line = f"line {e.problem_mark.line + 1}: {e.problem}" if hasattr(e, "problem_mark") else e
        raise UserError(f"{where}: not valid YAML: {line}") from None

def explain(error):
    """A ValidationError's first error in one line; of an unknown key, where there is one."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"key {name} is missing"
    if first["type"] != "extra_forbidden":
        message = first["msg"].replace("Input should", "must").removeprefix("Assertion failed, ")
        return f"{name} {message}, not {reprlib.repr(first['input'])}" if name else message
    *parents, last = first["loc"]
    keys = (Config.model_fields[parents[0]].annotation if parents else Config).model_fields
    if near := difflib.get_close_matches(str(last), keys, 1, 0.5):
        return f"unknown key {name}; did you mean {'.'.join([*parents, *near])}?"
    return f"unknown key {name}; the keys are {', '.join(keys)}"
