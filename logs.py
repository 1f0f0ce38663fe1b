"""What a run writes down: metrics.jsonl and results.jsonl, one JSON line per record, and the same in TensorBoard."""

import contextlib
import io
import json
import math
import os
import shlex
import socket
import sys
import time
from datetime import datetime
from importlib import metadata
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from files import atomic, make_folder, reported
from runtime import UserError, device_name, warn

# ----------------------------------------------------------------------------------------------------------------------
# TensorBoard's file format. Its SummaryWriter loses events, and its thread ends, where a disk is full for a while.

def events_path(folder):
    """A new file for TensorBoard, which reads those of a folder in the order of their names."""
    return make_folder(folder) / f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"


def event(step=0, **content):
    """The bytes of an event: summary=..., file_version=... or session_log=... at a step."""
    file = io.BytesIO()
    RecordWriter(file).write(Event(wall_time=time.time(), step=step, **content).SerializeToString())
    return file.getvalue()


def scalars(step, figures):
    """The bytes of one event with all figures, a dict of numbers and None."""
    return event(step, summary=Summary(value=[Summary.Value(tag=name, simple_value=value)
                                              for name, value in figures.items() if value is not None]))


HEADER = {"file_version": "brain.Event:2"}


# ----------------------------------------------------------------------------------------------------------------------
# Figures.

def append(path, data):
    """Append bytes to a file, all or none of them."""
    with open(path, "ab", buffering=0) as file:
        start, rest = file.tell(), memoryview(data)
        try:
            while rest:
                rest = rest[file.write(rest):]
        except OSError:
            file.truncate(start)
            raise


def step_of(line):
    """The step of a line of metrics.jsonl; infinity for a line that a crash has cut."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def holds(save_dir, step, name):
    """Whether a run's metrics.jsonl holds a figure of that name at a step."""
    path = Path(save_dir) / "metrics.jsonl"
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return any(step_of(line) == step and name in json.loads(line) for line in lines)


def seen_mimg(config, epoch, n_images):
    """Million training images seen by the end of an epoch, of n_images in the training set."""
    return (epoch + 1) * (n_images // config["batch_size"]) * config["batch_size"] / 1e6


def record(config, results, device):
    """Append results to save_dir/results.jsonl, one line each, and show them in TensorBoard at their epochs.

    results: (TensorBoard's name, {figure, value, epoch, ...}) each; the command, versions, device and date are added.
    """
    common = {"dataset": config["dataset"], "net_type": config["net_type"],
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "versions": {name: metadata.version(name) for name in ("torch", "torchvision", "torch-fidelity", "numpy")},
            "processes": int(os.environ.get("WORLD_SIZE", 1)), "device": device_name(device),
            "date": datetime.now().astimezone().isoformat(timespec="seconds")}
    path = make_folder(config["save_dir"]) / "results.jsonl"
    lines = "".join(json.dumps(result | common) + "\n" for _, result in results).encode()
    cut = path.exists() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
    with reported(path):
        append(path, b"\n" * cut + lines)
    # In a folder of their own: TensorBoard follows the newest file of a folder, and training may still write its own.
    board = events_path(Path(config["save_dir"]) / "tensorboard" / "scores")
    with reported(board):
        append(board, event(**HEADER) + b"".join(scalars(result["epoch"], {name: result["value"]})
                                                 for name, result in results))


class Log:
    """Figures of a run: one JSON line each in save_dir/metrics.jsonl, training dynamics in dynamics.jsonl beside it,
    and both in TensorBoard, in save_dir/tensorboard.

    A run that goes on from `step` drops what comes after it. What a full disk does not take is kept and written later.
    Active in the main process alone.
    """

    def __init__(self, save_dir, step, active):
        self.active, self.failures, self.full = active, [], set()       # What could not be written; where now.
        if not active:
            return
        self.path, self.dynamics_path = (Path(save_dir) / name for name in ("metrics.jsonl", "dynamics.jsonl"))
        for path in (self.path, self.dynamics_path):
            kept = [line.rstrip("\n") + "\n" for line in path.read_text(errors="replace").splitlines(keepends=True)
                    if step_of(line) <= step] if path.exists() else []
            if kept or path.exists() or path == self.path:
                with atomic(path) as temporary:
                    temporary.write_text("".join(kept))
        self.board = events_path(Path(save_dir) / "tensorboard")
        start = event(step + 1, session_log=SessionLog(status=SessionLog.START))    # What is later in others is void.
        self.step = step
        self.pending = {self.path: b"", self.board: event(**HEADER) + start}        # Not on disk yet.
        self.flush()

    def write(self, step, figures):
        """Write figures (a dict of numbers and None) at a step, counted in steps done."""
        if self.active:
            self.step = step
            plain = {k: v if v is None or math.isfinite(v) else None for k, v in figures.items()}
            self.pending[self.path] += json.dumps({"step": step, **plain}).encode() + b"\n"
            self.pending[self.board] += scalars(step, figures)
            self.flush()

    def dynamics(self, step, record):
        """Write a record of dynamics.Recorder at a step."""
        if self.active:
            self.step = step
            self.pending[self.dynamics_path] = (self.pending.get(self.dynamics_path, b"")
                                                + json.dumps({"step": step, **record}).encode() + b"\n")
            figures = {}
            for kind in ("activation", "weight", "gradient", "update"):
                for group, values in record[kind].items():
                    place, _, size = group.partition(" ")
                    figures |= {"_".join(filter(None, [f"dynamics_{place}/{kind}", size, name])): value
                                for name, value in values.items()}
            self.pending[self.board] += scalars(step, figures)
            self.flush()

    def image(self, step, name, image):
        """Show an image (C,H,W) uint8 in TensorBoard."""
        if self.active:
            self.pending[self.board] += event(step, summary=summary.image(name, image, dataformats="CHW"))
            self.flush()

    def failed(self, step, message):
        """Say on stderr and in TensorBoard that something could not be written."""
        self.failures.append(message)
        warn(f"{message}; training goes on")
        self.pending[self.board] += event(step, summary=summary.text("failed writes", message))

    def flush(self):
        """Write out what is pending; what the disk does not take stays for the next time, which is said once."""
        for path, data in self.pending.items():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)      # Somebody may have moved it away.
                append(path, data)
                self.pending[path] = b""
                self.full.discard(path)
            except OSError as e:
                if path not in self.full:
                    self.full.add(path)
                    self.failed(self.step, f"cannot write {path}: {e.strerror}")

    def sync(self):
        """Bring the lines that are written to the disk itself, so that no checkpoint is newer than they."""
        for path in list(self.pending):     # Another thread may add one.
            with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
                os.fsync(file.fileno())

    def close(self):
        """Write out what is pending."""
        if self.active:
            self.flush()

    def check(self):
        """Raise UserError where anything could not be written in time."""
        if self.failures:
            raise UserError(f"the run has ended, but {len(self.failures)} times something could not be written; first: "
                            f"{self.failures[0]}")
