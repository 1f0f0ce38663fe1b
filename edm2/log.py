"""What a run writes down: metrics and training dynamics as JSON lines, and all in TensorBoard."""

import contextlib
import json
import math
from pathlib import Path
from torch.utils.tensorboard import SummaryWriter
from edm2.distributed import rank
from edm2.errors import UserError, warn
from edm2.files import atomic

class Log:
    """metrics.jsonl and dynamics.jsonl in save_dir, and the same in TensorBoard; by rank 0 alone. A
    run that goes on after `step` drops what came later, and, to do it `again`, its evaluation."""
    def __init__(self, save_dir, step, again=False):
        self.folder, self.board = Path(save_dir), None
        if rank() == 0:
            for path in self.folder.glob("[md]*.jsonl"):
                with atomic(path) as temporary:
                    temporary.write_text("".join(lines_until(path, step, again)))
            self.board = SummaryWriter(self.folder / "tensorboard", purge_step=step + 1)

    def write(self, step, values, name="metrics", scalars=None):
        """Append values to a file, NaN and Inf said and null; to TensorBoard `scalars` or all."""
        if self.board:
            bad = {key: None for key, value in values.items()
                   if isinstance(value, float) and not math.isfinite(value)}
            if said := [key for key in bad if key != "grad_norm"]:         # These are counted.
                warn(f"step {step}: {', '.join(said)} is NaN or Inf")
            plain = values | bad
            try:
                with open(self.folder / f"{name}.jsonl", "a") as file:
                    file.write(json.dumps({"step": step} | plain) + "\n")
                for tag, value in (scalars or plain).items():
                    if value is not None:
                        self.board.add_scalar(tag, value, step)
                self.board.flush()
            except OSError as e:            # It names no file.
                raise UserError(f"cannot write {name} in {self.folder}: {e.strerror}") from None

    def image(self, step, name, image):
        """Show an image (C,H,W) uint8 in TensorBoard."""
        if self.board:
            self.board.add_image(name, image, step)

def lines_until(path, step, again):
    """The whole lines of the steps until `step`; `again`: but for its evaluation."""
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            redone = again and "heldout_loss" in row
            if row["step"] < step or (row["step"] == step and not redone):
                yield line + "\n"
