"""Training dynamics: the records are right and change nothing; results.py draws them."""

import json
import math

import pytest
import torch
from conftest import NETS, metrics, run, succeed, tiny_config
from PIL import Image
from test_train import training

from dynamics import default_every


def records(save_dir):
    return [json.loads(line) for line in (save_dir / "dynamics.jsonl").read_text().splitlines()]


def flat(groups):
    return {name: value for group in groups.values() for name, value in group.items()}


def rms(x):
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize("net_type", NETS)
def test_a_record_is_what_happened(tmp_path, net_type, dtype):
    t = training(tmp_path, net_type, dtype, batch_size=8, dynamics_every=2, warm_epoch=0)
    assert t.recorder.take() is None
    gradients = {}
    for step in range(4):
        handles = [p.register_hook(lambda grad, name=name: gradients.update({name: grad.clone()}))
                   for name, p in t.edm.net.named_parameters()]
        kept = {}
        t.optimizer.register_step_pre_hook(lambda *_, kept=kept: kept.update(
            {name: p.detach().clone() for name, p in t.edm.net.named_parameters()}))
        scale = t.scaler.get_scale()
        t.training_step(torch.arange(8))
        for handle in handles:
            handle.remove()
        record = t.recorder.take()
        assert (record is not None) == (step in (0, 2, 3))          # The last is one, too.
        if record:
            for name, p in t.edm.net.named_parameters():
                if p.ndim > 1:
                    short = name.removesuffix(".weight")
                    assert flat(record["weight"])[short] == pytest.approx(rms(kept[name]), rel=1e-5)
                    assert flat(record["gradient"])[short] == pytest.approx(rms(gradients[name] / scale), rel=1e-4)
                    assert flat(record["update"])[short] == pytest.approx(
                        rms(p.detach() - kept[name]) / rms(kept[name]), rel=1e-3, abs=1e-9)
            assert len(flat(record["activation"])) == len([*t.edm.net.encoder, *t.edm.net.middle, *t.edm.net.decoder])


def test_activations_are_those_of_the_blocks(tmp_path):
    """Against a forward pass by hand, and grouped by place and resolution."""
    t = training(tmp_path, "UNetG", batch_size=8, dynamics_every=1)
    t.training_step(torch.arange(8))
    recorder = t.recorder
    recorder.take()
    found, net = [x.item() for x in recorder.activations()], t.edm.net
    assert net.training
    s = recorder.sigma[:, None, None, None]
    outputs = {}
    handles = [block.register_forward_hook(lambda m, i, x, name=name: outputs.update({name: x}))
               for name, block in recorder.blocks.items()]
    net.eval()
    with torch.no_grad():
        net(recorder.noisy / (s ** 2 + 0.25).sqrt(), recorder.sigma.log() / 4)
    for handle in handles:
        handle.remove()
    assert found == pytest.approx([rms(outputs[name]) for name in recorder.blocks], rel=1e-5)
    for name, x in outputs.items():
        assert recorder.group(name).split()[1] == f"{x.shape[2]}x{x.shape[3]}"
    assert recorder.group("stem") == "encoder 8x8" and recorder.group("encoder.0.emb") == "embedding"
    assert recorder.group("middle.0.conv0") == "decoder 4x4" and recorder.group("emb0") == "embedding"


@pytest.mark.parametrize("net_type", NETS)
def test_recording_changes_nothing(tmp_path, net_type):
    """Weights and averages are bitwise equal with and without it; dropout included."""
    states = []
    for every in (0, 1):
        torch.manual_seed(0)
        t = training(tmp_path, net_type, batch_size=8, dynamics_every=every, network={"dropout": 0.3})
        for _ in range(4):
            t.training_step(torch.arange(8))
        states.append(t.state())
    for key in ("network", "ema", "uncertainty"):
        assert all(torch.equal(states[0][key][name], states[1][key][name]) for name in states[0][key])


def test_what_is_not_finite_is_left_open(tmp_path):
    t = training(tmp_path, batch_size=8, dynamics_every=1)
    t.edm.net.stem.weight.register_hook(lambda grad: torch.full_like(grad, math.nan))
    t.training_step(torch.arange(8))
    assert flat(t.recorder.take()["gradient"])["stem"] is None


def test_a_run_records_and_goes_on(tmp_path):
    """What comes after the checkpoint that a run goes on from is dropped; two processes
    record what one does; TensorBoard has it in groups."""
    config = tiny_config(tmp_path, "UNetG", n_epoch=1, dynamics_every=3)
    succeed("train.py", "--config", config)
    found = records(tmp_path / "run")
    assert [line["step"] for line in found] == [1, 4, 7, 10]
    with open(tmp_path / "run" / "dynamics.jsonl", "a") as f:
        f.write(json.dumps(found[-1] | {"step": 16}) + "\n" + '{"step": 17, "cut')
    succeed("train.py", "--config", config, "--set", "n_epoch=2", "--set", "eval_every=5")      # May change.
    assert [line["step"] for line in records(tmp_path / "run")] == [1, 4, 7, 10, 13, 16, 19, 20]
    succeed("train.py", "--config", config, "--set", f"save_dir={tmp_path / 'two'}", processes=2)
    for one, two in zip(found, records(tmp_path / "two"), strict=True):
        for kind in ("activation", "weight"):
            assert flat(two[kind]) == pytest.approx(flat(one[kind]), rel=1e-3)
    board = b"".join(path.read_bytes() for path in (tmp_path / "run" / "tensorboard").glob("events*"))
    for word in (b"dynamics_encoder/activation_4x4_encoder.0", b"dynamics_embedding/weight_emb0",
                 b"dynamics_decoder/update_4x4_middle.0.conv0"):
        assert word in board
    assert all("activation" not in line for line in metrics(tmp_path / "run"))


def test_the_default_is_200_records_25_steps_apart():
    assert [default_every(steps) for steps in (1, 1320, 5000, 5001, 8000, 1_000_000)] == [25, 25, 25, 26, 40, 5000]


def test_compiled_training_is_recorded_and_unchanged(tmp_path):
    """torch.compile sees one graph, whether or not a step is recorded."""
    graphs, states = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for every in (0, 2):
        torch.compiler.reset()
        t = training(tmp_path, "UNetG", batch_size=8, dynamics_every=every)
        t.edm.compile(backend=backend)
        for _ in range(4):
            t.training_step(torch.arange(8))
        states.append(t.state()["network"])
    assert len(graphs) == 2 and t.recorder.take()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    torch.compiler.reset()


def write(folder, dataset="digits", net_type="UNetG", **more):
    folder.mkdir()
    groups = {"encoder 8x8": {"encoder.0": 1.0}, "decoder 8x8": {"decoder.0": 2.0, "decoder.1": None},
              "embedding": {"emb0": 0.5}}
    lines = [{"step": step, "dataset": dataset, "net_type": net_type, "Mimg": step / 10,
              **dict.fromkeys(("activation", "weight", "gradient", "update"), groups)} | more for step in (1, 2)]
    (folder / "dynamics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_dynamics_are_drawn(tmp_path):
    out = tmp_path / "out.png"
    done = succeed("results.py", "--dynamics", write(tmp_path / "c", net_type="UNetC"), write(tmp_path / "g"),
                   "--out", out)
    assert str(out) in done
    assert "| 0.50 to inf | inf% (decoder.1) | 0.5 to inf |" in done      # None: it was NaN or Inf.
    with Image.open(out) as image:
        assert image.width > 1200 and len(image.convert("RGB").getcolors(1 << 20)) > 50


def test_bad_input(tmp_path):
    good, other = write(tmp_path / "g"), write(tmp_path / "o", dataset="cifar10")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "dynamics.jsonl").write_text('{"step": 1}\n' + (good / "dynamics.jsonl").read_text().replace(
        '{"encoder.0": 1.0}', "{}"))
    for arguments, words in (
            (["--dynamics", tmp_path / "no"], ["cannot read", "dynamics_every"]),
            (["--dynamics", empty], ["no records"]),
            (["--dynamics", good, other], ["same data", "digits", "cifar10"]),
            (["--dynamics", good, "--ema", good], ["not allowed with"]),
            (["--figure", "FID"], ["--ema"]),
            ([good, "--dynamics", good], ["alone"])):
        done = run("results.py", *arguments, "--out", tmp_path / "out.png")
        assert done.returncode == 2 and all(word in done.stderr for word in words), done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.png").exists()


def test_weights_of_e_and_g_do_not_move_and_those_of_c_do(tmp_path):
    """A real run on the digits: forced weight normalization, seen in the records (EDM2 2.2)."""
    moved = {}
    for net_type in NETS:
        config = tiny_config(tmp_path, net_type, n_epoch=12, save_dir=str(tmp_path / net_type), dynamics_every=10,
                             save_every=100)
        succeed("train.py", "--config", config)
        found = [flat(line["weight"]) for line in records(tmp_path / net_type)]
        moved[net_type] = max(max(line[name] for line in found) / min(line[name] for line in found) - 1
                              for name in found[0])
    assert moved["UNetE"] < 1e-3 and moved["UNetG"] < 1e-3 < 0.02 < moved["UNetC"], moved
