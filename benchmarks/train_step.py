"""A training step: train.py's against the plain path and a public peer, in turns, in one run.

    python benchmarks/train_step.py                          # 39.5M networks; batch 8 on the CPU
    python benchmarks/train_step.py --configs digits/G --batch 64
    python benchmarks/train_step.py --configs digits/G --batch 64 --tree ../before --rounds 101
    python benchmarks/train_step.py --configs cifar10/G --also augment=0.12
    python benchmarks/train_step.py --compile --profile      # torch.compile on the CPU: minutes
    python benchmarks/train_step.py --amp_dtype bfloat16 --peer     # needs requirements.txt
    python benchmarks/train_step.py --and_bfloat16 --tree ../before

train.py: train.py itself, a step from its signals.hold to its signals.agree; what comes at an
epoch's end is not in it. plain: the same mathematics as the predecessor runs it: eager, NCHW, Adam
and EMA tensor by tensor, one DataLoader worker with PIL transforms, the loss fetched in every step.
peer: the Karras U-Net (Config G) of denoising-diffusion-pytorch at the width and blocks of ours, in
the plain loop. --tree: another checkout of this repository, on this one's config; instead of plain,
whose worker would disturb the side that comes after it. Each is a process of its own.
"""

import argparse
import collections
import contextlib
import io
import json
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock
import torch
from sides import ROOT, alternate, machine, ratios, times_faster
from edm2 import diffusion, distributed, dynamics
from edm2.config import load_config
from edm2.machine import peak_flops

N_TRAIN = {"digits": 1437, "tinyimagenet": 100_000}     # Images; of the others 50,000.
# No output and no evaluation; the sample grid of epoch 0, which is not timed, as small as can be.
QUIET = ["save_model=false", "eval_every=null", "n_sample=1"]

def main():
    """Time each config's sides and print the tables."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--configs", nargs="+", default=["cifar10/C", "cifar10/E", "cifar10/G"])
    p.add_argument("--batch", type=int,
                   help="images per step (default: 8 on the CPU, else that of the config)")
    p.add_argument("--amp_dtype", choices=["float16", "bfloat16"])
    p.add_argument("--and_bfloat16", action="store_true",
                   help="train.py, and --tree's, in bfloat16 too, in turns with float32")
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                   help="override another key of every side's config")
    p.add_argument("--no_shares", action="store_true", help="not what data, EMA and figures take")
    p.add_argument("--json", type=Path, metavar="FILE", help="the table, for benchmarks/gpu.py")
    p.add_argument("--tree", type=Path, action="append", default=[], metavar="PATH",
                   help="train.py of another checkout (again for more) instead of plain")
    p.add_argument("--also", action="append", default=[], metavar="KEY=VALUE",
                   help="train.py with another value of a key (again for more) instead of plain")
    p.add_argument("--peer", action="store_true", help="the Karras U-Net, too")
    p.add_argument("--compile", action="store_true",
                   help="train.py --compile, too: on the CPU that is not the default")
    p.add_argument("--profile", action="store_true", help="where the time of a step goes, too")
    args = p.parse_args()
    cpu, amp_dtype = not torch.cuda.is_available(), args.amp_dtype
    overrides = ["dynamics_every=0", *args.set]
    if args.batch or cpu:
        overrides.append(f"batch_size={args.batch or 8}")
    configs = {name: load_config(ROOT / "config" / f"{name}.yaml", overrides)
               for name in args.configs}

    sides = {}
    for name, config in configs.items():
        sides[f"{name}, train.py"] = (fast, ROOT, name, overrides, amp_dtype)
        if args.compile and cpu:
            sides[f"{name}, train.py --compile"] = (fast, ROOT, name, overrides, amp_dtype, True)
        for tree in args.tree:
            sides[f"{name}, {tree}"] = (fast, tree.resolve(), name, overrides, amp_dtype)
        for tree in [ROOT, *args.tree] if args.and_bfloat16 else []:
            side = f"{name}, {'train.py' if tree == ROOT else tree} in bfloat16"
            sides[side] = (fast, tree.resolve(), name, overrides, "bfloat16")
        for setting in args.also:
            sides[f"{name}, {setting}"] = (fast, ROOT, name, [*overrides, setting], amp_dtype)
        if not args.tree and not args.also:
            sides[f"{name}, plain"] = (plain, config, amp_dtype)
    if args.peer:
        sides["peer"] = (peer, config, amp_dtype)
    timings = alternate(sides, args.rounds)
    rows = print_steps(timings, configs, amp_dtype)
    if args.json:
        args.json.write_text(json.dumps(rows))
    compare(timings, args)
    if not args.no_shares:
        print_shares(configs, overrides, amp_dtype)
    if args.profile:
        found = {side: alternate({side: (profile, *how)}, 1, 1)[side].returned[0]
                 for side, how in sides.items() if side != "peer"}
        print(f"\n| seconds of a step, by name of the operation | {' | '.join(found)} |\n"
              + "|---" * (len(found) + 1) + "|")
        for kind in [*KINDS, "other"]:
            print(f"| {kind} | {' | '.join(f'{parts[kind]:.3f}' for parts in found.values())} |")

def print_steps(timings, configs, amp_dtype):
    """Print the table of steps; return what benchmarks/gpu.py takes of it."""
    rows, reached = [], max(matrix_flops(amp_dtype) for _ in range(3))
    print(f"`{shlex.join(['python', *sys.argv])}`, {machine()}; a matrix product reaches "
          f"{reached / 1e12:.3g} TFLOP/s\n")
    peak = peak_flops(distributed.init()) if amp_dtype else None
    print("| side | parameters | batch | step, median (s) | least to most | img/s | TFLOP/s "
          "| of a matrix product's | MFU | peak memory (GB) | page faults "
          "| times faster than plain |\n" + "|---" * 12 + "|")
    for side, timing in timings.items():
        name = side.partition(",")[0]
        config = list(configs.values())[-1] if name == "peer" else configs[name]
        n_parameters, gflop = peer_cost(config) if name == "peer" else diffusion.cost(config)
        B, flops = config.batch_size, gflop * 1e9 * config.batch_size / timing.median
        against = timings.get(f"{name}, plain")
        faster = f"{times_faster(timing, against):.2f}" if against else "-"
        print(f"| {side} | {n_parameters:,} | {B} | {timing.median:.4f} "
              f"| {min(timing.seconds):.4f} to {max(timing.seconds):.4f} | {B / timing.median:.1f} "
              f"| {flops / 1e12:.3f} | {flops / reached:.1%} "
              f"| {f'{flops / peak:.1%}' if peak else '-'} | {timing.memory:.2f} "
              f"| {statistics.median(timing.faults):,.0f} | {faster} |")
        rows.append({"side": side, "batch": B, "seconds": timing.median,
                     "img_per_s": B / timing.median, "MFU": peak and flops / peak,
                     "memory": timing.memory,
                     "faster": times_faster(timing, against) if against else None})
    return rows

def print_shares(configs, overrides, amp_dtype):
    """Print what a step of train.py spends beside the network."""
    print("\n| train.py | data (draws, look-up) | EMA | figures, every 50 steps | together "
          "| optimizer | a record of dynamics | all of them in the run |\n" + "|---" * 8 + "|")
    for name, config in configs.items():
        timing = alternate({name: (shares, name, overrides, amp_dtype)}, 5)[name]
        for part, seconds in zip(timing.returned, timing.seconds, strict=True):
            part["step"] = seconds - part["dynamics"] - part["figures"]
        share = {key: statistics.median(part[key] / part["step"] for part in timing.returned)
                 for key in timing.returned[0]}
        steps = config.n_epoch * (N_TRAIN.get(config.dataset, 50_000) // config.batch_size)
        waiting = share["data"] + share["ema"] + share["figures"] / 50
        print(f"| {name} | {share['data']:.2%} | {share['ema']:.2%} | {share['figures'] / 50:.2%} "
              f"| {waiting:.2%} | {share['optimizer']:.2%} | {share['dynamics']:.1%} of a step "
              f"| {share['dynamics'] / dynamics.default_every(steps):.2%} |", flush=True)

def compare(timings, args):
    """Print how train.py's step compares with those of other checkouts, and with the peer's."""
    for name in args.configs:
        for tree in [*args.tree, *args.also]:
            found = ratios(timings[f"{name}, train.py"], timings[f"{name}, {tree}"])
            low, median, high = statistics.quantiles(found, n=4)
            print(f"\nA step of {name} takes {median:.3f} times as long as that of {tree} (median "
                  f"of the rounds' ratios; half of them are from {low:.3f} to {high:.3f})")
        for tree in ["train.py", *args.tree] if args.and_bfloat16 else []:
            half = timings[f"{name}, {tree} in bfloat16"]
            print(f"\n{name}, {tree}: times faster in bfloat16 than in float32: "
                  f"{times_faster(half, timings[f'{name}, {tree}']):.2f}")
    if args.peer:
        ways = {side: times_faster(timing, timings["peer"]) for side, timing in timings.items()
                if side.partition(",")[0] == args.configs[-1]}
        print("\nTimes faster than the peer in the plain loop: "
              + "; ".join(f"{side} {faster:.2f}" for side, faster in ways.items()))

def matrix_flops(amp_dtype):
    """FLOP/s of one large matrix product."""
    device = distributed.init()
    n = 8192 if device.type == "cuda" else 512 if amp_dtype else 2048       # Emulated: minutes.
    a = torch.randn(n, n, device=device, dtype=getattr(torch, amp_dtype or "float32"))
    for _ in range(2):                      # The first is a warm-up.
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return 2 * n ** 3 / seconds

def random_images(batch_size, shape):
    """A data set of noise, (N,C,H,W) uint8: as many images as CIFAR-10 has on a GPU, fewer on the
    CPU."""
    n = 50_000 if torch.cuda.is_available() else max(1024, batch_size)
    return torch.randint(0, 256, (n, *shape), dtype=torch.uint8)

# ----------------------------------------------------------------------------------------------
# train.py.

class Steps:
    """train.py's signals, of which there are none: a step is a turn, from defer() to agree()."""
    def __init__(self, turns):
        self.turns = turns

    def defer(self, deferred):
        """Before a step; not deferred: at an epoch's end."""
        if deferred:
            self.turns.begin()
    hold = defer                # Its name in earlier checkouts.

    def agree(self, save):
        """After a step: there is no signal and no save."""
        self.turns.end()
        return 0, False

def fast(tree, name, overrides, amp_dtype, compiled=None):
    """Training by the train.py of a checkout, with a config of this one, on random images."""
    path = ROOT / "config" / f"{name}.yaml"
    if tree != ROOT:
        for module in [name for name, module in sys.modules.items() if Path(
                getattr(module, "__file__", None) or "/").parent in (ROOT, ROOT / "edm2")]:
            del sys.modules[module]
        sys.path.insert(0, str(tree))
    import train
    from edm2 import data, distributed
    argv = ["train.py", "--config", str(path), *(["--compile"] if compiled else [])]
    argv += ["--amp_dtype", amp_dtype] if amp_dtype else []

    def load(config):
        images = random_images(config.batch_size, config.network.image_shape)
        return images, torch.full([len(images)], -1)

    def run(turns):
        with (tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()),
              contextlib.redirect_stderr(io.StringIO()), mock.patch.object(data, "load", load),
              mock.patch.object(distributed, "Signals", lambda: Steps(turns))):
            words = [*overrides, *QUIET, f"save_dir={folder}"]
            words = [word for override in words for word in ("--set", override)]
            with mock.patch.object(sys, "argv", [*argv, *words]):
                train.main()
    return run

# ----------------------------------------------------------------------------------------------
# The other sides: each function returns one that makes a training step.

def plain(config, amp_dtype):
    """The step as the predecessor makes it, of our network."""
    denoiser = diffusion.build(config, amp_dtype and getattr(torch, amp_dtype))
    return plain_loop(denoiser, config, amp_dtype)

def peer(config, amp_dtype):
    """The Karras U-Net in the plain loop; preconditioning and loss are ours."""
    return plain_loop(peer_denoiser(config, amp_dtype), config, amp_dtype)

def plain_loop(denoiser, config, amp_dtype):
    """A training step without anything that makes it fast."""
    from ema_pytorch import EMA
    device = distributed.init()
    denoiser.to(device).train()
    ema = EMA(denoiser.net, beta=config.ema, update_after_step=0, update_every=1)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=config.lrate,
                                 betas=config.optim_args.betas, foreach=False, fused=False)
    scaler = torch.amp.GradScaler(device.type, init_scale=64.0, enabled=amp_dtype == "float16")
    batches = plain_batches(random_images(config.batch_size, config.network.image_shape),
                            config.batch_size)

    def step():
        y = next(batches).to(device)
        loss, _ = denoiser(y, torch.randn(len(y), device=device), torch.randn_like(y))
        optimizer.zero_grad()
        scaler.scale(loss.sum() * y[0].numel() / len(y)).backward()
        scaler.unscale_(optimizer)
        for p in denoiser.parameters():
            if p.grad is not None:          # The peer has parameters that it does not use.
                torch.nan_to_num(p.grad, nan=0, posinf=0, neginf=0, out=p.grad)
        scaler.step(optimizer)
        scaler.update()
        ema.update()
        return loss.mean().item()
    return step

class Pictures(torch.utils.data.Dataset):
    """Images (N,C,H,W) uint8 by way of PIL, flipped at random."""
    def __init__(self, images):
        from torchvision import transforms
        self.pixels = images.permute(0, 2, 3, 1).numpy()
        self.transform = transforms.Compose([transforms.RandomHorizontalFlip(),
                                             transforms.ToTensor()])

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        from PIL import Image
        image = self.pixels[i]
        image = image[..., 0] if image.shape[-1] == 1 else image
        return self.transform(Image.fromarray(image)) * 2 - 1

def plain_batches(images, batch_size):
    """Batches (B,C,H,W) in [-1,1] from one DataLoader worker, without end."""
    loader = torch.utils.data.DataLoader(
        Pictures(images), batch_size, shuffle=True, drop_last=True, num_workers=1,
        pin_memory=torch.cuda.is_available())
    while True:
        yield from loader

# ----------------------------------------------------------------------------------------------
# The peer.

class KarrasUnet(torch.nn.Module):
    """The peer's U-Net with the calls of ours: its levels double up to the widest of ch_mults."""
    def __init__(self, network):
        from denoising_diffusion_pytorch import KarrasUnet as Peer
        super().__init__()
        size, dim, mults = network.image_shape[-1], network.n_channels, network.ch_mults
        self.net = Peer(image_size=size, channels=network.image_shape[0], dim=dim,
                        dim_max=dim * max(mults), num_downsamples=len(mults) - 1,
                        num_blocks_per_stage=network.n_blocks - 1,
                        attn_res=tuple(size >> level for level, flag in enumerate(network.is_attn)
                                       if flag),
                        attn_dim_head=network.attn_channels_per_head, fourier_dim=dim,
                        dropout=network.dropout, attn_flash=True)

    def forward(self, x, c_noise, label=None, augment=None, return_features=False):
        return self.net(x, c_noise)

def peer_denoiser(config, amp_dtype):
    """Our preconditioning and loss around the peer's network."""
    return diffusion.EDM(KarrasUnet(config.network), diffusion.build(config).uncertainty, config,
                         amp_dtype and getattr(torch, amp_dtype))

def peer_cost(config):
    """As diffusion.cost, of the peer."""
    from torch.utils.flop_counter import FlopCounterMode
    denoiser = peer_denoiser(config, None)
    y = torch.randn(1, *config.network.image_shape)
    with FlopCounterMode(display=False) as counter:
        denoiser(y, torch.randn(1), torch.randn_like(y))[0].sum().backward()
    return (sum(p.numel() for p in denoiser.net.parameters()),
            counter.get_total_flops() / 1e9)

# ----------------------------------------------------------------------------------------------
# Where a step's time goes.

def shares(name, overrides, amp_dtype):
    """Steps of train.py with all figures and a record of the dynamics in each, which return the
    seconds of their parts; the device is waited for around each part."""
    import train
    from edm2 import data, log
    spent = collections.defaultdict(float)

    def wait():
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def time_spent(key, owner, name):
        function = getattr(owner, name)

        def call(*arguments, **named):
            wait()
            start = time.perf_counter()
            value = function(*arguments, **named)
            wait()
            part = "dynamics" if "dynamics" in arguments else key       # Of Log.write.
            spent[part] += time.perf_counter() - start
            return value
        setattr(owner, name, call)

    for key, owner, name_of in (
            ("data", data, "draw"), ("ema", train.Averages, "update"),
            ("optimizer", torch.amp.GradScaler, "step"), ("figures", train.Run, "metrics"),
            ("figures", diffusion.Throughput, "read"), ("figures", log.Log, "write"),
            ("dynamics", dynamics.Recorder, "before_update"),
            ("dynamics", dynamics.Recorder, "after_update")):
        time_spent(key, owner, name_of)
    function = fast(ROOT, name, [*overrides, "dynamics_every=1", "log_every=1"], amp_dtype)

    def run(turns):
        turns.before = lambda: spent.update(dict.fromkeys(
            ("data", "ema", "figures", "optimizer", "dynamics", "step"), 0.0))
        turns.after = lambda: dict(spent)
        turns.take(function)
    return run

# What the names of PyTorch's operations hold; of a GPU's kernels, whose names tell less, a guess.
KINDS = {
    "convolutions": ("conv", "cudnn", "xmma", "implicit", "wgrad", "dgrad"),
    "attention and matrix products": ("attention", "flash", "fmha", "bmm", "aten::mm", "addmm",
                                      "gemm"),
    "dropout": ("bernoulli", "dropout"),
    "optimizer": ("adam", "Adam"),
    "EMA": ("lerp",),
}

def profile(make, *arguments):
    """Steps of a side that return the seconds of each of KINDS in them."""
    function, cuda = make(*arguments), torch.cuda.is_available()
    kind = torch.profiler.ProfilerActivity

    def run(turns):
        def before():
            turns.profiler = torch.profiler.profile(activities=[kind.CUDA if cuda else kind.CPU])
            turns.profiler.start()

        def after():
            turns.profiler.stop()
            spent = dict.fromkeys([*KINDS, "other"], 0.0)
            for event in turns.profiler.key_averages():
                name = next((name for name, words in KINDS.items()
                             if any(word in event.key for word in words)), "other")
                spent[name] += (event.self_device_time_total if cuda
                                else event.self_cpu_time_total) / 1e6
            return spent

        turns.before, turns.after = before, after
        turns.take(function)
    return run

if __name__ == "__main__":
    main()
