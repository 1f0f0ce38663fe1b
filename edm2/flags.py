"""The flags that the commands share."""

import argparse
import torch
from pydantic import TypeAdapter, ValidationError
from edm2 import distributed, machine
from edm2.config import Count, Index, SigmaRel, explain
from edm2.errors import warn

def parser(docstring, network=False, sigma_rel=False, config_required=True, passes=True):
    """An argument parser with the flags that the commands share, some only where asked."""
    p = argparse.ArgumentParser(description=docstring,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add, either = p.add_argument, argparse.BooleanOptionalAction
    add("--config", required=config_required, help="YAML file, such as config/cifar10/C.yaml")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a YAML key")
    if passes:
        add("--batch_gpu", type=flag(Count), metavar="N", help="images per process, pass at most")
    if sigma_rel:
        add("--sigma_rel", type=flag(SigmaRel), metavar="S", help="an EMA's length, 0.02 to 0.28")
    if network:
        add("--use_amp", action="store_true", help="float16 on CUDA, bfloat16 on a CPU")
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

def resolve(args, device):
    """Make args.amp_dtype a torch.dtype or None, args.compile a bool; warn of slower ways."""
    cuda, said = device.type == "cuda", []
    name = args.amp_dtype or (args.use_amp and ("float16" if cuda else "bfloat16"))
    args.amp_dtype = getattr(torch, name) if name else None
    if args.amp_dtype == torch.bfloat16 and not machine.has_bfloat16(device):
        faster = "--use_amp, which is float16 there" if cuda else "float32, without --use_amp"
        said.append(f"{machine.device_name(device)} only emulates bfloat16: {faster}, is faster")
    args.compile = cuda if args.compile is None else args.compile
    if args.compile and not machine.has_compiler(device):
        args.compile = False
        said.append("going on without torch.compile, slower: no "
                    f"{'C compiler (gcc)' if cuda else 'C++ compiler (g++)'} was found")
    for line in said if distributed.rank() == 0 else ():
        warn(line)

def precision(dtype):
    """The words for F's dtype: "float32", "float16 mixed precision", ..."""
    return f"{str(dtype).removeprefix('torch.')} mixed precision" if dtype else "float32"
