"""Sample images from a checkpoint with the 18-step Heun sampler.

One process:          python sample.py --config config/cifar10/C.yaml --use_amp
One machine, 4 GPUs:  torchrun --nproc_per_node=4 sample.py --config config/cifar10/C.yaml --use_amp
With guidance:        python sample.py --config config/cifar10/G_cond.yaml --guidance 2
Images go to save_dir/samples/<epoch>/images/000000.png ..., beside grid.png. Image i is the same
whatever the processes; with labels it has class i mod N. Started again, it makes only the images
that are missing."""

import contextlib
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from edm2 import checkpoint, diffusion, distributed, features, files, flags, guidance
from edm2.config import Count, Index, Label, Unit, load_config
from edm2.errors import UserError, command
from edm2.image_files import grid, layout, save_png
from edm2.posthoc_ema import load_denoiser

def main():
    """Parse the command line, load the network, write the images that are missing."""
    p = flags.parser(__doc__, network=True, sigma_rel=True)
    add, flag = p.add_argument, flags.flag
    add("--epoch", type=flag(Index), help="checkpoint (default: the newest)")
    add("--n_samples", type=flag(Count), default=50_000, help="number of images (default: 50000)")
    add("--seed", type=flag(Index), default=0, help="image i is a function of (seed, i)")
    add("--weights", choices=["ema", "model"], default="ema", help="averaged (default) or raw")
    add("--steps", type=flag(Count), default=18, help="sampler steps (default: 18, NFE 35)")
    add("--eta", type=flag(Unit), default=0.0, help="churn from 0 (deterministic) to 1")
    add("--clip_denoised", action="store_true", help="clip D to [-1,1]")
    add("--classes", type=flags.ranges(Label), help="such as 3 or 0-4,7, in turn (default: all)")
    add("--npz", action="store_true", help="also write samples.npz: arr_0, (N,H,W,C), and labels")
    add("--out", metavar="DIR", help="folder (default: save_dir/samples/<epoch>...)")
    guidance.add_flags(p)
    args = p.parse_args()
    if args.sigma_rel is not None and args.weights == "model":
        p.error("--sigma_rel is of averaged weights: leave out --weights model")

    config, device = load_config(args.config, args.set), distributed.init()
    n_classes = config.network.label_dim
    classes = args.classes or range(n_classes)
    if args.classes and classes[-1] >= n_classes:
        raise UserError(f"--classes {classes[-1]}: the run has {n_classes or 'no'} classes")
    epoch = distributed.on_rank0(checkpoint.find, config, args.epoch)
    guided, guide = distributed.on_rank0(guidance.find, args, config, epoch)
    flags.resolve(args, device)
    denoiser = load_denoiser(config, epoch, args.weights, args.sigma_rel, args.amp_dtype)
    denoiser = diffusion.deploy(denoiser, device, args.channels_last, args.compile)
    if guide:
        guide = load_denoiser(*guide, "ema", args.guide_sigma_rel, args.amp_dtype)
        guide = diffusion.deploy(guide, device, args.channels_last, args.compile)
    sampling = diffusion.Sampling(
        args.steps, args.eta, args.clip_denoised, classes,
        1 if guided["guidance"] is None else guided["guidance"],
        guided["guidance_interval"] or (0, math.inf), guide)
    variant = ("_model" * (args.weights == "model") + f"_seed{args.seed}" * (args.seed > 0)
               + f"_steps{args.steps}" * (args.steps != 18) + f"_eta{args.eta:g}" * (args.eta > 0)
               + "_clip" * args.clip_denoised + guidance.variant(guided)
               + ("_classes" + ",".join(map(str, classes)) if args.classes else "")[:80])
    folder = Path(args.out or features.samples_folder(config, epoch, variant, args.sigma_rel))
    settings = {name: getattr(args, name) for name in (
        "weights", "sigma_rel", "seed", "steps", "eta", "clip_denoised", "classes")} | guided | {
        "checkpoint_sha256": files.sha256(checkpoint.path_of(config, epoch)), "epoch": epoch,
        "precision": flags.precision(args.amp_dtype), **config.model_dump(include={"diffusion"})}
    asked, of = sampling.evaluations(config.diffusion)
    with contextlib.ExitStack() as stack:
        distributed.on_rank0(lambda: stack.enter_context(files.locked(folder)))
        missing = distributed.on_rank0(claim, folder, settings, args.n_samples)
        cost = f"{asked} evaluations"
        cost += f" and {of} {'of the guide' if guide else 'without label'}" if of else ""
        distributed.print0(f"epoch {epoch}: {len(missing):,} of {args.n_samples:,} images to make "
                           f"in {folder} ({diffusion.processes_on(device)}; "
                           f"{settings['precision']}), each of {cost}")
        write_images(denoiser, missing, args, sampling, folder)
        distributed.barrier()
        distributed.on_rank0(finish, folder, args.n_samples, args.npz, classes)

def claim(folder, settings, n_samples):
    """Note the settings; return the numbers of missing images. UserError: of other settings."""
    path, n_noted = folder / "settings.json", n_samples
    if path.exists() or any(folder.glob("images/*")):
        if not (made := features.read_settings(folder)):
            raise UserError(f"{path} is damaged or missing: remove {folder} or say --out")
        n_noted = max(n_samples, made.get("n_samples", 0))
        if changed := [f"{key} {made.get(key)!r} there, {value!r} here"
                       for key, value in settings.items() if made.get(key) != value]:
            raise UserError(f"{folder} is of other settings ({'; '.join(changed)}): say --out")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    files.remove_temporaries(folder)
    with files.atomic(path) as temporary:
        temporary.write_text(json.dumps(settings | {"n_samples": n_noted}, indent=1) + "\n")
    return [i for i in range(n_samples) if not features.sample_path(folder, i).exists()]

def write_images(denoiser, missing, args, sampling, folder):
    """Make this process's batches, whole ones; threads write one while the next is made. On a GPU
    the last one goes beyond n_samples, so that torch.compile sees one shape."""
    n, missing, written = args.n_samples, set(missing), []
    on_gpu = next(denoiser.parameters()).is_cuda
    size = min(args.batch_gpu or (512 if on_gpu else 64), n)    # Rounding depends on it.
    batches = [range(i, i + size if on_gpu else min(i + size, n)) for i in range(0, n, size)]
    batches = [batch for batch in batches if not missing.isdisjoint(batch)]
    with ThreadPoolExecutor(8) as pool, distributed.progress(len(missing), "img") as bar:
        for batch in batches[distributed.rank()::distributed.world_size()]:
            images = diffusion.generate(denoiser, batch, args.seed, sampling).cpu()
            bar.update(len(list(written)))          # A write that failed shows here.
            indices = missing.intersection(batch)
            written = pool.map(save_png, [images[i - batch.start] for i in indices],
                               [features.sample_path(folder, i) for i in indices])
        bar.update(len(list(written)))

def finish(folder, n_samples, npz, classes):
    """Write grid.png, of a class a row, and, if asked for, samples.npz from the PNGs; say where."""
    shown, n_columns = layout(min(n_samples, 64), len(classes), n_samples)
    numbers = range(n_samples) if npz else shown
    samples, n = features.open_samples(folder, numbers), len(numbers)
    _, images = next(samples.batches(range(n), n))
    names, images_shown = classes[:len(shown) // n_columns], images[list(shown)] if npz else images
    save_png(grid(images_shown, n_columns, names), folder / "grid.png")
    if npz:
        labels = {"labels": np.resize(classes, n_samples)} if classes else {}
        with files.atomic(folder / "samples.npz") as temporary, open(temporary, "wb") as file:
            np.savez(file, images.permute(0, 2, 3, 1).numpy(), **labels)
    print(f"images: {folder}/images  grid: {folder}/grid.png" + f"  {folder}/samples.npz" * npz)

if __name__ == "__main__":
    command(main)()
