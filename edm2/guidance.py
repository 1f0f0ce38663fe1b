"""Guidance on the command line: for sample.py, which guides, and fid.py, which scores that."""

from argparse import ArgumentTypeError
from pathlib import Path
from types import SimpleNamespace
from pydantic import ValidationError
from edm2 import checkpoint, files
from edm2.config import Config, NotNegative, SigmaRel, explain, load_config
from edm2.errors import UserError
from edm2.flags import flag

FLAGS = "guidance", "guidance_interval", "guide", "guide_sigma_rel"

def add_flags(p):
    """Add the flags to an argument parser."""
    p.add_argument("--guidance", type=flag(NotNegative), metavar="W",
                   help="weight of guidance, classifier-free unless a guide is named; 1: none")
    p.add_argument("--guidance_interval", type=interval, metavar="LO,HI",
                   help="only for noise levels LO < sigma <= HI, such as 0.2,5")
    p.add_argument("--guide", metavar="CONFIG_OR_RUN[:EPOCH]",
                   help="autoguidance by this run (default: itself; epoch: its newest)")
    p.add_argument("--guide_sigma_rel", type=flag(SigmaRel), metavar="S",
                   help="autoguidance by a post-hoc EMA of this length")

def interval(text):
    """An argparse type: two noise levels, the lower one first."""
    ends = [flag(NotNegative)(item) for item in text.split(",")]
    if len(ends) != 2 or ends[0] >= ends[1]:
        raise ArgumentTypeError(f"say LO,HI with LO below HI, not {text!r}")
    return ends

def words(args):
    """The flags as they were given, for a command line."""
    given = {name: value for name in FLAGS if (value := getattr(args, name)) is not None}
    return [word for name, value in given.items() for word in (
        f"--{name}", ",".join(f"{x:g}" for x in value) if isinstance(value, list) else value)]

def find(args, config, epoch):
    """Guidance of a run's epoch as settings.json holds it, all None for none, and the guide's
    Config and epoch, None for classifier-free. Raises UserError where it cannot be guided so."""
    if args.guidance is None and (given := words(args)):
        raise UserError(f"{given[0]} needs --guidance W")
    if args.guidance in (None, 1):
        return dict.fromkeys(("guidance", "guidance_interval", "guide")), None
    guide, made = None, None
    if args.guide is not None or args.guide_sigma_rel:
        guide = (config, epoch) if args.guide is None else find_run(args.guide)
        for name in ("image_shape", "label_dim"):
            here, there = (getattr(one.network, name) for one in (config, guide[0]))
            if here != there:
                raise UserError(f"--guide {args.guide}: its network.{name} is {there}, here {here}")
        of, own = (files.sha256(checkpoint.path_of(*one)) for one in (guide, (config, epoch)))
        if (of, args.guide_sigma_rel) == (own, args.sigma_rel) and args.weights != "model":
            raise UserError("the guide is the network itself: name another run, epoch or EMA")
        made = {"run": Path(guide[0].save_dir).name, "epoch": guide[1], "checkpoint_sha256": of,
                "sigma_rel": args.guide_sigma_rel}
    elif not (config.network.label_dim and config.label_dropout):
        raise UserError("--guidance without --guide or --guide_sigma_rel is classifier-free: it "
                        "needs a run with network.label_dim and label_dropout above 0")
    return {"guidance": args.guidance, "guidance_interval": args.guidance_interval,
            "guide": made}, guide

def find_run(name):
    """The Config and epoch of CONFIG[:EPOCH] or RUN[:EPOCH], a YAML file or a save_dir."""
    path, _, number = name.rpartition(":")
    path, epoch = (path, int(number)) if path and number.isdecimal() else (name, None)
    if not Path(path).is_dir():
        config = load_config(path)
        return config, checkpoint.find(config, epoch)
    place = SimpleNamespace(save_dir=path, n_epoch=None)
    epoch = checkpoint.find(place, epoch)
    saved = checkpoint.load(checkpoint.path_of(place, epoch))["config"]
    try:
        return Config.model_validate(saved | {"save_dir": path}), epoch
    except ValidationError as e:
        raise UserError(f"--guide {path}: {explain(e)}") from None

def variant(made):
    """Settings of guidance in the name of the samples' folder; nothing for no guidance."""
    guide, span = made.get("guide") or {}, made.get("guidance_interval")
    parts = [f"guidance{made['guidance']:g}"] if made.get("guidance") is not None else []
    parts += [f"interval{span[0]:g}-{span[1]:g}"] if span else []
    parts += [f"guide{guide['epoch']}", guide["checkpoint_sha256"][:8]] if guide else []
    parts += [f"ema{guide['sigma_rel']:g}"] if guide.get("sigma_rel") else []
    return "".join(f"_{part}" for part in parts)
