"""Post-hoc EMA: averages of any length from two that were tracked, against the same length tracked directly."""

import copy
import json

import pytest
import torch
from conftest import distance, run, succeed, tiny_config
from ema_pytorch.post_hoc_ema import KarrasEMA, sigma_rel_to_gamma

import checkpoint
import options
import posthoc
from runtime import UserError

TRACKED = "posthoc_ema.sigma_rels=[0.05,0.10]"


def relative(a, b):
    """The relative L2 distance of two state dicts."""
    difference = sum((a[name].double() - b[name].double()).square().sum() for name in a)
    return (difference / sum(b[name].double().square().sum() for name in b)).sqrt().item()


def test_coefficients_sum_to_one_and_give_the_tracked_back():
    gammas = [sigma_rel_to_gamma(s) for s in (0.05, 0.10)]
    times = [t + 1 for t in range(100, 1001, 100) for _ in gammas]
    for sigma_rel in (0.04, 0.05, 0.075, 0.10, 0.2):
        x, error = posthoc.coefficients(times, gammas * 10, 1001, sigma_rel_to_gamma(sigma_rel))
        assert x.sum().item() == pytest.approx(1, abs=1e-9) and error < 0.1
        if sigma_rel in (0.05, 0.10):
            assert error < 1e-5 and x[-2 if sigma_rel == 0.05 else -1].item() == pytest.approx(1, abs=1e-4)


def test_a_profile_by_hand():
    """The error of a reconstruction's profile, against profiles summed up update by update."""
    n, gammas = 400, [sigma_rel_to_gamma(s) for s in (0.05, 0.10)]

    def profile(updates, gamma):
        weights = torch.zeros(n, dtype=torch.float64)
        weights[0] = 1
        for k in range(1, updates + 1):     # As ema_pytorch does it.
            beta = (1 - 1 / (k + 1)) ** (1 + gamma)
            weights *= beta
            weights[k - 1] += 1 - beta
        return weights

    updates = [u for u in range(25, n + 1, 25) for _ in gammas]
    x, error = posthoc.coefficients([u + 1 for u in updates], gammas * 16, n + 1, sigma_rel_to_gamma(0.075))
    total = sum(c * profile(u, g) for c, u, g in zip(x.tolist(), updates, gammas * 16, strict=True))
    wanted = profile(n, sigma_rel_to_gamma(0.075))
    assert ((total - wanted).norm() / wanted.norm()).item() < max(2 * error, 0.01)


def test_100000_updates():
    """A tiny network, 100,000 updates, 64 snapshots in half precision: the step counter does not overflow."""
    torch.manual_seed(0)
    net, total = torch.nn.Linear(4, 2, bias=False), 100_000
    config = {"posthoc_ema": {"sigma_rels": [0.05, 0.10], "snapshots": 64}, "save_dir": "unused"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pathlib.Path.mkdir", lambda *args, **kwargs: None)
        patch.setattr("pathlib.Path.is_dir", lambda self: True)
        averages = posthoc.track(net, config)
    direct = KarrasEMA(net, sigma_rel=0.075, update_every=1)
    kept, target = [], torch.randn(total // 1000, 2, 4).cumsum(0)
    for step in range(1, total + 1):
        with torch.no_grad():
            net.weight.copy_(target[(step - 1) // 1000] + 0.1 * torch.sin(torch.tensor(step / 50)))
        averages.update()
        direct.update()
        if step % (total // 64) == 0:
            kept.append(posthoc.snapshot(averages, step))
    saved = {"posthoc": posthoc.state(averages), "network": net.state_dict(), "config": config}
    assert saved["posthoc"]["updates"] == total and kept[-1]["averages"][0]["weight"].dtype == torch.float16
    found, wanted = posthoc.reconstruct(saved, kept, 0.075), direct.ema_model.state_dict()
    error = relative(found, wanted)
    tracked = [relative(a, wanted) for a in saved["posthoc"]["averages"]]
    print(f"relative error of 0.075: {error:.5f}, of the tracked lengths: {tracked}")
    assert error < 0.01 and 5 * error < min(tracked)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs of the same network: one tracks 0.05 and 0.10 and is interrupted, the other tracks 0.075 itself."""
    folder = tmp_path_factory.mktemp("posthoc")
    config = tiny_config(folder, "UNetG", n_epoch=8, save_every=2, batch_size=70)
    direct = f"save_dir={folder / 'direct'}"
    succeed("train.py", "--config", config, "--set", direct, "--set", "posthoc_ema.sigma_rels=[0.075,0.2]")
    tracked = ["--config", config, "--set", TRACKED]
    succeed("train.py", *tracked, "--set", "n_epoch=8", "--set", "save_minutes=0.001", "--max_steps", "91")
    assert list((folder / "run" / "ckpts").glob("*.pth"))
    done = succeed("train.py", *tracked)
    assert "going on" in done
    return folder, config


def test_a_third_length_and_a_resume(trained):
    folder, config = trained
    one, two = (options.load_config(config, [f"save_dir={folder / name}", *more])
                for name, more in (("run", [TRACKED]), ("direct", ["posthoc_ema.sigma_rels=[0.075,0.2]"])))
    for epoch in (6, 7):
        saved, other = (checkpoint.load(checkpoint.path_of(c, epoch)) for c in (one, two))
        assert distance(saved["network"], other["network"]) < 1e-6
        kept = checkpoint.load_snapshots(one, saved["step"])
        assert kept and all(part["step"] < saved["step"] for part in kept)
        before = copy.deepcopy(saved)
        found, wanted = posthoc.reconstruct(saved, kept, 0.075), other["posthoc"]["averages"][0]
        assert all(torch.equal(before[key][name], saved[key][name]) for key in ("network", "ema") for name in found)
        assert all(torch.equal(a[name], b[name]) for a, b in zip(before["posthoc"]["averages"],
                                                               saved["posthoc"]["averages"], strict=True) for name in a)
        error = relative(found, wanted)
        tracked = [relative(a, wanted) for a in saved["posthoc"]["averages"]]
        print(f"relative error of 0.075: {error:.5f}, of the tracked lengths: {tracked}")
        assert error < 0.01 and 5 * error < min(tracked)
        assert torch.equal(found["fourier.freqs"], saved["network"]["fourier.freqs"])


def test_a_reconstruction_is_sampled_scored_and_probed(trained):
    folder, config = trained
    flags = ["--config", config, "--set", TRACKED, "--sigma_rel", "0.13"]
    assert "sigma_rel 0.13" in succeed("sample.py", *flags, "--n_samples", "20", "--steps", "3",
                                       "--out", folder / "three")
    succeed("sample.py", *flags, "--n_samples", "20", "--epoch", "6")
    assert (folder / "run" / "samples" / "6_sigma_rel0.13" / "images" / "000019.png").exists()
    succeed("fid.py", *flags, "--features", "pixels", "--epoch", "6")
    succeed("probe.py", *flags, "--passes", "1", "--epoch", "6", "--set", "linear.blockname=out_1")
    lines = [json.loads(line) for line in (folder / "run" / "results.jsonl").read_text().splitlines()]
    assert [(line.get("sampling") or line)["sigma_rel"] for line in lines] == [0.13, 0.13]
    succeed("results.py", "--ema", folder / "run", "--out", folder / "ema.png")
    assert (folder / "ema.png").stat().st_size > 10_000
    done = run("results.py", folder / "run", "--out", folder / "table.png")
    assert done.returncode == 2 and "other sampling settings" in done.stderr    # No plain EMA was scored.
    done = run("results.py", "--ema", folder / "run", "--figure", "nonsense")
    assert done.returncode == 2 and "FD(pixels)" in done.stderr and "Traceback" not in done.stderr
    done = run("fid.py", *flags[:4], "--sigma_rel", "0.2", "--features", "pixels")
    assert done.returncode == 2 and "--sigma_rel 0.2" in done.stderr


def test_bad_input(trained, tmp_path):
    _, config = trained
    plain = tiny_config(tmp_path, n_epoch=1)
    succeed("train.py", "--config", plain)
    tracked = ["--config", config, "--set", TRACKED, "--sigma_rel"]
    for arguments, words in (
            (["--config", plain, "--sigma_rel", "0.1"], ["without posthoc_ema.sigma_rels"]),
            ([*tracked, "0.28", "--epoch", "0"], ["cannot be reconstructed"]),
            ([*tracked, "0.4"], ["0.28"]),
            ([*tracked, "x"], ["a number"]),
            ([*tracked, "0.1", "--weights", "model"], ["--weights model"])):
        done = run("sample.py", *arguments, "--n_samples", "2")
        assert done.returncode == 2 and all(word in done.stderr for word in words), done.stderr
        assert "Traceback" not in done.stderr
    done = run("train.py", "--config", config, "--set", "posthoc_ema.sigma_rels=[0.05]")
    assert done.returncode == 2 and "two or more" in done.stderr
    done = run("train.py", "--config", config)
    assert done.returncode == 2 and "posthoc_ema.sigma_rels" in done.stderr


def test_a_damaged_snapshot_is_left_out(trained, tmp_path):
    _, config = trained
    path = checkpoint.snapshots(options.load_config(config))[10]
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:len(whole) // 2])
        done = run("sample.py", "--config", config, "--set", TRACKED, "--sigma_rel", "0.13", "--n_samples", "2",
                   "--out", tmp_path / "out")
        assert done.returncode == 0 and path.name in done.stderr and "left out" in done.stderr
    finally:
        path.write_bytes(whole)


def test_snapshots_of_another_run_and_too_few(trained, capsys):
    _, config = trained
    own = options.load_config(config)
    saved = checkpoint.load(checkpoint.path_of(own, 7))
    kept = checkpoint.load_snapshots(own, saved["step"])
    strangers = [part | {"gammas": [3.0, 5.0]} for part in kept[:3]]
    wanted = posthoc.reconstruct(saved, kept[3:], 0.075)
    found = posthoc.reconstruct(saved, strangers + kept[3:], 0.075)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert f"steps {', '.join(str(part['step']) for part in strangers)} are of another run" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"0\.28 cannot be reconstructed .* the 0 snapshots"):
        posthoc.reconstruct(saved, [], 0.28)
