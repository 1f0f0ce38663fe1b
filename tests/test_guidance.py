"""Labels and guidance: what the networks are told, what samples are of, and how they are scored."""

import json
import math
import re
import shutil
from pathlib import Path
import numpy as np
import pytest
import torch
from conftest import NETS, distance, refused, results, run, succeed, tiny_config, weights
from PIL import Image
import blockG
from edm2 import data, diffusion, evaluation, guidance, image_files, linear_probe
from edm2.config import Diffusion, load_config
from edm2.posthoc_ema import load_denoiser
from edm2.results import along

N = 24
CLASSES = {"label_dim": 10}

@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    """The folder of a run with labels, augmentation and post-hoc EMAs: config.yaml and run/."""
    folder = tmp_path_factory.mktemp("conditional")
    path = tiny_config(folder, "UNetG", n_epoch=4, save_every=1, augment=0.12, network=CLASSES,
                       n_sample=20, posthoc_ema={"sigma_rels": [0.05, 0.1]}, linear={
                           "n_epoch": 3, "blockname": "out_2"})
    succeed("train.py", "--config", path)
    return folder

@pytest.fixture(scope="module")
def flags(conditional):
    """The flags for N samples of it."""
    return "--config", conditional / "config.yaml", "--n_samples", N

@pytest.fixture(scope="module")
def unguided(flags, conditional):
    """The folder of its samples without guidance."""
    succeed("sample.py", *flags)
    return conditional / "run" / "samples" / "3"

def read(folder, n=N):
    """The images of a folder of sample.py, (n,H,W)."""
    return np.stack([np.asarray(Image.open(folder / "images" / f"{i:06d}.png"), int)
                     for i in range(n)])

def sample(tmp_path, flags, *more, **how):
    """Sample to a new folder; what is printed and the images."""
    out = succeed("sample.py", *flags, "--out", tmp_path, *more, **how)
    return out, read(tmp_path)

@pytest.mark.parametrize("net_type", NETS)
def test_a_label_is_added_to_the_embedding(tmp_path, net_type):
    """Of C and E without label nothing is left of it, bit for bit; in G mp_sum stays."""
    torch.manual_seed(0)
    config = load_config(tiny_config(tmp_path, net_type, network=CLASSES))
    plain = load_config(tiny_config(tmp_path, net_type))
    denoiser, unconditional = diffusion.build(config).eval(), diffusion.build(plain).eval()
    unconditional.net.load_state_dict(denoiser.net.state_dict(), strict=False)
    x, sigma, embeddings = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 3.0]), []
    for net in (denoiser.net, unconditional.net):
        net.encoder[0].register_forward_hook(lambda m, given, out: embeddings.append(given[1]))
    if net_type == "UNetG":                 # They start at 0.
        for name, p in denoiser.net.named_parameters():
            p.data.fill_(1) if "gain" in name else None
    with torch.no_grad():
        given = [denoiser.denoise(x, sigma, labels) for labels in (
            None, torch.tensor([-1, -1]), torch.tensor([3, 3]), torch.tensor([3, 7]))]
        unconditional.denoise(x, sigma, torch.tensor([3, 7]))
        label = denoiser.net.emb_label(math.sqrt(10) * torch.eye(10)[[3, 7]])
        base = unconditional.net.emb0(unconditional.net.fourier(sigma.log() / 4))
        if net_type == "UNetG":
            expected = blockG.mp_silu((base + label) / math.sqrt(2))
        else:
            expected = torch.nn.functional.silu(
                unconditional.net.emb1(torch.nn.functional.silu(base)) + label)
    assert torch.equal(given[0], given[1]) and not torch.equal(given[1], given[2])
    assert torch.equal(given[2][0], given[3][0]) and not torch.equal(given[2][1], given[3][1])
    torch.testing.assert_close(embeddings[3], expected)
    assert torch.equal(embeddings[0], embeddings[4]) == (net_type != "UNetG")

def test_g_keeps_magnitudes_with_and_without_label():
    """Before SiLU the embedding of a label has mean square 1, without one 1/2; the blocks of both
    about 1 at the start."""
    torch.manual_seed(0)
    net = diffusion.NETWORKS["UNetG"].UNetG(label_dim=10, augment_dim=9,
                                         attn_channels_per_head=64).eval()
    found, silu, seen = [], blockG.mp_silu, []
    for block in (*net.encoder, *net.middle, *net.decoder):
        block.register_forward_hook(lambda m, i, out: found.append(out.square().mean().item()))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("unetG.mp_silu", lambda x: seen.append(x.square().mean().item()) or silu(x))
        for label in (torch.eye(10)[[3, 7, 0, 9]], torch.zeros(4, 10)):
            net(torch.randn(4, 3, 32, 32), torch.randn(4), label, torch.randn(4, 9))
    print(f"embedding with label {seen[0]:.3f}, without {seen[1]:.3f}; blocks "
          f"{min(found):.2f} to {max(found):.2f}")
    assert seen == [pytest.approx(1, rel=0.1), pytest.approx(0.5, rel=0.1)]
    assert len(found) == 2 * 28 and all(0.6 < value < 1.5 for value in found)

class OfClass(torch.nn.Module):
    """An EDM whose D is a number for each class and for none, and which notes what it is asked."""
    label_dim, image_shape, diffusion = 10, (1, 2, 2), Diffusion()

    def __init__(self, base, none):
        super().__init__()
        self.base, self.none, self.asked = torch.nn.Parameter(torch.tensor(base)), none, []

    def denoise(self, x, sigma, labels=None):
        self.asked.append((len(x), sigma[0].item()))
        value = torch.where(labels < 0, self.none, self.base + labels)
        return value[:, None, None, None].float().expand(x.shape)

def test_guided_denoise_is_the_extrapolation():
    x, labels = torch.zeros(3, 1, 2, 2), torch.tensor([0, 2, 5])
    main, guide = OfClass(10.0, 4.0), OfClass(7.0, 0.0)

    def guided(sigma=1.0, **settings):
        main.asked, guide.asked = [], []
        D_x = diffusion.guided_denoise(main, x, sigma, labels, diffusion.Sampling(**settings))
        return D_x[:, 0, 0, 0].tolist()

    assert guided() == [10, 12, 15] and main.asked == [(3, 1.0)]
    assert guided(guidance=3.0) == [4 + 3 * 6, 4 + 3 * 8, 4 + 3 * 11]
    assert main.asked == [(6, 1.0)]                                     # Both in one batch.
    assert guided(guidance=3.0, guide=guide) == [7 + 9, 9 + 9, 12 + 9]
    assert (main.asked, guide.asked) == ([(3, 1.0)], [(3, 1.0)])
    for sigma, inside in ((0.5, False), (0.51, True), (2.0, True), (2.01, False)):
        D_x = guided(sigma, guidance=3.0, guide=guide, interval=(0.5, 2.0))
        assert (D_x[0] == 16) == inside == bool(guide.asked)
    images = diffusion.generate(OfClass(-0.9, 0.0), range(12), 0, diffusion.Sampling(
        classes=[1, 0]))                    # In turn.
    assert images[:, 0, 0, 0].tolist() == [140, 13] * 6

@pytest.mark.parametrize(("settings", "expected"), [
    ({}, (35, 0)), ({"guidance": 2.0}, (35, 35)),
    ({"guidance": 2.0, "interval": (90, 100)}, (35, 0)),
    ({"guidance": 2.0, "interval": (0.2, 5.0)}, (35, 10)), ({"steps": 5, "guidance": 0.0}, (9, 9)),
    ({"guidance": 2.0, "interval": (0.2, 5.0), "eta": 1.0}, (35, 10))])
@pytest.mark.parametrize("guide", [None, OfClass(7.0, 0.0)])
def test_the_evaluations_are_counted(settings, expected, guide):
    """As the networks see them."""
    main, sampling = OfClass(0.1, 0.2), diffusion.Sampling(guide=guide, **settings)
    assert sampling.evaluations(Diffusion()) == expected
    if guide:
        guide.asked = []
    diffusion.generate(main, range(4), 0, sampling)
    both = len(guide.asked) if guide else sum(n == 8 for n, _ in main.asked)
    assert (len(main.asked), both) == expected

def test_samples_have_their_classes(conditional, flags, unguided, tmp_path):
    """Image i has class i mod 10; a class by itself gives the same image; the grid and the .npz."""
    images = read(unguided)
    for classes, where in (("3", [3, 13, 23]), ("0-2,7", [0, 1, 2, 7])):
        out = succeed("sample.py", *flags, "--classes", classes)
        folder = Path(re.search("images: (.*)/images", out)[1])
        assert folder.name == f"3_classes{classes.replace('0-2', '0,1,2')}"
        assert np.abs(read(folder)[where] - images[where]).max() <= 1
        others = [i for i in range(8) if i not in where]
        changed = np.abs(read(folder)[others] - images[others]).reshape(len(others), -1)
        assert changed.max(1).min() > 1
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["classes"] == [0, 1, 2, 7] and settings["guidance"] is None
    _, found = sample(tmp_path / "a", flags, "--classes", "0-2,7", "--npz")
    with np.load(tmp_path / "a" / "samples.npz") as file:
        assert file["labels"].tolist() == [0, 1, 2, 7] * 6 and file["labels"].dtype == np.int64
        assert np.array_equal(file["arr_0"][..., 0], found)
    # Rows of classes 0, 1, 2 and 7, each 24 / 4 wide, beside their names.
    grid = np.asarray(Image.open(tmp_path / "a" / "grid.png"))
    assert grid.shape == (4 * 34 + 2, 16 + 6 * 34 + 2, 3) and grid[:, :16].max() > 128
    assert np.array_equal(grid[2 + 34 * 3:34 * 4:4, 18:50:4, 0], found[3])
    assert np.array_equal(grid[2:34:4, 18 + 34:50 + 34:4, 0], found[4])

def test_the_rows_of_a_grid_are_classes():
    assert image_files.layout(64, 0) == (range(64), 8)
    assert image_files.layout(64, 10) == ([c + 10 * i for c in range(10) for i in range(6)], 6)
    assert image_files.layout(64, 200) == ([c + 200 * i for c in range(8) for i in range(8)], 8)
    assert image_files.layout(64, 200, 500) == ([c + 200 * i for c in range(8) for i in (0, 1)], 2)
    assert image_files.layout(64, 1000, 500) == (list(range(8)), 1)
    assert image_files.layout(3, 10, 3) == ([0, 1, 2], 1)

def test_sample_grids_in_training(conditional):
    """Two columns a class, above two real images of it."""
    config = load_config(conditional / "config.yaml")
    images, labels = data.load(config)
    grid = np.asarray(Image.open(conditional / "run" / "grids" / "0003.png"))
    assert grid.shape == (2 * (10 * 34 + 2), 16 + 2 * 34 + 2, 3)
    for c in range(10):
        top = 10 * 34 + 2 + 2 + 34 * c
        for i, real in enumerate(images[labels == c][:2, 0].numpy()):
            assert np.array_equal(grid[top:top + 32:4, 18 + 34 * i:50 + 34 * i:4, 0], real)
    denoiser = load_denoiser(config, 3)
    first = diffusion.generate(denoiser, [3, 13], config.seed)[:, 0].numpy().astype(int)
    assert np.abs(grid[2 + 34 * 3:34 * 4:4, 18:50:4, 0] - first[0]).max() <= 1

def test_guidance_1_and_an_empty_interval_are_none(flags, unguided, tmp_path):
    assert f"0 of {N} images to make in {unguided} " in succeed(
        "sample.py", *flags, "--guidance", 1)
    out, images = sample(tmp_path / "a", flags, "--guidance", 3, "--guidance_interval", "90,100")
    assert np.array_equal(images, read(unguided)) and "35 evaluations\n" in out

@pytest.mark.parametrize("guide", [[], ["--guide", "RUN:0"], ["--guide_sigma_rel", 0.2]])
def test_guided_images_do_not_depend_on_processes_and_batches(
        conditional, flags, unguided, tmp_path, guide):
    guide = [str(word).replace("RUN", str(conditional / "run")) for word in guide]
    of = "of the guide" if guide else "without label"
    out, images = sample(tmp_path / "1", flags, "--guidance", 2, *guide)
    assert f"each of 35 evaluations and 35 {of}\n" in out
    assert np.abs(images - read(unguided)).max() > 5
    for size, processes in ((5, None), (7, 2)):
        _, found = sample(tmp_path / str(size), flags, "--guidance", 2, *guide, "--batch_gpu",
                          size, processes=processes)
        assert np.abs(found - images).max() <= 1

def test_guided_samples_are_scored_and_drawn(conditional, flags, unguided, tmp_path):
    """By the same flags or --images; results know the setting, and the table has none of them."""
    save_dir = conditional / "run"
    how = ["fid.py", *flags, "--features", "pixels"]
    sets = [["--guidance", 2], ["--guidance", 0], ["--guidance", 2, "--guide", f"{save_dir}:0"],
            ["--guidance", 2, "--guidance_interval", "0.2,5", "--guide",
             conditional / "config.yaml", "--guide_sigma_rel", 0.2]]
    refused(*how, *sets[0], words=["--guidance 2.0", "make them with: python sample.py"])
    succeed(*how)
    for more in sets:
        folder = re.search("images: (.*)/images", succeed("sample.py", *flags, *more))[1]
        assert Path(folder).name.startswith(f"3_guidance{more[1]}")
        assert succeed(*how, *more).splitlines()[-1].split(":")[0].startswith("FD(pixels)")
    first, *lines = results(save_dir)
    assert first["sampling"]["guidance"] is None
    assert [line["sampling"]["guidance"] for line in lines] == [2, 0, 2, 2]
    assert [line["sampling"]["guide"] and line["sampling"]["guide"]["epoch"] for line in lines] == [
        None, None, 0, 3]
    assert lines[3]["sampling"]["guidance_interval"] == [0.2, 5]
    out = re.search("images: (.*)/images", succeed("sample.py", *flags, *sets[0]))[1]
    same = succeed("fid.py", *flags[:2], "--features", "pixels", "--images", out)
    assert same.splitlines()[-1].split()[1].rstrip(":") == f"{lines[0]['value']:.6g}"
    table = succeed("results.py", save_dir, "--out", tmp_path / "a.png")
    assert f"{first['value']:.2f} @ 3" in table and f"{lines[0]['value']:.2f} " not in table
    succeed("results.py", "--guidance", save_dir, "--out", tmp_path / "b.png")
    assert Image.open(tmp_path / "b.png").width > 500
    (curves,) = along(save_dir, "guidance", None).values()
    (title, points), *others = curves.items()
    assert title == "epoch 3, classifier-free" and sorted(x for x, _ in points) == [0, 1, 2]
    assert [sorted(x for x, _ in points) for _, points in others] == [[1, 2], [1, 2]]
    assert "guide0" in others[0][0] and "interval0.2-5" in others[1][0] and "ema0.2" in others[1][0]

def test_unconditional_runs_are_autoguided(trained, tmp_path):
    flags = ["--config", trained / "config.yaml", "--n_samples", N]
    _, plain = sample(tmp_path / "a", flags)
    out, guided = sample(tmp_path / "b", flags, "--guidance", 2, "--guide", f"{trained}/run:1")
    assert "35 of the guide" in out and np.abs(plain - guided).max() > 20
    settings = json.loads((tmp_path / "b" / "settings.json").read_text())
    assert settings["guide"]["epoch"] == 1 and settings["guide"]["sigma_rel"] is None
    assert settings["guide"]["run"] == "run" and settings["guidance"] == 2
    # Of all epochs those that have samples, and are not the guide.
    how = ["fid.py", *flags[:2], "--features", "pixels", "--epoch", "all", "--guidance", 3,
           "--set", f"save_dir={shutil.copytree(trained / 'run', tmp_path / 'run')}",
           "--guide", f"{tmp_path}/run:1"]
    succeed("sample.py", *flags, *how[7:], "--epoch", 2)
    done = run(*how)
    assert done.returncode == 0 and done.stdout.count("FD(pixels)") == 1
    assert "epoch 1 is left out: the guide is the network itself" in done.stderr

def test_the_probe_gives_no_label_and_the_held_out_loss_the_true_one(conditional, monkeypatch):
    config, seen = load_config(conditional / "config.yaml"), []
    denoiser, D = load_denoiser(config, 3), diffusion.EDM.denoise

    def denoise(self, x, sigma, labels=None, augment=None, return_features=False):
        seen.append((labels, augment))
        return D(self, x, sigma, labels, augment, return_features)

    monkeypatch.setattr(diffusion.EDM, "denoise", denoise)
    train, test = data.load(config), data.load(config, train=False)
    probe = linear_probe.Probe(config, denoiser, {1: train, 2: test}, passes=1)
    probe.accuracies(4, ["out_1"])
    assert len(seen) > 5 and all(given == (None, None) for given in seen)
    seen.clear()
    loss = evaluation.held_out_loss(denoiser, test[0][:70], test[1][:70])
    assert [given[1] for given in seen] == [None] * 16
    assert torch.equal(torch.cat([seen[0][0], seen[8][0]]), test[1][:70])
    other = evaluation.held_out_loss(denoiser, test[0][:70], (test[1][:70] + 1) % 10)
    assert other["heldout_loss"] != loss["heldout_loss"]

@pytest.mark.slow
def test_two_processes_train_with_labels_and_augmentation_and_resume(tmp_path):
    """To the weights of one process up to rounding; what goes on is bitwise what went through."""
    def same_run(name, n_epoch=2, processes=2):
        (tmp_path / name).mkdir(exist_ok=True)
        path = tiny_config(tmp_path / name, "UNetG", n_epoch=n_epoch, augment=0.5,
                           label_dropout=0.3, network=CLASSES | {"n_channels": 16})
        succeed("train.py", "--config", path, processes=processes)
        return tmp_path / name / "run"

    one, two, cut = same_run("one", processes=None), same_run("two"), same_run("cut", 1)
    same_run("cut")
    for key in ("network", "ema", "uncertainty"):
        assert distance(weights(one, 1, key), weights(two, 1, key)) < 1e-4
        assert distance(weights(cut, 0, key), weights(two, 1, key)) > 1e-3
        a, b = weights(two, 1, key), weights(cut, 1, key)
        assert all(torch.equal(value, b[name]) for name, value in a.items())

def test_what_cannot_be_is_one_line(conditional, trained, flags, tmp_path):
    plain = ["--config", trained / "config.yaml", "--n_samples", 4]
    refused("sample.py", *plain, "--classes", "3", words=["--classes 3", "no classes"])
    refused("sample.py", *flags, "--classes", "3-10", words=["--classes 10", "10 classes"])
    refused("sample.py", *flags, "--classes", "4-3", words=["'4-3' is an empty range"])
    refused("sample.py", *plain, "--guidance", 2, words=["--guidance", "network.label_dim"])
    for span in ("5,0.2", "1", "1,1", "a,b", "-1,2"):
        refused("sample.py", *flags, "--guidance", 2, f"--guidance_interval={span}",
                words=["--guidance_interval"])
    for more in (["--guide", trained / "run"], ["--guide_sigma_rel", 0.2],
                 ["--guidance_interval", "1,2"]):
        refused("sample.py", *flags, *more, words=[more[0], "--guidance"])
    guide = ["sample.py", *flags, "--guidance", 2, "--guide"]
    refused(*guide, trained / "run", words=["network.label_dim is 0, here 10"])
    refused(*guide, f"{conditional}/run:7", words=["no checkpoint of epoch 7"])
    refused(*guide, tmp_path, words=["no checkpoints in", tmp_path])
    refused(*guide, tmp_path / "no.yaml", words=["cannot read", "no.yaml"])
    refused(*guide, f"{conditional}/run:3", words=["is the network itself"])
    refused(*guide, "", words=["no checkpoints"])
    big = tiny_config(tmp_path, "UNetG", dataset="folder", data_root=str(tmp_path), network={
        "image_shape": [1, 16, 16], **CLASSES})
    shutil.copytree(conditional / "run" / "ckpts", tmp_path / "run" / "ckpts")
    refused(*guide, big, words=["network.image_shape is [1, 16, 16], here [1, 8, 8]"])
    # Labels that the data do not have.
    refused("train.py", *plain[:2], "--set", "network.label_dim=9", "--set",
            f"save_dir={tmp_path}/a", words=["network.label_dim is 9", "has 10 classes"])
    folder = tmp_path / "flat"
    folder.mkdir()
    Image.new("L", (8, 8)).save(folder / "a.png")
    own = tiny_config(tmp_path, dataset="folder", data_root=str(folder), batch_size=1,
                      network={"label_dim": 2}, save_dir=str(tmp_path / "b"))
    refused("train.py", "--config", own, words=["network.label_dim is 2", "no classes"])
    own = tiny_config(tmp_path, dataset="folder", data_root=str(tmp_path / "train.npz"),
                      batch_size=2, network={"label_dim": 3}, save_dir=str(tmp_path / "c"))
    np.savez(tmp_path / "train.npz", np.zeros((4, 8, 8, 1), np.uint8), labels=[0, 2, 2, 0])
    refused("train.py", "--config", own, words=["other labels than the 3", "label_dim"])
    # Another label_dim, label_dropout or augmentation than the checkpoint's.
    for key in ("network.label_dim=0", "label_dropout=0.5", "augment=0.5"):
        refused("sample.py", *flags, "--set", key, words=[key.split("=")[0], "there"])

def test_a_checkpoint_from_before_labels_is_taken(trained, tmp_path):
    copy = shutil.copytree(trained / "run", tmp_path / "run")
    path = copy / "ckpts" / "model_3.pth"
    state = torch.load(path, weights_only=True)
    del state["config"]["network"]["label_dim"], state["config"]["label_dropout"]
    del state["config"]["augment"]
    torch.save(state, path)
    flags = ["--config", trained / "config.yaml", "--set", f"save_dir={copy}"]
    succeed("sample.py", *flags, "--n_samples", 4)
    succeed("train.py", *flags, "--set", "n_epoch=5")
    refused("sample.py", *flags, "--epoch", 3, "--set", "augment=0.1", words=["augment 0"])

def test_settings_of_guidance_name_the_folder():
    guide = {"epoch": 5, "sigma_rel": 0.2, "checkpoint_sha256": "0123456789"}
    made = {"guidance": 1.5, "guidance_interval": [0.2, 5.0], "guide": guide}
    assert guidance.variant(made) == "_guidance1.5_interval0.2-5_guide5_01234567_ema0.2"
    assert guidance.variant(made | {"guide": None}) == "_guidance1.5_interval0.2-5"
    assert guidance.variant({}) == guidance.variant(dict.fromkeys(made)) == ""
