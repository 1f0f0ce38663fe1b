"""What the tests share: a tiny config, commands in this process or as real ones, the data."""

import contextlib
import hashlib
import importlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
import pytest
import torch
import yaml
from threadpoolctl import threadpool_limits
from edm2.errors import command

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
NETS = ["UNetC", "UNetE", "UNetG"]

# In the background or under nohup they are ignored, and what the tests start would ignore them.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# Under pytest-xdist each worker, and all that it starts, has one core of its own: threads of two
# tests on one core wait for each other and slow both down tenfold.
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["PYTEST_XDIST_WORKER"][2:]) % len(cores)]})
    torch.set_num_threads(1)
    threadpool_limits(1)            # NumPy's and SciPy's.

needs_cifar10 = pytest.mark.skipif(not (DATA / "cifar-10-batches-py").is_dir(),
                                   reason=f"no CIFAR-10 in {DATA}")
needs_tiny = pytest.mark.skipif(not (DATA / "tiny-imagenet-200-small.zip").is_file(),
                                reason=f"no zip of Tiny ImageNet in {DATA}")

def tiny_config(folder, net_type="UNetC", **changes):
    """Write a config of a small network on the digits, 10 steps an epoch, to folder; its path."""
    config = {
        "dataset": "digits", "net_type": net_type,
        "network": {"image_shape": [1, 8, 8], "n_channels": 32, "ch_mults": [1, 1],
                    "is_attn": [False, True], "attn_channels_per_head": 16, "dropout": 0.0,
                    "n_blocks": 1},
        "diffusion": {"sigma_data": 0.85}, "n_epoch": 2, "batch_size": 140,
        "lrate": 1e-3 if net_type == "UNetC" else 1e-2,
        "warm_epoch": 0.5, "ema": 0.99, "n_sample": 4, "log_every": 5, "dynamics_every": 0,
        "save_dir": str(folder / "run"), "cache_dir": str(folder / "cache"),
    }
    network = config["network"] | changes.pop("network", {})
    path = Path(folder) / "config.yaml"
    path.write_text(yaml.safe_dump(config | {"network": network} | changes))
    return path

def run(script, *args, cwd=ROOT, processes=None, **how):
    """Run a command as a user does: `python script` in this process, or torchrun in real
    `processes`. Return its returncode, stdout and stderr."""
    if processes or how:
        return subprocess.run(**launch(script, *args, processes=processes, **how), cwd=cwd,
                              capture_output=True, timeout=600)
    module = script.removesuffix(".py")
    module = f"edm2.{module}" if module in ("results", "export") else module
    main, out, err = importlib.import_module(module).main, io.StringIO(), io.StringIO()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers], torch.get_num_threads()
    try:
        with (pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out),
              contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end):
            patch.chdir(cwd)
            patch.setattr(sys, "argv", [script, *map(str, args)])
            command(main)()
    finally:
        for number, handler in zip(numbers, before[0], strict=True):
            signal.signal(number, handler)
        torch.set_num_threads(before[1])
        socket.setdefaulttimeout(None)
    return SimpleNamespace(returncode=end.value.code, stdout=out.getvalue(), stderr=err.getvalue())

def succeed(*args, **how):
    """Run a command and return its standard output; its errors are the test's."""
    done = run(*args, **how)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout

def refused(*args, words, **how):
    """Run a command that must end in exit code 2 and one line on stderr that holds all `words`."""
    done = run(*args, **how)
    lines = [line for line in done.stderr.splitlines() if line.startswith(f"{args[0]}: ")]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr and 'File "' not in done.stderr
    for word in words:
        assert str(word) in lines[0], lines[0]

def launch(script, *args, processes=None, restarts=0):
    """Command line and environment of a real process, under torchrun where `processes` is given."""
    launcher = [sys.executable]
    if processes:
        launcher = [str(Path(sys.executable).with_name("torchrun")), "--standalone",
                    f"--nproc_per_node={processes}", f"--max-restarts={restarts}"]
    env = {name: value for name, value in os.environ.items()
           if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    return {"args": [*launcher, str(ROOT / script), *map(str, args)], "env": env, "text": True}

@contextlib.contextmanager
def started(folder, script, *args, cwd=ROOT, **how):
    """Start a real command; its output goes to folder/out and folder/err. What is left of it in the
    end is killed."""
    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        process = subprocess.Popen(**launch(script, *args, **how), stdout=out, stderr=err, cwd=cwd,
                                   start_new_session=True)
    try:
        yield process
    finally:
        kill_all(str(args[args.index("--config") + 1]))
        process.wait()

def processes_of(word):
    """The processes with `word` in their command line: {pid: RANK or None}; torchrun has none."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):      # It has ended meanwhile.
            if word in (folder / "cmdline").read_text(errors="replace") and int(
                    folder.name) != os.getpid():
                lines = (folder / "environ").read_text(errors="replace").split("\0")
                found[int(folder.name)] = next(
                    (line[5:] for line in lines if line.startswith("RANK=")), None)
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
    """The whole lines of metrics.jsonl that hold a key."""
    path = Path(save_dir) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [row for row in map(json.loads, (line for line in lines if line.endswith("\n")))
            if key in row]

def last_step(save_dir):
    """The step of the last line of metrics.jsonl."""
    return max((row["step"] for row in metrics(save_dir)), default=0)

def results(save_dir):
    """The lines of results.jsonl."""
    text = (Path(save_dir) / "results.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]

def weights(save_dir, epoch, key="network"):
    """One state dict of a checkpoint."""
    path = Path(save_dir) / "ckpts" / f"model_{epoch}.pth"
    return torch.load(path, weights_only=True)[key]

def distance(a, b):
    """L2 of the difference of two state dicts over the L2 of the first."""
    flat_a, flat_b = (torch.cat([v.flatten().double() for v in state.values()]) for state in (a, b))
    return ((flat_a - flat_b).norm() / flat_a.norm()).item()

@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of one run of 4 epochs of a tiny UNetE, a checkpoint each: config.yaml and run/.
    For all tests: copy run/ to change anything in it."""
    folder = tmp_path_factory.mktemp("trained")
    path = tiny_config(folder, "UNetE", n_epoch=4, save_every=1, flip=True, linear={
        "n_epoch": 20, "batch_size": 64, "lrate": 3e-3, "timestep": 4, "blockname": "out_2"})
    succeed("train.py", "--config", path)
    return folder

@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """A file with random weights in the layout of the FID's Inception-v3, whose features vary, and
    its SHA-256."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            """The constructor has nothing to load yet."""

    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save({}, path)
    state = Unloaded("inception-v3-compat", ["2048"],
                     feature_extractor_weights_path=path).state_dict()
    g = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if name.endswith("conv.weight"):        # He: activations keep their size.
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=g)
        elif name.endswith(("bn.bias", "fc.weight")):
            tensor.normal_(0, 0.1, generator=g)
    torch.save(state, path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()
