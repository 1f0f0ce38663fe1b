"""The flags that the commands share."""

import argparse
import torch
from pydantic import TypeAdapter, ValidationError
from edm2.config import Count, Index, SigmaRel, explain

def parser(docstring, network=False, sigma_rel=False, config_required=True):
    """An argument parser with the flags that the commands share, those of the network if asked."""
    p = argparse.ArgumentParser(description=docstring,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add, either = p.add_argument, argparse.BooleanOptionalAction
    add("--config", required=config_required, help="YAML file, such as config/cifar10/C.yaml")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a YAML key")
    add("--batch_gpu", type=flag(Count), metavar="N", help="images per process and pass at most")
    if sigma_rel:
        add("--sigma_rel", type=flag(SigmaRel), metavar="S", help="an EMA's length, 0.02 to 0.28")
    if network:
        add("--use_amp", action="store_const", const="float16", help="mixed precision, of float16")
        add("--amp_dtype", choices=["float16", "bfloat16"], help="mixed precision, of this kind")
        add("--compile", action=either, help="torch.compile (default: on CUDA)")
        add("--channels_last", action=either, default=True, help="activations as (B,H,W,C)")
    return p

def flag(kind):
    """An argparse type from a type of config.py."""
    def convert(value):
        try:
            return TypeAdapter(kind).validate_python(value, strict=True)
        except ValidationError as e:
            raise argparse.ArgumentTypeError(f"{explain(e)}, not {value!r}") from None
    return convert

def epochs(value):
    """An argparse type: epochs with commas between, or "all"."""
    return value if value == "all" else [flag(Index)(item) for item in value.split(",")]

def ranges(kind):
    """An argparse type: numbers of a type of config.py and ranges of them, such as 1-4,8."""
    def convert(value):
        number, found = flag(kind), set()
        for first, _, last in (item.partition("-") for item in value.split(",")):
            found |= set(range(number(first), number(last or first) + 1))
        if not found:
            raise argparse.ArgumentTypeError(f"{value!r} is an empty range")
        return sorted(found)
    return convert

def dtype(name):
    """The torch.dtype of a name, None for None."""
    return name and getattr(torch, name)

def precision(dtype):
    """The words for F's dtype: "float32", "float16 mixed precision", ..."""
    return f"{str(dtype).removeprefix('torch.')} mixed precision" if dtype else "float32"
