"""Post-hoc EMA: averages of any length from two that were tracked, against that length tracked."""

import copy
import pytest
import torch
from conftest import distance, refused, results, run, succeed, tiny_config
from ema_pytorch.post_hoc_ema import KarrasEMA, sigma_rel_to_gamma
from edm2 import checkpoint, diffusion, posthoc_ema
from edm2.config import load_config
from edm2.errors import UserError

TRACKED, DIRECT = "posthoc_ema.sigma_rels=[0.05,0.10]", "posthoc_ema.sigma_rels=[0.075,0.2]"
GAMMAS = [sigma_rel_to_gamma(s) for s in (0.05, 0.10)]

def test_coefficients_sum_to_one_and_give_the_tracked_back():
    times = [t + 1 for t in range(100, 1001, 100) for _ in GAMMAS]
    for sigma_rel in (0.04, 0.05, 0.075, 0.10, 0.2):
        gamma = sigma_rel_to_gamma(sigma_rel)
        x, error = posthoc_ema.coefficients(times, GAMMAS * 10, 1001, gamma)
        assert x.sum().item() == pytest.approx(1, abs=1e-9) and error < 0.1
        if gamma in GAMMAS:
            assert error < 1e-5 and x[-2:][GAMMAS.index(gamma)].item() == pytest.approx(1, abs=1e-4)

def test_a_profile_by_hand():
    """The error of a reconstruction's profile, against profiles summed up update by update."""
    n = 400

    def profile(updates, gamma):
        weights = torch.zeros(n, dtype=torch.float64)
        weights[0] = 1
        for k in range(1, updates + 1):             # As ema_pytorch does it.
            beta = (1 - 1 / (k + 1)) ** (1 + gamma)
            weights *= beta
            weights[k - 1] += 1 - beta
        return weights

    updates, gamma = [u for u in range(25, n + 1, 25) for _ in GAMMAS], sigma_rel_to_gamma(0.075)
    x, error = posthoc_ema.coefficients([u + 1 for u in updates], GAMMAS * 16, n + 1, gamma)
    total = sum(c * profile(u, g) for c, u, g in zip(x.tolist(), updates, GAMMAS * 16, strict=True))
    wanted = profile(n, gamma)
    assert ((total - wanted).norm() / wanted.norm()).item() < max(2 * error, 0.01)

def check_third_length(saved, kept, wanted):
    """0.075 is put together within 1 %, and five times closer than the tracked lengths are."""
    found = posthoc_ema.reconstruct(saved, kept, 0.075)
    error = distance(wanted, found)
    tracked = [distance(wanted, average) for average in saved["posthoc"]["averages"]]
    print(f"relative error of 0.075: {error:.5f}, of the tracked lengths: {tracked}")
    assert error < 0.01 and 5 * error < min(tracked)
    return found

@pytest.mark.slow
def test_100000_updates(tmp_path):
    """A tiny network, 100,000 updates, 64 snapshots in half precision: no counter overflows."""
    torch.manual_seed(0)
    config, total = load_config(tiny_config(tmp_path), [TRACKED]), 100_000
    net, target = torch.nn.Linear(4, 2, bias=False), torch.randn(total // 1000, 2, 4).cumsum(0)
    averages = posthoc_ema.Averages(diffusion.EDM(net, None, config), config)
    direct, kept = KarrasEMA(net, sigma_rel=0.075, update_every=1), []
    for step in range(1, total + 1):
        net.weight.data = target[(step - 1) // 1000] + 0.1 * torch.sin(torch.tensor(step / 50))
        averages.update()
        direct.update()
        if step % (total // 64) == 0:
            kept.append(posthoc_ema.snapshot(averages.state()["posthoc"], step))
    saved = averages.state() | {"step": total, "config": config.model_dump()}
    assert saved["posthoc"]["updates"] == total
    assert kept[-1]["averages"][0]["weight"].dtype == torch.float16
    check_third_length(saved, kept, direct.ema_model.state_dict())

@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """Two runs of one network: one tracks 0.05 and 0.10 and is interrupted amid an epoch, the other
    tracks 0.075 itself: path, Config and Config."""
    folder = tmp_path_factory.mktemp("posthoc")
    path = tiny_config(folder, "UNetG", n_epoch=4, save_every=1, batch_size=36, n_sample=1)
    direct, train = f"save_dir={folder / 'direct'}", ["train.py", "--config", path, "--set"]
    succeed(*train, direct, "--set", DIRECT)
    succeed(*train, TRACKED, "--set", "save_minutes=0.001", "--max_steps", 91)
    going_on = succeed(*train, TRACKED).partition("going on")[2]
    assert 78 < int(going_on.partition("after step ")[2].split()[0]) <= 91
    return path, load_config(path, [TRACKED]), load_config(path, [direct, DIRECT])

@pytest.mark.parametrize("epoch", [2, 3])
def test_a_third_length_and_a_resume(tracked, epoch):
    one, two = (checkpoint.load(checkpoint.path_of(config, epoch)) for config in tracked[1:])
    assert distance(one["network"], two["network"]) < 1e-6
    kept, before = posthoc_ema.load_snapshots(tracked[1]), copy.deepcopy(one)
    assert len(kept) == 78                          # 156 steps // 64 snapshots: every second one.
    # Snapshots that are later are left out; without any there is a limit; others are refused.
    earlier = [part for part in kept if part["step"] < one["step"]]
    again = posthoc_ema.reconstruct(one, earlier, 0.075)
    with pytest.raises(UserError, match=f"step {kept[0]['step']} is of another run"):
        posthoc_ema.reconstruct(one, [kept[0] | {"gammas": [3.0, 5.0]}, *earlier], 0.075)
    with pytest.raises(UserError, match=r"0\.28 cannot be reconstructed .* the 0 snapshots"):
        posthoc_ema.reconstruct(one, [], 0.28)
    found = check_third_length(one, kept, two["posthoc"]["averages"][0])
    assert torch.equal(found["fourier.freqs"], one["network"]["fourier.freqs"])
    assert all(torch.equal(again[name], found[name]) for name in found)
    states = [[s["network"], s["ema"], *s["posthoc"]["averages"]] for s in (before, one)]
    for a, b in zip(*states, strict=True):          # As they were.
        assert all(torch.equal(a[name], b[name]) for name in a)

def test_a_reconstruction_is_sampled_scored_and_probed(tracked, trained, tmp_path):
    path, folder = tracked[0], tracked[0].parent / "run"
    snapshot, flags = folder / "ema" / "100.pth", ["--config", path, "--set", TRACKED]
    length, whole = ["--sigma_rel", 0.13, "--epoch", 2], snapshot.read_bytes()
    snapshot.write_bytes(whole[:len(whole) // 2])
    refused("sample.py", *flags, *length, "--n_samples", 4, words=[f"{snapshot} is damaged"])
    snapshot.write_bytes(whole)
    succeed("sample.py", *flags, *length, "--n_samples", 4)
    assert (folder / "samples" / "2_sigma_rel0.13" / "images" / "000003.png").exists()
    succeed("fid.py", *flags, *length, "--features", "pixels")
    succeed("probe.py", *flags, *length, "--passes", 1, "--set", "linear.blockname=out_1")
    assert [(row.get("sampling") or row)["sigma_rel"] for row in results(folder)] == [0.13, 0.13]
    succeed("results.py", "--ema", folder, "--out", tmp_path / "ema.png")
    assert (tmp_path / "ema.png").stat().st_size > 10_000
    done = run("results.py", folder, "--out", tmp_path / "table.png")   # No plain EMA was scored.
    assert done.returncode == 2 and "other sampling settings" in done.stderr
    refused("results.py", "--ema", folder, "--figure", "nonsense", words=["FD(pixels)"])
    refused("fid.py", *flags, "--sigma_rel", 0.2, "--features", "pixels", words=["--sigma_rel 0.2"])
    for arguments, words in (
            (["--sigma_rel", 0.28, "--epoch", 0], ["0.28 cannot be reconstructed", "later epoch"]),
            (["--sigma_rel", 0.4], ["--sigma_rel", "0.28", "0.4"]),
            (["--sigma_rel", "x"], ["--sigma_rel", "number", "'x'"]),
            (["--sigma_rel", 0.1, "--weights", "model"], ["--weights model"])):
        refused("sample.py", *flags, *arguments, "--n_samples", 2, words=words)
    config = ["--config", trained / "config.yaml"]
    refused("sample.py", *config, "--sigma_rel", 0.1, words=["without posthoc_ema.sigma_rels"])
    refused("train.py", *config, "--set", TRACKED, words=["posthoc_ema.sigma_rels", "[0.05, 0.1]"])
    refused("train.py", *config, "--set", "posthoc_ema.sigma_rels=[0.05]", words=["two or more"])
