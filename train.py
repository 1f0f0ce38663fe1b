"""Train a diffusion model as a config says.

One process:          python train.py --config config/cifar10/C.yaml --use_amp
One machine, 4 GPUs:  torchrun --nproc_per_node=4 train.py --config config/cifar10/C.yaml --use_amp
Two machines, each:   torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d \\
                          --rdzv_endpoint=HOST:29500 train.py --config config/cifar10/C.yaml
Only show what it would do: add --dry_run. Started again, it goes on from the newest checkpoint."""

import contextlib
import math
import time
import torch
from torch.nn.parallel import DistributedDataParallel
from edm2 import checkpoint, data, diffusion, distributed, dynamics, evaluation, files, flags
from edm2.config import FREE, Count, load_config
from edm2.errors import Stopped, UserError, command, warn
from edm2.log import Log
from edm2.posthoc_ema import Averages

MAX_BAD_STEPS = 20      # Steps in a row with NaN or Inf gradients after which training stops.
DROPOUT = 2             # What a step's seed is for; data.NOISE is the other one.

def main():
    """Parse the command line, say what is trained, load the data, train."""
    p = flags.parser(__doc__, network=True)
    p.add_argument("--dry_run", action="store_true", help="print what would be trained and stop")
    p.add_argument("--fresh", action="store_true", help="refuse a save_dir that holds a run")
    p.add_argument("--max_steps", type=flags.flag(Count), metavar="N", default=math.inf,
                   help="stop after step N, unsaved: for a quick look at speed and memory")
    args = p.parse_args()
    config, device = load_config(args.config, args.set), distributed.init()
    flags.resolve(args, device)
    diffusion.describe(config, device, flags.precision(args.amp_dtype))
    if args.dry_run or device.type == "cuda":
        diffusion.describe_memory(config, device, args)
    if args.dry_run:
        return
    signals, sigma_data = distributed.Signals(), config.diffusion.sigma_data
    with distributed.rank0_first():
        images, labels = data.load(config)
    if config.batch_size > len(images):
        raise UserError(f"batch_size {config.batch_size} is more than the {len(images)} images")
    # sigma_data is meant to be the RMS of the pixels (EDM Table 1).
    rms = data.to_float(images[::max(1, len(images) // 5000)]).square().mean().sqrt().item()
    distributed.print0(words := f"RMS of the pixels {rms:.3f}, sigma_data {sigma_data:g}")
    if abs(rms - sigma_data) > 0.2 * sigma_data and distributed.rank() == 0:
        warn(f"{words}: set diffusion.sigma_data")
    evaluator = config.eval_every and evaluation.Evaluator(config, images, labels, device,
                                                           args.batch_gpu)
    with contextlib.ExitStack() as stack:
        distributed.on_rank0(lambda: stack.enter_context(files.locked(config.save_dir)))
        train(config, args, images, labels.to(device), evaluator, signals)

def train(config, args, images, labels, evaluator, signals):
    """Train to n_epoch on images (N,C,H,W) uint8, labels (N,), from the newest checkpoint on."""
    run = Run(config, args, labels.device, images)
    images = images.to(data.placement(images.nbytes, labels.device))
    if run.resume(args.fresh):
        return distributed.print0(f"{config.save_dir} is trained already: raise n_epoch to go on")
    log = Log(config.save_dir, run.step, is_due(config.eval_every, run))
    bar = distributed.progress(run.total_steps, "step", run.step)
    recorder = dynamics.Recorder(run.denoiser, images, labels, config, run.total_steps)
    speed = diffusion.Throughput(config, labels.device, run.denoiser.amp_dtype, run.step)
    for step in range(run.step, run.total_steps + 1):
        # At an epoch's end: sample grid, evaluation and, last, the checkpoint.
        if step % run.steps_per_epoch == 0 and 0 < step < args.max_steps:
            end_epoch(run, images, labels, evaluator, log, signals)
            speed.restart(step)
        if step >= min(run.total_steps, args.max_steps):
            return run.finish()

        # Images, noise levels, noise, labels, augmentation: functions of seed and step.
        signals.defer(True)
        passes = data.draw(config, step, images, labels, run.batch_gpu)
        torch.manual_seed(diffusion.derive_seed(config.seed, step, DROPOUT, distributed.rank()))

        # Learning rate (EDM2 Eq. 67).
        lr = learning_rate(config, step, run.steps_per_epoch)
        run.optimizer.param_groups[0]["lr"] = lr

        # Gradient of the loss, summed over the pixels and averaged over the total batch.
        run.denoiser.train()
        for i, (y, level, noise, label, augment) in enumerate(passes, 1):
            run.model.require_backward_grad_sync = i == len(passes)
            loss, unweighted = run.model(y, level, noise, label, augment)
            run.scaler.scale(loss.sum() * (y[0].numel() / run.batch_process)).backward()
            run.loss_sum += torch.stack([loss.detach().sum(), unweighted.detach().sum()])

        # Optimizer step: NaN and Inf count as zero, a GradScaler leaves the whole step out. EMA.
        run.scaler.unscale_(run.optimizer)
        gradients = [p.grad for p in run.optimizer.param_groups[0]["params"]]
        grad_norm = torch.nn.utils.get_total_norm(gradients)
        recorder.before_update(step)
        for grad in gradients:
            torch.nan_to_num(grad, nan=0, posinf=0, neginf=0, out=grad)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.averages.update()
        if record := recorder.after_update(step):
            log.write(step + 1, *record)
        run.optimizer.zero_grad()
        run.count_step(grad_norm)
        bar.update()

        # Metrics every log_every steps; latest.pth every save_minutes and after a signal.
        if not all(run.step % n for n in (config.log_every, run.steps_per_epoch, args.max_steps)):
            log.write(run.step, metrics := run.metrics(lr, grad_norm) | speed.read(run.step))
            bar.set_postfix({key: metrics[key] for key in ("loss", "img_per_s")}, refresh=False)
        signum, due = signals.agree(time.monotonic() >= run.next_save)
        if signum or due:
            run.save(checkpoint.latest_paths(config)[0])
        if signum:
            raise Stopped(signum, f"after step {run.step} and saved in {config.save_dir}")

def learning_rate(config, step, steps_per_epoch):
    """lrate, warmed up linearly over warm_epoch, then divided by √max(t/t_ref, 1) (EDM2 Eq. 67)."""
    warm_up = min((step + 1) / max(config.warm_epoch * steps_per_epoch, 1), 1)
    t_ref = (config.tref_epoch or math.inf) * steps_per_epoch
    return config.lrate * warm_up / math.sqrt(max(step / t_ref, 1))

def is_due(every, run):
    """Whether what is done every so many epochs, and after the last, is to be done at this step."""
    epoch, rest = divmod(run.step, run.steps_per_epoch)
    last = run.step == run.total_steps
    return bool(every) and run.step > 0 and not rest and ((epoch - 1) % every == 0 or last)

def end_epoch(run, images, labels, evaluator, log, signals):
    """What is due, the checkpoint last: a run that goes on does all of it again, the same."""
    config, epoch = run.config, run.step // run.steps_per_epoch - 1
    save_due, eval_due = (is_due(every, run) for every in (config.save_every, config.eval_every))
    if save_due or eval_due:
        run.save(checkpoint.latest_paths(config)[0])
        signals.defer(False)
    if save_due:
        grid = evaluation.sample_grid(run.averages.denoiser, images, labels, config, epoch)
        log.image(run.step, "samples above real images", grid)
    if eval_due:
        seen = {"epoch": epoch, "Mimg": run.step * config.batch_size / 1e6}
        log.write(run.step, seen | evaluator.measure(run.averages.denoiser))
    if save_due:
        run.save(checkpoint.path_of(config, epoch))

class Run:
    """What a checkpoint holds: network, averages, optimizer, scaler, and the step they are at."""
    def __init__(self, config, args, device, images):
        self.config, self.device, self.n_images = config, device, len(images)
        self.images_sha256 = data.digest(images)
        self.steps_per_epoch = len(images) // config.batch_size     # The rest is dropped.
        self.total_steps = config.n_epoch * self.steps_per_epoch
        self.batch_process = config.batch_size // distributed.world_size()
        self.batch_gpu = diffusion.split(self.batch_process, args.batch_gpu or self.batch_process)
        self.step, self.window = 0, 0           # Steps done, and those before loss_sum begins.
        self.loss_sum = torch.zeros(2, device=device)               # Weighted and unweighted.
        self.bad_steps = torch.zeros([], dtype=torch.int64, device=device)      # In a row.
        self.next_save = time.monotonic() + 60 * config.save_minutes
        self.precision = flags.precision(args.amp_dtype)
        torch.manual_seed(config.seed)
        self.denoiser = diffusion.build(config, args.amp_dtype).to(device)
        if args.channels_last:
            self.denoiser.to(memory_format=torch.channels_last)
        if args.compile:
            self.denoiser.compile()
        self.model = self.denoiser if distributed.world_size() == 1 else DistributedDataParallel(
            self.denoiser, broadcast_buffers=False, gradient_as_bucket_view=True)
        self.averages = Averages(self.denoiser, config)
        self.optimizer = getattr(torch.optim, config.optim)(
            self.denoiser.parameters(), lr=config.lrate, fused=True,
            **config.optim_args.model_dump(exclude_none=True))
        self.scaler = torch.GradScaler(device.type, 64.0, enabled=args.amp_dtype == torch.float16)

    def count_step(self, grad_norm):
        """One step more. NaN and Inf gradients are counted; a count of MAX_BAD_STEPS stays."""
        good = torch.isfinite(grad_norm) & (self.bad_steps < MAX_BAD_STEPS)
        self.bad_steps, self.step = torch.where(good, 0, self.bad_steps + 1), self.step + 1
        self.averages.keep(self.step, self.total_steps)

    def check_gradients(self):
        """Raise UserError after MAX_BAD_STEPS. Waits for the GPU: not for every step."""
        if self.bad_steps.item() >= MAX_BAD_STEPS:
            raise UserError(f"NaN or Inf gradients in {MAX_BAD_STEPS} steps in a row by step "
                            f"{self.step}: try --amp_dtype bfloat16, no --use_amp or a lower lrate")

    def metrics(self, lr, grad_norm):
        """What is logged; losses are means per pixel over all processes since the last time."""
        self.check_gradients()
        n_images = (self.step - self.window) * self.config.batch_size
        loss, unweighted = (distributed.all_reduce(self.loss_sum) / n_images).tolist()
        self.loss_sum, self.window = torch.zeros_like(self.loss_sum), self.step
        return {"epoch": (self.step - 1) // self.steps_per_epoch,
                "Mimg": self.step * self.config.batch_size / 1e6,
                "loss": loss, "loss_unweighted": unweighted, "lr": lr,
                "grad_norm": grad_norm.item(), "ema_decay": self.averages.ema.get_current_decay()}

    def save(self, path):
        """Write a checkpoint, plain tensors and plain values; all processes call it."""
        self.check_gradients()              # What is saved can go on.
        state = self.averages.state() | {"network": self.denoiser.net.state_dict(),
            "uncertainty": self.denoiser.uncertainty.state_dict(),
            "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
            "step": self.step, "epoch": (self.step - 1) // self.steps_per_epoch,
            "loss_sum": distributed.all_reduce(self.loss_sum.clone()), "window": self.window,
            "bad_steps": self.bad_steps.item(), "n_images": self.n_images,
            "images_sha256": self.images_sha256,
            "precision": self.precision, "config": self.config.model_dump()}
        if self.config.save_model:
            distributed.on_rank0(checkpoint.save, path, state)
        self.next_save = time.monotonic() + 60 * self.config.save_minutes

    def resume(self, fresh):
        """Take over the checkpoint to go on from, if any; return whether the run is done."""
        distributed.on_rank0(files.remove_temporaries, self.config.save_dir)
        path = distributed.on_rank0(checkpoint.choose, self.config, fresh)
        if path is None:
            return False
        state = checkpoint.load(path)
        checkpoint.check_same(self.config, state["config"], dict(self.config).keys() - FREE)
        checkpoint.check_images(path, state, self.n_images, self.images_sha256)
        if state["precision"] != self.precision and distributed.rank() == 0:
            warn(f"the run was trained in {state['precision']} and goes on in {self.precision}")
        checkpoint.restore(self.denoiser.net, state["network"])
        checkpoint.restore(self.denoiser.uncertainty, state["uncertainty"])
        self.averages.restore(state)
        self.optimizer.load_state_dict(state["optimizer"])
        for p, moments in self.optimizer.state.items():         # In the memory layout of this run.
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = torch.empty_like(p).copy_(moments[name])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.window = state["step"], state["window"]
        self.bad_steps.fill_(state["bad_steps"])
        if distributed.rank() == 0:         # The other processes' sums are in it.
            self.loss_sum.copy_(state["loss_sum"])
        distributed.print0(f"going on in {self.config.save_dir} after step {self.step}")
        last = checkpoint.path_of(self.config, self.config.n_epoch - 1)
        return path == last or self.step > self.total_steps

    def finish(self):
        """Say what there is; a run that is done needs no save on the way any more."""
        done, latest = self.step >= self.total_steps, checkpoint.latest_paths(self.config)
        for path in latest if done and distributed.rank() == 0 else ():
            path.unlink(missing_ok=True)
        distributed.print0(f"done: what the run left is in {self.config.save_dir}" if done else
                           f"stopped after step {self.step}, as --max_steps says, unsaved")

if __name__ == "__main__":
    command(main)()
