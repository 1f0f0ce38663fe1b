"""A training step: train.py's against the plain path and a public peer, in turns, in one run.

    python benchmarks/train_step.py                                     # 39.5M networks; batch 8 on the CPU
    python benchmarks/train_step.py --configs digits/G --batch 64
    python benchmarks/train_step.py --compile --profile                 # torch.compile on the CPU too: minutes at first
    python benchmarks/train_step.py --amp_dtype bfloat16 --peer         # the peer needs benchmarks/requirements.txt

plain: the same mathematics as the predecessor runs it: eager, NCHW, Adam and EMA tensor by tensor, one DataLoader
worker with PIL transforms, the loss fetched in every step. peer: the Karras U-Net (Config G) of
denoising-diffusion-pytorch at the width and blocks of ours, in the plain loop. Each is a process of its own.
"""

import argparse
import shlex
import statistics
import sys
import tempfile
import time
from types import SimpleNamespace

import torch
from sides import ROOT, alternate, machine, times_faster

import data
import dynamics
import edm
import logs
import options
import runtime
import train

N_TRAIN = {"digits": 1437, "cifar10": 50_000, "cifar100": 50_000, "tinyimagenet": 100_000}      # Else 50,000 images.


def main():
    """Time each config's sides and print the tables."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--configs", nargs="+", default=["cifar10/C", "cifar10/E", "cifar10/G"])
    p.add_argument("--batch", type=int, help="images per step (default: 8 on the CPU, else that of the config)")
    p.add_argument("--amp_dtype", choices=["float16", "bfloat16"])
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--peer", action="store_true", help="the Karras U-Net, too")
    p.add_argument("--compile", action="store_true", help="train.py --compile, too: on the CPU that is not the default")
    p.add_argument("--profile", action="store_true", help="where the time of a step goes, too")
    args = p.parse_args()
    cpu = not torch.cuda.is_available()
    overrides = ["dynamics_every=0", *([f"batch_size={args.batch or 8}"] if args.batch or cpu else [])]
    configs = {name: options.load_config(ROOT / "config" / f"{name}.yaml", overrides) for name in args.configs}

    sides = {}
    for name, config in configs.items():
        sides[f"{name}, train.py"] = (fast, config, args.amp_dtype)
        if args.compile and cpu:
            sides[f"{name}, train.py --compile"] = (fast, config, args.amp_dtype, True)
        sides[f"{name}, plain"] = (plain, config, args.amp_dtype)
    if args.peer:
        sides["peer"] = (peer, configs[args.configs[-1]], args.amp_dtype)
    timings = alternate(sides, args.rounds)
    reached = max(matrix_flops(args.amp_dtype) for _ in range(3))

    print(f"`{shlex.join(['python', *sys.argv])}`, {machine()}; a matrix product reaches "
          f"{reached / 1e12:.3g} TFLOP/s\n")
    peak = runtime.peak_flops(runtime.start().device) if args.amp_dtype else None
    print("| side | parameters | batch | step, median (s) | least to most | img/s | TFLOP/s | of a matrix product's "
          "| MFU | peak memory (GB) | times faster than plain |\n" + "|---" * 11 + "|")
    for side, timing in timings.items():
        name = side.partition(",")[0]
        config = configs[args.configs[-1] if name == "peer" else name]
        n_parameters, gflop = peer_cost(config) if name == "peer" else edm.cost(config)
        B, flops = config["batch_size"], gflop * 1e9 * config["batch_size"] / timing.median
        against = timings.get(f"{name}, plain")
        faster = f"{times_faster(timing, against):.2f}" if against else "-"
        print(f"| {side} | {n_parameters:,} | {B} | {timing.median:.4f} | {min(timing.seconds):.4f} to "
              f"{max(timing.seconds):.4f} | {B / timing.median:.1f} | {flops / 1e12:.3f} | {flops / reached:.1%} "
              f"| {f'{flops / peak:.1%}' if peak else '-'} | {timing.memory:.2f} | {faster} |")
    if args.peer:
        name = args.configs[-1]
        ours, loop = (times_faster(timings[f"{name}, {way}"], timings["peer"]) for way in ("train.py", "plain"))
        print(f"\nTimes faster than the peer in the plain loop: {name} by train.py {ours:.2f}, in the plain loop "
              f"{loop:.2f}")
    print("\n| train.py | data (draws, look-up) | EMA | figures, every 50 steps | together | optimizer | a record of "
          "dynamics | all of them in the run |\n" + "|---" * 8 + "|")
    for name, config in configs.items():
        parts = alternate({name: (shares, config | {"dynamics_every": 1}, args.amp_dtype)}, 5)[name].returned
        for part in parts:
            part["step"] -= part["dynamics"]
        share = {key: statistics.median(part[key] / part["step"] for part in parts) for key in parts[0]}
        steps = config["n_epoch"] * (N_TRAIN.get(config["dataset"], 50_000) // config["batch_size"])
        waiting = share["data"] + share["ema"] + share["figures"] / 50
        print(f"| {name} | {share['data']:.2%} | {share['ema']:.2%} | {share['figures'] / 50:.2%} | {waiting:.2%} "
              f"| {share['optimizer']:.2%} | {share['dynamics']:.1%} of a step "
              f"| {share['dynamics'] / dynamics.default_every(steps):.2%} |", flush=True)
    if args.profile:
        found = {f"{name}, {way}": alternate({way: (profile, make, config, args.amp_dtype)}, 1, 1)[way].returned[0]
                 for name, config in configs.items() for way, make in (("train.py", fast), ("plain", plain))}
        print(f"\n| seconds of a step, by name of the operation | {' | '.join(found)} |\n"
              + "|---" * (len(found) + 1) + "|")
        for kind in [*KINDS, "other"]:
            print(f"| {kind} | {' | '.join(f'{shares[kind]:.3f}' for shares in found.values())} |")


def matrix_flops(amp_dtype):
    """FLOP/s of one large matrix product."""
    device = runtime.start().device
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=getattr(torch, amp_dtype or "float32"))
    for _ in range(2):                      # The first is a warm-up.
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return 2 * n ** 3 / seconds


# ----------------------------------------------------------------------------------------------------------------------
# The sides: each function returns one that makes a training step.

def random_images(config):
    """A data set of noise, (N,C,H,W) uint8: as many images as CIFAR-10 has on a GPU, fewer on the CPU."""
    n = 50_000 if torch.cuda.is_available() else max(1024, config["batch_size"])
    return torch.randint(0, 256, (n, *config["network"]["image_shape"]), dtype=torch.uint8)


def trainer(config, amp_dtype, compiled=None):
    """What train.py trains with, at its defaults."""
    flags = SimpleNamespace(use_amp=bool(amp_dtype), amp_dtype=amp_dtype, compile=compiled, channels_last=True,
                            batch_gpu=None, max_steps=None)
    rt = runtime.start()
    return train.Training(config, flags, rt, data.to_device(random_images(config), rt.device))


def fast(config, amp_dtype, compiled=None):
    """The step of train.py."""
    t = trainer(config, amp_dtype, compiled)

    def step():
        index = torch.randint(len(t.images), (config["batch_size"],), device=t.images.device)
        t.training_step(index)
    return step


def plain(config, amp_dtype):
    """The step as the predecessor makes it, of our network."""
    return plain_loop(edm.build(config, amp_dtype and getattr(torch, amp_dtype)), config, amp_dtype)


def peer(config, amp_dtype):
    """The Karras U-Net in the plain loop; preconditioning and loss are ours."""
    return plain_loop(peer_denoiser(config, amp_dtype), config, amp_dtype)


plain.default_malloc = peer.default_malloc = True


def plain_loop(denoiser, config, amp_dtype):
    """A training step without anything that makes it fast."""
    from ema_pytorch import EMA
    device = runtime.start().device
    denoiser.to(device).train()
    ema = EMA(denoiser.net, beta=config["ema"], update_after_step=0, update_every=1)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=config["lrate"], betas=config["optim_args"]["betas"],
                                 foreach=False, fused=False)
    scaler = torch.amp.GradScaler(device.type, init_scale=64.0, enabled=amp_dtype == "float16")
    batches = plain_batches(random_images(config), config["batch_size"])

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
        self.transform = transforms.Compose([transforms.RandomHorizontalFlip(), transforms.ToTensor()])

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        from PIL import Image
        image = self.pixels[i]
        return self.transform(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)) * 2 - 1


def plain_batches(images, batch_size):
    """Batches (B,C,H,W) in [-1,1] from one DataLoader worker, without end."""
    loader = torch.utils.data.DataLoader(Pictures(images), batch_size, shuffle=True, drop_last=True, num_workers=1,
                                         pin_memory=torch.cuda.is_available())
    while True:
        yield from loader


# ----------------------------------------------------------------------------------------------------------------------
# The peer.

class KarrasUnet(torch.nn.Module):
    """The peer's U-Net with the calls of ours: its levels double up to the widest of ch_mults."""

    def __init__(self, config):
        from denoising_diffusion_pytorch import KarrasUnet as Peer
        super().__init__()
        network = config["network"]
        dim, mults, flags = network["n_channels"], network["ch_mults"], network["is_attn"]
        size = network["image_shape"][-1]
        self.net = Peer(image_size=size, channels=network["image_shape"][0], dim=dim, dim_max=dim * max(mults),
                        num_downsamples=len(mults) - 1, num_blocks_per_stage=network["n_blocks"] - 1,
                        attn_res=tuple(size >> level for level, flag in enumerate(flags) if flag),
                        attn_dim_head=network["attn_channels_per_head"], fourier_dim=dim, dropout=network["dropout"],
                        attn_flash=True)

    def forward(self, x, c_noise, return_features=False):
        return self.net(x, c_noise)


def peer_denoiser(config, amp_dtype):
    """Our preconditioning and loss around the peer's network."""
    ours = edm.build(config)
    return edm.EDM(KarrasUnet(config), ours.uncertainty, **config["diffusion"],
                   amp_dtype=amp_dtype and getattr(torch, amp_dtype))


def peer_cost(config):
    """As edm.cost, of the peer."""
    from torch.utils.flop_counter import FlopCounterMode
    denoiser = peer_denoiser(config, None)
    y = torch.randn(1, *config["network"]["image_shape"])
    with FlopCounterMode(display=False) as counter:
        denoiser(y, torch.randn(1), torch.randn_like(y))[0].sum().backward()
    return sum(p.numel() for p in denoiser.net.parameters()), counter.get_total_flops() / 1e9


# ----------------------------------------------------------------------------------------------------------------------
# Where a step's time goes.

def shares(config, amp_dtype):
    """A step that returns the seconds of its parts; the device is waited for around each."""
    t, spent = trainer(config, amp_dtype), {}

    def timed(key, function):
        def call(*arguments, **named):
            wait()
            start = time.perf_counter()
            value = function(*arguments, **named)
            wait()
            spent[key] += time.perf_counter() - start
            return value
        return call

    def wait():
        if t.rt.device.type == "cuda":
            torch.cuda.synchronize()

    data.batch, t.draw = timed("data", data.batch), timed("data", t.draw)
    for name in ("before_update", "after_update"):
        setattr(t.recorder, name, timed("dynamics", getattr(t.recorder, name)))
    t.ema.update, t.optimizer.step = timed("ema", t.ema.update), timed("optimizer", t.optimizer.step)
    meter = train.Meter(t)
    read = timed("figures", meter.read)
    log = logs.Log(tempfile.mkdtemp(), 0, True)
    write = timed("dynamics", log.dynamics)

    def one_step(index):
        grad_norm = t.training_step(index)
        t.settle_ema()
        write(t.step, t.recorder.take())
        return grad_norm

    def step():
        spent.update(dict.fromkeys(("data", "ema", "optimizer", "dynamics", "figures", "step"), 0.0))
        grad_norm = timed("step", one_step)(torch.arange(config["batch_size"], device=t.images.device))
        read(0, 0, grad_norm)
        return dict(spent)
    return step


# What the names of PyTorch's operations hold; of a GPU's kernels, whose names tell less, a rough guess.
KINDS = {
    "convolutions": ("conv", "cudnn", "xmma", "implicit", "wgrad", "dgrad"),
    "attention and matrix products": ("attention", "flash", "fmha", "bmm", "aten::mm", "addmm", "gemm"),
    "dropout": ("bernoulli", "dropout"),
    "optimizer": ("adam", "Adam"),
    "EMA": ("lerp",),
}


def profile(make, config, amp_dtype):
    """A function that makes one step and returns the seconds of each of KINDS in it."""
    from torch.profiler import ProfilerActivity
    step = make(config, amp_dtype)
    cuda = torch.cuda.is_available()

    def run():
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as p:
            step()
            if cuda:
                torch.cuda.synchronize()
        spent = dict.fromkeys([*KINDS, "other"], 0.0)
        for event in p.key_averages():
            kind = next((kind for kind, words in KINDS.items() if any(word in event.key for word in words)), "other")
            spent[kind] += (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
        return spent
    return run


if __name__ == "__main__":
    main()
