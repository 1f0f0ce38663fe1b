"""Train a diffusion model as a config says.

One process:          python train.py --config config/cifar10/C.yaml --use_amp
One machine, 4 GPUs:  torchrun --nproc_per_node=4 train.py --config config/cifar10/C.yaml --use_amp
Two machines, each:   torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
                          train.py --config config/cifar10/C.yaml --use_amp
Only show what it would do: add --dry_run. Started again, after whatever ended it, it goes on from the newest
checkpoint in save_dir; with --max-restarts=N torchrun starts it again by itself (docs/reliability.md).
"""

import contextlib
import math
import signal
import time
import warnings
from pathlib import Path

import torch
import yaml
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import data
import dynamics
import edm
import evaluation
import files
import logs
import options
import posthoc
import runtime
from runtime import UserError

MAX_BAD_STEPS = 20      # Steps in a row with NaN or Inf gradients after which training stops.
NOISE, DROPOUT = 1, 2   # What a step's seeds are for.


def main():
    """Parse the command line, set up, train."""
    args = parse_arguments()
    config = options.load_config(args.config, args.set)
    rt = runtime.start()
    check_batch(config, rt)
    describe(config, args, rt)
    files.check_writable(config["save_dir"])
    if config["load_epoch"] >= 0:
        checkpoint.find(config, config["load_epoch"])
    if args.dry_run:
        return
    with rt.in_turns():
        images, labels = data.load(config)
    if config["batch_size"] > len(images):
        raise UserError(f"batch_size {config['batch_size']} is more than the {len(images)} training images")
    evaluator = evaluation.Evaluator(config, args, rt, images, labels) if config["eval_every"] else None
    with files.lock(config["save_dir"], rt):
        path = rt.on_main(checkpoint_to_load, config, args, rt.job)
        training = Training(config, args, rt, data.to_device(images, rt.device))
        if path is not None:
            training.restore(checkpoint.load(path))
        if path is None or config["load_epoch"] >= 0:       # Without checkpoints, too, there may be snapshots.
            rt.on_main(checkpoint.set_aside, config, training.step)
        train(training, evaluator)


def parse_arguments():
    """The command line."""
    p = options.parser(__doc__)
    options.network_flags(p)
    p.add_argument("--dry_run", action="store_true", help="print what would be trained and stop")
    p.add_argument("--fresh", action="store_true", help="a new run: refuse a save_dir that holds one already")
    p.add_argument("--max_steps", type=options.argument(options.integer(1)), metavar="N",
                   help="stop after step N, without a checkpoint: for a quick look at speed and memory")
    return p.parse_args()


def check_batch(config, rt):
    """Raise UserError where the total batch cannot be shared equally."""
    if config["batch_size"] % rt.world_size:
        raise UserError(f"batch_size {config['batch_size']} is not divisible by the {rt.world_size} processes")


def describe(config, args, rt):
    """Print the configuration, the network's size and cost, the processes and the precision."""
    n_parameters, gflop = edm.cost(config)
    rt.print(yaml.safe_dump(config, sort_keys=False, default_flow_style=None).rstrip())
    rt.print(f"--- {config['net_type']}: {n_parameters:,} parameters, {gflop:.1f} GFLOP per training image; "
             f"{rt.world_size} process{'es' * (rt.world_size > 1)} on {runtime.device_name(rt.device)}; "
             f"{options.precision(args)}")


def checkpoint_to_load(config, args, job):
    """The checkpoint to go on from, None for a new run: the newest whole one, or that of load_epoch.

    Raises UserError where --fresh finds one. Both are for the first start: what torchrun starts again (`job` is its
    store) goes on, and so does a run that has gone on from load_epoch, from its newest checkpoint.
    """
    if args.fresh and not (job and job.check(["edm2/fresh"])):
        if checkpoint.folder_of(config).exists() and any(checkpoint.folder_of(config).glob("*.pth")):
            raise UserError(f"--fresh: {config['save_dir']} holds the checkpoints of a run: choose another save_dir, "
                            f"or remove it")
        if job:
            job.set("edm2/fresh", "begun")
        return None
    newest = checkpoint.newest(config)
    if config["load_epoch"] < 0:
        return newest
    picked = checkpoint.path_of(config, checkpoint.find(config, config["load_epoch"]))
    later = newest and (checkpoint.step_in(newest) > checkpoint.step_in(picked) or not checkpoint.is_whole(picked))
    if later and checkpoint.load(newest)["config"]["load_epoch"] == config["load_epoch"]:
        return newest
    return picked


# ----------------------------------------------------------------------------------------------------------------------
# What training changes, and one step of it.

class Training:
    """Network, EMA, optimizer and scaler of a run, and the step that changes them.

    Data order, noise levels, noise and flips are functions of (seed, step, image), not of the process count.
    """

    def __init__(self, config, args, rt, images):
        self.config, self.rt, self.images = config, rt, images
        self.steps_per_epoch = len(images) // config["batch_size"]      # An incomplete last batch is dropped.
        self.batch_process = config["batch_size"] // rt.world_size
        # Passes of one size, at most --batch_gpu: torch.compile then sees one shape.
        largest = min(args.batch_gpu or self.batch_process, self.batch_process)
        self.batch_gpu = next(size for size in range(largest, 0, -1) if self.batch_process % size == 0)
        self.total_steps = config["n_epoch"] * self.steps_per_epoch
        self.max_steps = args.max_steps
        self.step = 0                                                   # Steps done.
        self.bad_steps = torch.zeros([], dtype=torch.int64, device=rt.device)   # In a row, with NaN or Inf gradients.
        self.loss_sum = torch.zeros(2, device=rt.device)                # Weighted and unweighted, of this process,
        self.window = 0                                                 # in the steps after this one.
        self.precision = options.precision(args)
        self.generator = torch.Generator(rt.device)

        # Network.
        amp_dtype = options.amp_dtype(args)
        torch.manual_seed(config["seed"])
        self.edm = edm.build(config, amp_dtype).to(rt.device)
        if args.channels_last:
            self.edm.to(memory_format=torch.channels_last)
        if args.compile if args.compile is not None else rt.device.type == "cuda":
            self.edm.compile()
        # Its successor, forward_sync_buffers, is not in PyTorch 2.6.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        self.parallel = self.edm if rt.world_size == 1 else DistributedDataParallel(
            self.edm, broadcast_buffers=False, gradient_as_bucket_view=True)

        # EMA of the network, on every process. Its counters stay on the CPU, so that no step waits for them.
        from ema_pytorch import EMA
        self.ema = EMA(self.edm.net, beta=config["ema"], update_after_step=0, update_every=1,
                       include_online_model=False, use_foreach=True)
        self.ema.ema_model.eval()
        self.posthoc = posthoc.track(self.edm.net, config)
        self.edm_ema = edm.EDM(self.ema.ema_model, self.edm.uncertainty, **config["diffusion"], amp_dtype=amp_dtype)

        # Optimizer.
        self.parameters = list(self.edm.parameters())
        self.optimizer = getattr(torch.optim, config["optim"])(
            self.parameters, lr=config["lrate"], fused=True,
            **{name: value for name, value in config["optim_args"].items() if value is not None})
        self.scaler = torch.amp.GradScaler(rt.device.type, init_scale=64.0, enabled=amp_dtype == torch.float16)
        self.taken = None       # Under a GradScaler, until settle_ema(): whether the last step was taken.
        if rt.device.type == "cuda":
            self.taken_is_known = torch.cuda.Event()
        self.recorder = dynamics.Recorder(self)

    def draw(self):
        """Noise level (B,) ~ N(0,1), noise (B,C,H,W) ~ N(0,1) and flips (B,) of the step's total batch, B images."""
        B, shape = self.config["batch_size"], self.images.shape[1:]
        g = self.generator.manual_seed(runtime.mix(self.config["seed"], self.step, NOISE))
        level = torch.randn(B, generator=g, device=g.device)
        noise = torch.randn(B, *shape, generator=g, device=g.device)
        flip = torch.rand(B, generator=g, device=g.device) < (0.5 if self.config["flip"] else 0)
        return level, noise, flip

    def learning_rate(self):
        """lrate, warmed up linearly over warm_epoch, then divided by √max(t/t_ref, 1) (EDM2 Eq. 67)."""
        warm = self.config["warm_epoch"] * self.steps_per_epoch
        lr = self.config["lrate"] * min((self.step + 1) / max(warm, 1), 1)
        if self.config["tref_epoch"]:
            lr /= math.sqrt(max(self.step / (self.config["tref_epoch"] * self.steps_per_epoch), 1))
        return lr

    def training_step(self, index):
        """One step on the images number `index`, the total batch's (B,). Return the gradient norm, a scalar tensor."""
        rt = self.rt
        self.settle_ema()
        torch.manual_seed(runtime.mix(self.config["seed"], self.step, DROPOUT, rt.rank))
        self.edm.train()
        lr = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = lr

        # Gradient of the loss summed over the pixels and averaged over the total batch. DDP averages over the
        # processes, each of which takes its part of the batch in passes of batch_gpu images.
        scale = self.images[0].numel() / self.batch_process
        mine = slice(rt.rank * self.batch_process, (rt.rank + 1) * self.batch_process)
        parts = list(zip(*(t[mine].split(self.batch_gpu) for t in (index, *self.draw())), strict=True))
        for i, (part, level, noise, flip) in enumerate(parts):
            y = data.batch(self.images, part, rt.device, flip)
            last = i == len(parts) - 1
            with contextlib.nullcontext() if last or rt.world_size == 1 else self.parallel.no_sync():
                loss, unweighted = self.parallel(y, level, noise)
                self.scaler.scale(loss.sum() * scale).backward()
            self.loss_sum += torch.stack([loss.detach().sum(), unweighted.detach().sum()])

        # Step. NaN and Inf gradients become zero (EDM2); under a GradScaler the step is left out, the EMA's too.
        self.scaler.unscale_(self.optimizer)
        grads = [p.grad for p in self.parameters]
        grad_norm = torch.nn.utils.get_total_norm(grads)
        finite = torch.isfinite(grad_norm)      # Also what a GradScaler goes by, short of gradients above 1e19.
        self.count_bad_steps(finite)
        recording = self.recorder.is_due()
        if recording:
            self.recorder.before_update()
        if self.scaler.is_enabled():
            self.taken = finite.to("cpu", non_blocking=True)
            if self.rt.device.type == "cuda":
                self.taken_is_known.record()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            for grad in grads:
                torch.nan_to_num(grad, nan=0, posinf=0, neginf=0, out=grad)
            self.optimizer.step()
            self.update_ema()
        if recording:
            self.recorder.after_update()
        self.optimizer.zero_grad()
        self.step += 1
        return grad_norm

    def settle_ema(self):
        """Update the EMA after the last step under a GradScaler, unless that step was left out.

        The host waits for one number, which the GPU sends before it works on the optimizer's step. The EMA is updated
        before the next forward pass, which in E and G normalizes the weights.
        """
        if self.taken is not None:
            if self.rt.device.type == "cuda":
                self.taken_is_known.synchronize()
            if self.taken:
                self.update_ema()
            self.taken = None

    def update_ema(self):
        """Let the averages of the network follow it by one step."""
        self.ema.update()
        if self.posthoc:
            self.posthoc.update()

    def count_bad_steps(self, finite):
        """Count steps in a row without finite gradients, on the device; a count of MAX_BAD_STEPS stays."""
        stays = self.bad_steps >= MAX_BAD_STEPS
        self.bad_steps = torch.where(stays, self.bad_steps, torch.where(finite, 0, self.bad_steps + 1))

    def check_bad_steps(self):
        """Raise UserError after MAX_BAD_STEPS in a row; the GPU is waited for, so this is for when figures are read."""
        if self.bad_steps.item() >= MAX_BAD_STEPS:
            raise UserError(f"the gradients were NaN or Inf in {MAX_BAD_STEPS} steps in a row by step {self.step}: "
                            f"training stops. Go on from the last checkpoint with --amp_dtype bfloat16 or without "
                            f"--use_amp, or begin anew in another save_dir with a lower lrate")

    def state(self):
        """The checkpoint: plain tensors and plain values. Every process must call it."""
        self.settle_ema()
        return {
            "network": self.edm.net.state_dict(), "uncertainty": self.edm.uncertainty.state_dict(),
            "ema": self.ema.ema_model.state_dict(), "ema_step": self.ema.step.item(),
            "posthoc": posthoc.state(self.posthoc),
            "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
            "step": self.step, "epoch": (self.step - 1) // self.steps_per_epoch,
            "loss_sum": self.rt.all_reduce(self.loss_sum.clone()), "window": self.window,
            "bad_steps": self.bad_steps.item(), "n_images": len(self.images), "precision": self.precision,
            "config": self.config,
        }

    def restore(self, state):
        """Take over a checkpoint. Raises UserError where it is of another run."""
        checkpoint.check_same_run(self.config, state["config"])
        if state["n_images"] != len(self.images):
            raise UserError(f"{self.config['save_dir']} holds a run on {state['n_images']} images, but there are "
                            f"{len(self.images)} now: bring the data back or choose another save_dir")
        if state["precision"] != self.precision and self.rt.is_main:
            runtime.warn(f"the run was trained in {state['precision']} and goes on in {self.precision}")
        checkpoint.restore(self.edm.net, state["network"])
        checkpoint.restore(self.edm.uncertainty, state["uncertainty"])
        checkpoint.restore(self.ema.ema_model, state["ema"])
        self.ema.step.fill_(state["ema_step"])
        self.ema.initted.fill_(state["ema_step"] > 0)
        posthoc.restore(self.posthoc, state["posthoc"], checkpoint.restore)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, ValueError, TypeError, AttributeError) as e:
            raise UserError(f"the checkpoint's optimizer state does not fit: {e!r}") from None
        for p, tensors in self.optimizer.state.items():         # In the memory layout of this run.
            tensors.update({name: torch.empty_like(p).copy_(value) for name, value in tensors.items()
                            if value.shape == p.shape and p.ndim > 0})
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.window = state["step"], state["window"]
        self.bad_steps.fill_(state["bad_steps"] % MAX_BAD_STEPS)
        if self.rt.is_main:                                     # The other processes' sums are in it.
            self.loss_sum.copy_(state["loss_sum"])


# ----------------------------------------------------------------------------------------------------------------------
# The loop.

def train(training, evaluator=None):
    """Train to n_epoch from where `training` is, with figures, checkpoints and sample grids in save_dir.

    Raises Stopped after SIGTERM, SIGINT or SIGHUP, saved; UserError at the end where something could not be written.
    """
    t, rt, config = training, training.rt, training.config
    done, complete = rt.on_main(state_of_last, t, evaluator)
    if t.step > t.total_steps or (done and complete):
        rt.barrier()                        # All have read their checkpoint.
        if done and complete and rt.is_main:
            checkpoint.forget_latest(config)
        rt.print(f"{config['save_dir']} is trained to epoch {t.step // t.steps_per_epoch - 1} already: raise n_epoch "
                 f"to go on")
        return
    if rt.is_main:
        for name in ("", "ckpts", "grids", "tensorboard", *(["ema"] if t.posthoc else [])):
            files.clean(files.make_folder(f"{config['save_dir']}/{name}"))
    if t.step:
        rt.print(f"going on in {config['save_dir']} after step {t.step}")
    log = logs.Log(config["save_dir"], t.step, rt.is_main)
    saver = checkpoint.Saver(config, log)
    with contextlib.closing(log), contextlib.closing(saver), rt.bar(t.total_steps, "step", initial=t.step) as bar:
        try:
            run_steps(t, evaluator, log, saver, bar)
        except (runtime.Stopped, UserError):
            runtime.Watch.active = False    # The others leave too, while the main process may still write.
            raise
        saved = saver.finish()
    if t.step == t.total_steps and saved and config["save_model"] and rt.is_main:
        checkpoint.forget_latest(config)
    rt.on_main(log.check)
    if t.step < t.total_steps:
        rt.print(f"stopped after step {t.step} as --max_steps says, without a checkpoint")
        return
    rt.print(f"done: checkpoints, sample grids, metrics.jsonl and tensorboard are in {config['save_dir']}")


def state_of_last(t, evaluator):
    """Whether training is at its last step, and whether that one's checkpoint, sample grid and evaluation are there."""
    last = checkpoint.path_of(t.config, t.config["n_epoch"] - 1)
    complete = checkpoint.is_whole(last) and grid_path(t.config, t.config["n_epoch"] - 1).exists()
    evaluated = not evaluator or logs.holds(t.config["save_dir"], t.total_steps, evaluation.LOSS)
    return t.step == t.total_steps, complete and evaluated


def run_steps(t, evaluator, log, saver, bar):
    """Train to the last step, or to --max_steps."""
    meter, signals = Meter(t), runtime.Signals(t.rt, saver.wait)
    if t.step and t.step % t.steps_per_epoch == 0:
        end_epoch(t, evaluator, log, saver, signals, resumed=True)
        meter.pause()
    for epoch, index in batches(t):
        lr = t.learning_rate()
        grad_norm = t.training_step(index)
        signals.unsaved = True
        bar.update()

        # Figures.
        if record := t.recorder.take():
            log.dynamics(t.step, record)
        enough = t.max_steps is not None and t.step >= t.max_steps
        if t.step % t.config["log_every"] == 0 or t.step % t.steps_per_epoch == 0 or enough:
            figures = meter.read(epoch, lr, grad_norm)
            log.write(t.step, figures)
            bar.set_postfix(loss=f"{figures['loss']:.4f}", img_per_s=f"{figures['img_per_s']:.0f}", refresh=False,
                            TFLOP_per_s=f"{figures['TFLOP_per_s']:.3g}",
                            **({"MFU": f"{figures['MFU']:.1%}"} if figures["MFU"] else {}))
            t.check_bad_steps()
        if enough:
            return

        # Saves.
        if posthoc.is_due(t):
            t.settle_ema()
            if t.rt.is_main:
                saver.save(posthoc.snapshot(t.posthoc, t.step), checkpoint.snapshot_path(t.config, t.step))
        if t.step % t.steps_per_epoch == 0:
            end_epoch(t, evaluator, log, saver, signals)
            meter.pause()
            if t.step == t.total_steps:
                return
        signum, due = signals.agree(saver.is_due())
        if due or signum:
            t.check_bad_steps()             # What is saved can go on.
            saver.save(t.state(), checkpoint.latest_paths(t.config)[0])
        if signum:
            leave(t, saver, signum)


def batches(t):
    """The epoch and the image numbers, the total batch's (B,), of each step from the present one on."""
    B = t.config["batch_size"]
    for epoch in range(t.step // t.steps_per_epoch, t.config["n_epoch"]):
        order = data.epoch_order(len(t.images), t.config["seed"], epoch).to(t.images.device)
        for index in order.split(B)[t.step % t.steps_per_epoch:t.steps_per_epoch]:
            yield epoch, index


def end_epoch(t, evaluator, log, saver, signals, resumed=False):
    """Save the checkpoint, draw the sample grid and evaluate, where that is due in the epoch that has just ended.

    resumed: only what is missing, where the run was ended just then.
    """
    epoch = t.step // t.steps_per_epoch - 1
    last = epoch == t.config["n_epoch"] - 1
    save_due = last or epoch % t.config["save_every"] == 0
    if save_due:
        save_and_draw(t, epoch, log, saver, signals, resumed)
    if evaluator and (last or epoch % t.config["eval_every"] == 0) and not t.rt.on_main(
            lambda: resumed and logs.holds(t.config["save_dir"], t.step, evaluation.LOSS)):
        if not save_due:
            saver.save(t.state(), checkpoint.latest_paths(t.config)[0])
        evaluate(t, evaluator, epoch, log, saver, signals)


def evaluate(t, evaluator, epoch, log, saver, signals):
    """Write down what the Evaluator finds, after a save."""
    if signum := signals.now():
        leave(t, saver, signum)
    signals.unsaved = not t.config["save_model"]            # A signal may end this at once: a restart does it again.
    t.settle_ema()
    log.write(t.step, {"epoch": epoch, "Mimg": t.step * t.config["batch_size"] / 1e6} | evaluator.figures(t.edm_ema))
    signals.unsaved = True


def save_and_draw(t, epoch, log, saver, signals, resumed):
    """Save the checkpoint and draw the sample grid of an epoch; resumed: only what is missing."""
    path, grid = checkpoint.path_of(t.config, epoch), grid_path(t.config, epoch)
    saved, drawn = t.rt.on_main(lambda: [resumed and checkpoint.is_whole(path), resumed and grid.exists()])
    if not saved:
        saver.save(t.state(), path)
    if not drawn:
        if signum := signals.now():
            leave(t, saver, signum)
        signals.unsaved = not t.config["save_model"]        # A signal may end this at once: a restart draws it again.
        sample_grid(t, epoch, log)
        signals.unsaved = True


def leave(t, saver, signum):
    """Wait until the main process has saved, then leave. Raises Stopped, or UserError where the save failed."""
    def finish():
        if not saver.finish():
            raise UserError(f"stopped by {signal.Signals(signum).name}, and the last save failed: the same command "
                            f"goes on from the one before")

    t.rt.on_main(finish)
    saved = f" and saved in {t.config['save_dir']}: the same command goes on" if t.config["save_model"] else ""
    raise runtime.Stopped(signum, f" after step {t.step}{saved}" if t.rt.is_main else None)


class Meter:
    """The figures of the steps since they were last read. Only then do processes and devices wait for each other."""

    def __init__(self, training):
        self.training = training
        self.gflop = edm.cost(training.config)[1]
        peak = runtime.peak_flops(training.rt.device) if training.edm.amp_dtype else None
        self.peak = peak and peak * training.rt.world_size
        self.pause()

    def pause(self):
        """Begin to measure the time anew, at this step."""
        self.step, self.time = self.training.step, time.perf_counter()

    def read(self, epoch, lr, grad_norm):
        """Return the figures of the window and begin a new one. Losses are means per pixel over all processes."""
        t = self.training
        t.settle_ema()
        n_images = (t.step - t.window) * t.config["batch_size"]
        loss, unweighted = (t.rt.all_reduce(t.loss_sum) / n_images).tolist()
        steps, seconds = t.step - self.step, time.perf_counter() - self.time
        img_per_s = steps * t.config["batch_size"] / seconds
        flops = img_per_s * self.gflop * 1e9
        figures = {
            "epoch": epoch, "Mimg": t.step * t.config["batch_size"] / 1e6,
            "loss": loss, "loss_unweighted": unweighted, "lr": lr, "grad_norm": grad_norm.item(),
            "ema_decay": t.ema.get_current_decay(),
            "img_per_s": img_per_s, "step_time_s": seconds / steps, "TFLOP_per_s": flops / 1e12,
            "MFU": flops / self.peak if self.peak else None,
            "gpu_memory_GB": torch.cuda.max_memory_allocated() / 1e9 if t.rt.device.type == "cuda" else None,
        }
        t.loss_sum.zero_()
        t.window = t.step
        self.pause()
        return figures


def grid_path(config, epoch):
    """The file of the sample grid of an epoch."""
    return Path(config["save_dir"]) / "grids" / f"{epoch:04d}.png"


def sample_grid(training, epoch, log):
    """Write n_sample EMA samples above as many real images to save_dir/grids; all processes share the work."""
    t, n = training, training.config["n_sample"]
    t.settle_ema()
    shape = t.images.shape[1:]
    samples = torch.zeros(n, *shape, dtype=torch.uint8, device=t.rt.device)
    mine = range(t.rt.rank, n, t.rt.world_size)
    for start in range(0, len(mine), 64):
        part = list(mine[start:start + 64])
        samples[part] = edm.generate(t.edm_ema, part, shape, t.rt.device, t.config["seed"])
    samples = t.rt.all_reduce(samples).cpu()
    if not t.rt.is_main:
        return
    n_columns = math.ceil(math.sqrt(n))
    real = t.images[::max(1, len(t.images) // n)][:n].cpu()
    image = torch.cat([data.grid(samples, n_columns), data.grid(real, n_columns)], dim=1)
    try:
        data.save_png(image, grid_path(t.config, epoch))
    except UserError as e:                  # A full disk: the next grid may fit.
        log.failed(t.step, str(e))
    log.image(t.step, "samples above real images", image)


if __name__ == "__main__":
    runtime.command(main)()
