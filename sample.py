"""Sample images from a checkpoint with the 18-step Heun sampler.

One process:          python sample.py --config config/cifar10/C.yaml --use_amp
One machine, 4 GPUs:  torchrun --nproc_per_node=4 sample.py --config config/cifar10/C.yaml --use_amp --epoch 1000
Two machines, each:   torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
                          sample.py --config config/cifar10/C.yaml --use_amp --epoch 1000
Images go to save_dir/samples/<epoch>/images/000000.png ..., beside grid.png. Image i is the same whatever
the processes. Started again, it makes only the images that are missing.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import checkpoint
import data
import edm
import files
import options
import runtime
from runtime import UserError

GRID = 64       # Images in grid.png, at most.
BATCH = {"cuda": 1024, "cpu": 64}       # Images made together, at most.


def main():
    """Parse the command line, load the network, write the images that are missing."""
    args = parse_arguments()
    config = options.load_config(args.config, args.set)
    rt = runtime.start()
    epoch = rt.agree(checkpoint.find(config, args.epoch))
    folder = Path(args.out or checkpoint.samples_folder(config, epoch, variant(args)))
    denoiser = checkpoint.load_edm(config, epoch, args.weights, args, rt.device, args.sigma_rel)
    files.check_writable(folder)
    with files.lock(folder, rt):
        settings = rt.on_main(claim, folder, config, args, epoch)
        missing = rt.on_main(find_missing, folder, args.n_samples)
        length = f", sigma_rel {args.sigma_rel:g}," if args.sigma_rel else ""
        rt.print(f"{args.weights} weights{length} of epoch {epoch}, seed {args.seed}: {len(missing):,} of "
                 f"{args.n_samples:,} images to make in {folder} ({rt.world_size} "
                 f"process{'es' * (rt.world_size > 1)} on {runtime.device_name(rt.device)})")
        if missing:
            size = choose_batch(denoiser, settings, config, args, rt)
            rt.on_main(note_settings, folder, settings)
            write_images(denoiser, set(missing), size, folder, config, args, rt)
        rt.barrier()
        if rt.is_main:
            finish(folder, args)


def parse_arguments():
    """The command line."""
    p = options.parser(__doc__)
    options.network_flags(p)
    count, index, unit = (options.argument(check) for check in
                          (options.integer(1), options.integer(0), options.number(0, 1)))
    p.add_argument("--epoch", type=index, help="checkpoint (default: the newest)")
    p.add_argument("--n_samples", type=count, default=runtime.FULL, help="number of images (default: 50000)")
    p.add_argument("--seed", type=index, default=0, help="image i is a function of (seed, i)")
    p.add_argument("--weights", choices=["ema", "model"], default="ema", help="averaged (default) or raw weights")
    options.sigma_rel_flag(p)
    p.add_argument("--steps", type=count, default=18, help="sampler steps (default: 18, NFE 35)")
    p.add_argument("--eta", type=unit, default=0.0, help="churn from 0 (deterministic) to 1")
    p.add_argument("--clip_denoised", action="store_true", help="clip D to [-1,1]")
    p.add_argument("--npz", action="store_true", help="also write samples.npz: arr_0, (N,H,W,C) uint8")
    p.add_argument("--out", metavar="DIR", help="folder (default: save_dir/samples/<epoch>...)")
    args = p.parse_args()
    if args.sigma_rel is not None and args.weights == "model":
        p.error("--sigma_rel is of averaged weights: leave out --weights model")
    return args


def variant(args):
    """What is not as usual, for the folder's name."""
    return ("_model" * (args.weights == "model") + checkpoint.sigma_rel_suffix(args.sigma_rel)
            + f"_seed{args.seed}" * (args.seed > 0) + f"_steps{args.steps}" * (args.steps != 18)
            + f"_eta{args.eta:g}" * (args.eta > 0) + "_clip" * args.clip_denoised)


def describe(config, args, epoch):
    """All that decides what the images look like."""
    return {"checkpoint_sha256": files.sha256(checkpoint.path_of(config, epoch)),
            "epoch": epoch, "weights": args.weights, "sigma_rel": args.sigma_rel, "seed": args.seed,
            "steps": args.steps, "eta": args.eta, "clip_denoised": args.clip_denoised,
            "precision": options.precision(args), "diffusion": config["diffusion"], "network": config["network"]}


def claim(folder, config, args, epoch):
    """Note the settings in the folder and return them. Raises UserError where what it holds was made with others."""
    settings, note, noted = describe(config, args, epoch), folder / "settings.json", {"n_samples": args.n_samples}
    if note.exists():
        try:
            made = dict(json.loads(note.read_text()))
        except (ValueError, TypeError):
            raise UserError(f"{note} is damaged: remove {folder}, or choose another folder with --out") from None
        noted = {key: value for key, value in made.items() if key in ("n_samples", "batch_cpu", "batch_cuda")
                 and isinstance(value, int) and value > 0}
        noted["n_samples"] = max(args.n_samples, noted.get("n_samples", 0))
        differences = [f"{key} {made.get(key)!r} there, {value!r} here"
                       for key, value in settings.items() if made.get(key) != value]
        if differences:
            raise UserError(f"{folder} holds images made with other settings ({'; '.join(differences)}): "
                            f"choose another folder with --out, or remove it")
    elif any(folder.glob("images/*")):
        raise UserError(f"{folder}/images holds files, but no settings.json says how they were made: "
                        f"choose another folder with --out")
    files.make_folder(folder / "images")
    note_settings(folder, settings | noted)
    for part in (folder, folder / "images"):
        files.clean(part)
    return settings | noted


def note_settings(folder, settings):
    """Write settings.json. Raises UserError where that fails."""
    with files.atomic(folder / "settings.json") as temporary:
        temporary.write_text(json.dumps(settings, indent=1) + "\n")


def png(folder, i):
    """The file of image i."""
    return folder / "images" / f"{i:06d}.png"


def find_missing(folder, n_samples):
    """The numbers of the images that are still to be made."""
    return [i for i in range(n_samples) if not png(folder, i).exists()]


def choose_batch(denoiser, settings, config, args, rt):
    """The images to make together: --batch_gpu, or what `settings` say, or the most that fit on every GPU up to BATCH.

    What is chosen by itself is put into `settings`: rounding depends on what is computed together.
    """
    if args.batch_gpu:
        return args.batch_gpu
    key = f"batch_{rt.device.type}"
    settings.setdefault(key, BATCH[rt.device.type])
    while rt.device.type == "cuda" and settings[key] > 1:
        try:                                # Two steps hold as much memory as 18.
            edm.generate(denoiser, range(min(settings[key], args.n_samples)), config["network"]["image_shape"],
                         rt.device, n_steps=2).cpu()
            fits = True
        except torch.OutOfMemoryError:
            fits = False
        if rt.all(fits):
            break
        settings[key] //= 2
        torch.compiler.reset()              # For one shape again, not for any.
        torch.cuda.empty_cache()
    return settings[key]


def write_images(denoiser, missing, size, folder, config, args, rt):
    """Sample in batches of `size`, this process's among all; threads write the PNGs while the next one is computed.

    A batch is made whole where any of it is missing, whatever was there and however many processes share the work:
    rounding depends on what is computed together. On a GPU the last one is filled up with images beyond n_samples, so
    that torch.compile sees one shape.
    """
    shape, n = config["network"]["image_shape"], args.n_samples
    whole = rt.device.type == "cuda" and n > size
    batches = [range(start, start + size if whole else min(start + size, n)) for start in range(0, n, size)]
    batches = [batch for batch in batches if not missing.isdisjoint(batch)]
    with ThreadPoolExecutor(1) as fetcher, ThreadPoolExecutor(8) as writers, rt.bar(len(missing), "img") as bar:
        def write(batch, images):
            images = images.cpu()           # Waits for the GPU; the main thread goes on to feed it.
            made = [i for i in batch if i in missing]
            list(writers.map(lambda i: data.save_png(images[i - batch.start], png(folder, i)), made))
            return len(made)

        def settle(future):
            bar.update(min(future.result() * rt.world_size, bar.total - bar.n))

        writing = []
        for batch in batches[rt.rank::rt.world_size]:
            images = edm.generate(denoiser, batch, shape, rt.device, args.seed, args.steps, args.eta,
                                  args.clip_denoised)
            writing.append(fetcher.submit(write, batch, images))
            if len(writing) > 1:
                settle(writing.pop(0))
        for future in writing:
            settle(future)


def finish(folder, args):
    """Write grid.png and, where asked for, samples.npz from the PNGs, and say where everything is."""
    def read(i):
        try:
            pixels = np.asarray(Image.open(png(folder, i)))
        except (OSError, ValueError, SyntaxError):
            raise UserError(f"{png(folder, i)} is damaged: remove it and run this again") from None
        return pixels[..., None] if pixels.ndim == 2 else pixels

    first = torch.from_numpy(np.stack([read(i) for i in range(min(args.n_samples, GRID))])).permute(0, 3, 1, 2)
    data.save_png(data.grid(first, 8), folder / "grid.png")
    if args.npz:
        with files.atomic(folder / "samples.npz") as temporary, open(temporary, "wb") as f:
            np.savez(f, np.stack([read(i) for i in range(args.n_samples)]))
    print(f"images: {folder / 'images'}  grid: {folder / 'grid.png'}"
          + f"  npz: {folder / 'samples.npz'}" * args.npz)


if __name__ == "__main__":
    runtime.command(main)()
