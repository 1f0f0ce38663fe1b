"""Training dynamics: how large activations, weights, gradients and updates are (EDM2 Fig. 3, 4).

train.py records them in save_dir/dynamics.jsonl; `python -m edm2.results --dynamics` draws them."""

import itertools
import json
import math
from pathlib import Path
import torch
from edm2 import data, diffusion, distributed
from edm2.errors import UserError, warn

N_IMAGES = 8            # That the activations are of.
ROWS = {"activation": "activations (RMS)", "weight": "weights (RMS)",
        "update": "update / weight (RMS)"}      # Of the figure.

def default_every(total_steps):
    """Steps between records: 200 a run, in under 1 % of the time (benchmarks/README.md)."""
    return max(25, -(-total_steps // 200))

class Recorder:
    """The root mean squares (RMS) that a run's dynamics consist of, in rank 0.
    Activations: of every block's output, without dropout, of the same N_IMAGES of images (N,C,H,W)
    uint8 and noise each time, at as many quantiles of the training's noise levels. Weights,
    gradients, updates: of every weight as the step's forward pass has left it (in E and G
    normalized); the update is the optimizer's change, relative to that RMS (EDM2 2.2)."""
    def __init__(self, denoiser, images, labels, config, total_steps):
        self.denoiser, self.config, self.total_steps = denoiser, config, total_steps
        every, net = config.dynamics_every, denoiser.net
        self.every = default_every(total_steps) if every is None else every
        self.groups = block_groups(net, *images.shape[2:])
        self.blocks = {name: net.get_submodule(name) for name in self.groups if "." in name}
        named = net.named_parameters()
        self.weights = {n.removesuffix(".weight"): p for n, p in named if p.ndim > 1}
        g = torch.Generator().manual_seed(diffusion.derive_seed(0, N_IMAGES))
        device = net.stem.weight.device
        index = torch.linspace(0, len(images) - 1, N_IMAGES).long()
        y, self.labels = data.batch(images, index, device), labels[index.to(device)]
        level = torch.special.ndtri((torch.arange(N_IMAGES) + 0.5) / N_IMAGES)
        self.sigma = (config.diffusion.p_mean + config.diffusion.p_std * level).exp().to(device)
        noise = torch.randn(y.shape, generator=g).to(device)
        self.noisy = y + self.sigma[:, None, None, None] * noise

    @torch.no_grad()
    def before_update(self, step):
        """Between the backward pass and the optimizer of a step, counted from 0; of those recorded
        (the first, every so many, the last) keep what the update will change."""
        due = self.every > 0 and (step % self.every == 0 or step == self.total_steps - 1)
        self.norms = None
        if due and distributed.rank() == 0:
            weights = list(self.weights.values())
            self.norms = {"activation": self.activations(), "weight": torch._foreach_norm(weights),
                          "gradient": torch._foreach_norm([p.grad for p in weights])}
            self.before = [p.clone() for p in weights]

    @torch.no_grad()
    def after_update(self, step):
        """After it: a record, its file's name and TensorBoard's tags, for Log.write, or None."""
        if self.norms is None:
            return None
        updates = torch._foreach_sub(list(self.weights.values()), self.before)
        self.norms["update"], self.before = torch._foreach_norm(updates), None
        norms = [norm.float() for norms in self.norms.values() for norm in norms]
        numbers = iter(torch.stack(norms).tolist())         # All from the device at once.
        rms = {"activation": {name: next(numbers) for name in self.blocks}}
        for kind in ("weight", "gradient", "update"):
            rms[kind] = {name: next(numbers) / p.numel() ** 0.5 for name, p in self.weights.items()}
        rms["update"] = {n: x / (rms["weight"][n] or math.nan) for n, x in rms["update"].items()}
        record, tags = {"dataset": self.config.dataset, "net_type": self.config.net_type,
                        "Mimg": (step + 1) * self.config.batch_size / 1e6}, {}
        for kind, values in rms.items():
            record[kind] = {}               # {group: {name: RMS}}, None for NaN and Inf.
            for name, value in values.items():
                value, group = value if math.isfinite(value) else None, self.group(name)
                record[kind].setdefault(group, {})[name] = value
                place, *size = group.split()
                tags["_".join([f"dynamics_{place}/{kind}", *size, name])] = value
        return record, "dynamics", tags

    def activations(self):
        """The RMS of each block's output, a list of scalar tensors."""
        found = []
        hooks = [block.register_forward_hook(lambda block, inputs, x: found.append(
            x.float().square().mean().sqrt())) for block in self.blocks.values()]
        self.denoiser.eval()                # Here E and G leave the stored weights as they are.
        self.denoiser.denoise(self.noisy, self.sigma, self.labels)      # Only forward is compiled.
        self.denoiser.train()
        for hook in hooks:
            hook.remove()
        return found

    def group(self, name):
        """The group of a block or weight, such as "encoder 16x16" or "embedding"."""
        part = name.split(".")
        of_embedding = part[0].startswith("emb") or "emb" in part
        return "embedding" if of_embedding else self.groups[".".join(part[:2])]

def block_groups(net, H, W):
    """{"encoder.0": "encoder 32x32", ...}, by the output size; the middle is of the decoder."""
    groups = {"stem": f"encoder {H}x{W}", "out_conv": f"decoder {H}x{W}"}
    for part in ("encoder", "middle", "decoder"):
        for i, block in enumerate(getattr(net, part)):
            factor = {"down": 0.5, "up": 2, None: 1}[block.resample_mode]
            H, W = int(H * factor), int(W * factor)
            groups[f"{part}.{i}"] = f"{'encoder' if part == 'encoder' else 'decoder'} {H}x{W}"
    return groups

def read_lines(path, check, remedy):
    """The JSON lines of a file that check(line) accepts; others are named. UserError: none."""
    found, rows = [], path.read_text(errors="replace").splitlines() if path.exists() else []
    for row in filter(str.strip, rows):
        try:
            check(line := json.loads(row))
            found.append(line)
        except (ValueError, LookupError, TypeError, AttributeError):
            warn(f"{path}: a damaged line is left out: {row[:60]}")
    if not found:
        raise UserError(f"{path} is not there, or holds nothing to show: {remedy}")
    return found

def read(runs):
    """{run: its records}. Raises UserError where there are none, or they are of different data."""
    def check(line):
        if not all(line[kind] and all(line[kind].values()) for kind in ROWS):
            raise ValueError
        line["net_type"], line["Mimg"] = str(line["net_type"]), float(line["Mimg"])

    remedy = "name the save_dir of a run with dynamics_every other than 0"
    records = {run: read_lines(Path(run) / "dynamics.jsonl", check, remedy) for run in runs}
    if len(datasets := {str(found[-1]["dataset"]) for found in records.values()}) > 1:
        raise UserError(f"--dynamics compares runs of the same data, not {', '.join(datasets)}")
    return records

def table(records):
    """Markdown, a row per run: how far single blocks and weights went, which means do not show."""
    rows = ["| run | activations of a block (RMS), least to most | largest change of a weight's RMS"
            " | update / weight (RMS) of a layer at the end, least to most |", "|---" * 4 + "|"]
    for run, found in records.items():
        series = {kind: {} for kind in ROWS}            # {kind: {block or weight: its values}}
        for line, kind in itertools.product(found, ROWS):
            for name, value in (item for group in line[kind].values() for item in group.items()):
                series[kind].setdefault(name, []).append(math.inf if value is None else value)
        moved = {name: max(values) / min(values) - 1 if 0 < min(values) < math.inf else math.inf
                 for name, values in series["weight"].items()}
        sizes = [value for values in series["activation"].values() for value in values]
        last, most = [values[-1] for values in series["update"].values()], max(moved, key=moved.get)
        rows.append(f"| {run} | {min(sizes):.2f} to {max(sizes):.3g} | {moved[most]:.3%} ({most}) "
                    f"| {min(last):.2g} to {max(last):.2g} |")
    return "\n".join(rows) + "\n"

def curves(records):
    """{kind: {run: {group: [(Mimg, mean over the group)]}}} of records, for results.draw."""
    def mean(values):                       # Of what is known.
        known = [value for value in values.values() if value is not None]
        return sum(known) / len(known) if known else math.nan

    return {title: {f"{found[-1]['net_type']} ({run})": {
        group: [(line["Mimg"], mean(line[kind].get(group, {}))) for line in found]
        for group in found[-1][kind]} for run, found in records.items()}
        for kind, title in ROWS.items()}
