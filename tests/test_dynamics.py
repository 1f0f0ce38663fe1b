"""Training dynamics: the records are right (test_speed.py: and change nothing) and are drawn."""

import json
import math
import pytest
import torch
from conftest import NETS, metrics, refused, run, succeed, tiny_config
from PIL import Image
from steps import IMAGES, LABELS, train_steps
from edm2.dynamics import Recorder, default_every

def records(save_dir):
    return [json.loads(line) for line in (save_dir / "dynamics.jsonl").read_text().splitlines()]

def flat(groups):
    return {name: value for group in groups.values() for name, value in group.items()}

def rms(x):
    return x.double().square().mean().sqrt().item()

@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize("net_type", NETS)
def test_a_record_is_what_happened(tmp_path, net_type, dtype):
    weights, before, gradients, checked = {}, {}, {}, []

    def begin(run):
        for name, p in run.denoiser.net.named_parameters():
            if p.ndim > 1:
                weights[name := name.removesuffix(".weight")] = p
                p.register_post_accumulate_grad_hook(lambda p, name=name: gradients.update(
                    {name: rms(p.grad / run.scaler.get_scale())}))
        run.optimizer.register_step_pre_hook(lambda *_: before.update(
            {name: p.detach().clone() for name, p in weights.items()}))

    def after(run):
        record, net = records(tmp_path / "run")[-1], run.denoiser.net
        if record["step"] == run.step:
            checked.append(run.step)
            norms = {name: rms(p) for name, p in before.items()}
            updates = {name: rms(p.detach() - before[name]) / norms[name]
                       for name, p in weights.items()}
            for kind, found, rel in (("weight", norms, 1e-5), ("gradient", gradients, 1e-4),
                                     ("update", updates, 1e-3)):
                assert flat(record[kind]) == pytest.approx(found, rel=rel, abs=1e-9), kind
            blocks = [*net.encoder, *net.middle, *net.decoder]
            assert len(flat(record["activation"])) == len(blocks)

    train_steps(tmp_path, net_type, dtype, 4, begin, after, dynamics_every=2, warm_epoch=0)
    assert checked == [1, 3, 4]                     # The last is one, too.

def test_activations_are_those_of_the_blocks(tmp_path):
    """Against a forward pass by hand, and grouped by place and resolution."""
    run = train_steps(tmp_path, "UNetG", n=1)
    recorder, net = Recorder(run.denoiser, IMAGES, LABELS, run.config, 1), run.denoiser.net
    found, outputs = [x.item() for x in recorder.activations()], {}
    assert net.training
    for name, block in recorder.blocks.items():
        block.register_forward_hook(lambda m, i, x, name=name: outputs.update({name: x}))
    net.eval()
    with torch.no_grad():
        c_in = 1 / (recorder.sigma[:, None, None, None] ** 2 + 0.85 ** 2).sqrt()
        net(c_in * recorder.noisy, recorder.sigma.log() / 4)
    assert found == pytest.approx([rms(outputs[name]) for name in recorder.blocks], rel=1e-5)
    for name, x in outputs.items():
        assert recorder.group(name).split()[1] == f"{x.shape[2]}x{x.shape[3]}"
    for name, group in {"stem": "encoder 8x8", "middle.0.conv0": "decoder 4x4", "emb0": "embedding",
                        "encoder.0.emb": "embedding"}.items():
        assert recorder.group(name) == group

def test_what_is_not_finite_is_left_open(tmp_path):
    train_steps(tmp_path, n=1, dynamics_every=1, begin=lambda run: run.denoiser.net.stem.weight
                .register_hook(lambda grad: torch.full_like(grad, math.nan)))
    assert flat(records(tmp_path / "run")[0]["gradient"])["stem"] is None

@pytest.mark.slow
def test_a_run_records_and_goes_on(tmp_path):
    """What comes after the checkpoint that a run goes on from is dropped; two processes
    record what one does; TensorBoard has it in groups. By default there are 200, 25 steps apart."""
    found = [default_every(steps) for steps in (1, 1320, 5000, 5001, 8000, 1_000_000)]
    assert found == [25, 25, 25, 26, 40, 5000]
    config, folder = tiny_config(tmp_path, "UNetG", n_epoch=1, dynamics_every=3), tmp_path / "run"
    succeed("train.py", "--config", config)
    found = records(folder)
    assert [line["step"] for line in found] == [1, 4, 7, 10]
    with open(folder / "dynamics.jsonl", "a") as f:
        f.write(json.dumps(found[-1] | {"step": 16}) + "\n" + '{"step": 17, "cut')
    succeed("train.py", "--config", config, "--set", "n_epoch=2", "--set", "eval_every=5",
            "--set", "eval.images=8")               # All of them may change.
    assert [line["step"] for line in records(folder)] == [1, 4, 7, 10, 13, 16, 19, 20]
    succeed("train.py", "--config", config, "--set", f"save_dir={tmp_path / 'two'}", processes=2)
    for one, two in zip(found, records(tmp_path / "two"), strict=True):
        for kind in ("activation", "weight"):
            assert flat(two[kind]) == pytest.approx(flat(one[kind]), rel=1e-3)
    board = b"".join(path.read_bytes() for path in (folder / "tensorboard").glob("events*"))
    for word in (b"dynamics_encoder/activation_4x4_encoder.0", b"dynamics_embedding/weight_emb0",
                 b"dynamics_decoder/update_4x4_middle.0.conv0"):
        assert word in board
    assert all("activation" not in line for line in metrics(folder))

def write(folder, dataset="digits", net_type="UNetG"):
    groups = {"encoder 8x8": {"encoder.0": 1.0}, "embedding": {"emb0": 0.5},
              "decoder 8x8": {"decoder.0": 2.0, "decoder.1": None}}
    line = {"dataset": dataset, "net_type": net_type,
            **dict.fromkeys(("activation", "weight", "gradient", "update"), groups)}
    folder.mkdir()
    (folder / "dynamics.jsonl").write_text("".join(
        json.dumps(line | {"step": step, "Mimg": step / 10}) + "\n" for step in (1, 2)))
    return folder

def test_dynamics_are_drawn_and_bad_input_is_refused(tmp_path):
    good, out = write(tmp_path / "g"), tmp_path / "out.png"
    other, empty = write(tmp_path / "o", "cifar10"), write(tmp_path / "empty")
    text = (empty / "dynamics.jsonl").read_text().replace('{"encoder.0": 1.0}', "{}")
    (empty / "dynamics.jsonl").write_text('{"step": 1}\n' + text)
    for arguments, words in (
            (["--dynamics", tmp_path / "no"], [f"{tmp_path}/no/dynamics.jsonl", "dynamics_every"]),
            (["--dynamics", good, other], ["same data", "digits", "cifar10"]),
            (["--dynamics", good, "--ema", good], ["name runs alone"]),
            (["--figure", "FID"], ["--ema"]), ([good, "--dynamics", good], ["alone"])):
        refused("results.py", *arguments, "--out", out, words=words)
    done = run("results.py", "--dynamics", empty, "--out", out)
    assert done.returncode == 2 and f"error: {empty}/dynamics.jsonl" in done.stderr
    assert not out.exists() and "Traceback" not in done.stderr
    c = write(tmp_path / "c", net_type="UNetC")
    done = succeed("results.py", "--dynamics", c, good, "--out", out)
    assert str(out) in done
    assert "| 0.50 to inf | inf% (decoder.1) | 0.5 to inf |" in done    # None: it was NaN or Inf.
    with Image.open(out) as image:
        assert image.width > 1200 and len(image.convert("RGB").getcolors(1 << 20)) > 50

def test_weights_of_e_and_g_do_not_move_and_those_of_c_do(tmp_path):
    """A real run on the digits: forced weight normalization, seen in the records (EDM2 2.2)."""
    moved = {}
    for net_type in NETS:
        succeed("train.py", "--config", tiny_config(
            tmp_path, net_type, n_epoch=1, batch_size=14, warm_epoch=0.05, dynamics_every=10,
            save_dir=str(tmp_path / net_type)))
        found = [flat(line["weight"]) for line in records(tmp_path / net_type)]
        series = [[line[name] for line in found] for name in found[0]]
        moved[net_type] = max(max(values) / min(values) - 1 for values in series)
    assert moved["UNetE"] < 1e-3 and moved["UNetG"] < 1e-3 < 0.02 < moved["UNetC"], moved
