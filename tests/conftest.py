"""What the tests share: a tiny config, the commands as real processes, and where the real data lie."""

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
NETS = ["UNetC", "UNetE", "UNetG"]

signal.signal(signal.SIGHUP, signal.SIG_DFL)        # Under nohup the commands would rightly ignore it.

# Under pytest-xdist each worker, and all that it starts, has one core of its own: threads of two tests on one core
# wait for each other and slow both down tenfold.
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(cores)]})
    torch.set_num_threads(1)

needs_cifar10 = pytest.mark.skipif(not (DATA / "cifar-10-batches-py").is_dir(), reason=f"no CIFAR-10 in {DATA}")
needs_tiny = pytest.mark.skipif(not (DATA / "tiny-imagenet-200-small.zip").is_file(), reason=f"no zip in {DATA}")


def tiny_config(folder, net_type="UNetC", **changes):
    """Write a config of a small network on the digits, 10 steps an epoch, to folder; return its path."""
    config = {
        "dataset": "digits", "net_type": net_type,
        "network": {"image_shape": [1, 8, 8], "n_channels": 32, "ch_mults": [1, 1], "is_attn": [False, True],
                    "attn_channels_per_head": 16, "dropout": 0.0, "n_blocks": 1},
        "n_epoch": 2, "batch_size": 140, "lrate": 1e-3 if net_type == "UNetC" else 1e-2, "warm_epoch": 0.5,
        "ema": 0.99, "n_sample": 4, "log_every": 5, "save_dir": str(folder / "run"), "cache_dir": str(folder / "cache"),
        "dynamics_every": 0,
    }
    network = config["network"] | changes.pop("network", {})
    path = Path(folder) / "config.yaml"
    path.write_text(yaml.safe_dump(config | {"network": network} | changes))
    return path


def launch(script, *args, processes=None, restarts=0, port=None):
    """The command line and environment of a command, under torchrun where `processes` is given; with a port as on one
    machine of two."""
    launcher = [sys.executable]
    if processes:
        machines = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}"] if port else [
            "--standalone"]
        launcher = [str(Path(sys.executable).with_name("torchrun")), *machines, f"--nproc_per_node={processes}",
                    f"--max-restarts={restarts}"]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    return {"args": [*launcher, str(ROOT / script), *map(str, args)], "env": env, "text": True}


def run(script, *args, cwd=ROOT, timeout=600, **how):
    """Run a command as a user does; return the finished process."""
    return subprocess.run(**launch(script, *args, **how), cwd=cwd, timeout=timeout, capture_output=True)


def succeed(*args, **kwargs):
    """Run a command and return its standard output; its errors are the test's."""
    done = run(*args, **kwargs)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@contextlib.contextmanager
def started(folder, script, *args, cwd=ROOT, **how):
    """Start a command; its output goes to folder/out and folder/err. What is left of it in the end is killed."""
    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        process = subprocess.Popen(**launch(script, *args, **how), stdout=out, stderr=err, start_new_session=True,
                                   cwd=cwd)
    try:
        yield process
    finally:
        kill_all(str(args[args.index("--config") + 1]))
        process.wait()


def free_port():
    """A TCP port that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def processes_of(word):
    """The processes with `word` in their command line: {pid: environment}; torchrun has no RANK in its own."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if word in (folder / "cmdline").read_text(errors="replace") and int(folder.name) != os.getpid():
                lines = (folder / "environ").read_text(errors="replace").split("\0")
                found[int(folder.name)] = dict(line.partition("=")[::2] for line in lines)
        except OSError:                     # It has ended meanwhile.
            pass
    return found


def kill_all(word):
    """SIGKILL to every process with `word` in its command line."""
    for pid in processes_of(word):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_until(condition, timeout=120):
    """Look every 5 ms until condition() is true."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.005)


def metrics(save_dir, key="loss"):
    """The whole lines of metrics.jsonl that hold a figure."""
    path = Path(save_dir) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [row for row in map(json.loads, (line for line in lines if line.endswith("\n"))) if key in row]


def last_step(save_dir):
    """The step of the last line of metrics.jsonl."""
    return max((row["step"] for row in metrics(save_dir)), default=0)


def weights(save_dir, epoch, key="network"):
    """One state dict of a checkpoint."""
    return torch.load(Path(save_dir) / "ckpts" / f"model_{epoch}.pth", weights_only=True)[key]


def distance(a, b):
    """L2 of the difference of two state dicts over the L2 of the first."""
    flat_a, flat_b = (torch.cat([v.flatten().double() for v in state.values()]) for state in (a, b))
    return ((flat_a - flat_b).norm() / flat_a.norm()).item()


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """A file with random weights in the layout of the FID's Inception-v3, whose features vary, and its SHA-256."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            """The constructor has nothing to load yet."""

    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save({}, path)
    weights = Unloaded("inception-v3-compat", ["2048"], feature_extractor_weights_path=path).state_dict()
    g = torch.Generator().manual_seed(0)
    for name, tensor in weights.items():
        if name.endswith("conv.weight"):
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=g)      # He: activations keep their size.
        elif name.endswith(("bn.bias", "fc.weight")):
            tensor.normal_(0, 0.1, generator=g)
    torch.save(weights, path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()
