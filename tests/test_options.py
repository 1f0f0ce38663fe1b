"""Configs: defaults, types, ranges, overrides, and the files that are shipped."""

import random
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, tiny_config

import edm
import options
from runtime import UserError

SHIPPED = sorted((ROOT / "config").glob("*/*.yaml"))


def load(folder, *overrides, **changes):
    return options.load_config(tiny_config(folder, **changes), overrides)


def test_twelve_configs_are_shipped():
    assert [f"{p.parent.name}/{p.stem}" for p in SHIPPED] == [
        f"{d}/{c}" for d in ("cifar10", "cifar100", "digits", "tinyimagenet") for c in "CEG"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_shipped_config_is_the_recipe(path):
    config = options.load_config(path)
    letter, name = path.stem, path.parent.name
    assert config["net_type"] == f"UNet{letter}" and config["dataset"] == name
    assert config["save_dir"].endswith(f"{name}/{letter}")
    assert config["network"]["attn_channels_per_head"] == 64
    if name == "digits":
        return
    tiny = name == "tinyimagenet"
    recipe = {                              # Spec section 4: C, E, G; then the same for Tiny ImageNet.
        "n_epoch": [(1000, 2000, 2000), (2000, 2000, 2000)],
        "batch_size": [(512, 512, 512), (192, 192, 192)],
        "lrate": [(4e-4, 2e-2, 1e-2), (1.5e-4, 7.5e-3, 3.75e-3)],       # G's: docs/config-g.md.
        "warm_epoch": [(200, 200, 200), (200, 200, 200)],
        "tref_epoch": [(None, 400, 400), (None, 400, 400)],
        "flip": [(True, True, True), (False, False, False)],
        "ema": [(0.9993,) * 3] * 2,
    }
    i = "CEG".index(letter)
    assert {key: config[key] for key in recipe} == {key: values[tiny][i] for key, values in recipe.items()}
    assert config["optim_args"]["betas"] == ([0.9, 0.99] if letter == "G" else [0.9, 0.999])
    assert config["network"]["dropout"] == (0 if letter == "G" else 0.1 if tiny else 0.13)
    assert config["linear"] == {"n_epoch": 15, "batch_size": 128, "lrate": 1e-3, "timestep": 5 if tiny else 4,
                                "blockname": "out_6"}
    count = (62_414_720, 62_414_720, 62_447_533) if tiny else (39_509_888, 39_509_888, 39_542_685)
    assert edm.cost(config)[0] == count[i]


def test_numbers_that_yaml_reads_as_strings(tmp_path):
    path = tiny_config(tmp_path, lrate="2e-2", seed="1e3")
    assert yaml.safe_load(path.read_text())["lrate"] == "2e-2"      # What YAML 1.1 makes of it.
    config = options.load_config(path)
    assert config["lrate"] == 0.02 and config["seed"] == 1000 and isinstance(config["seed"], int)


def test_defaults_and_overrides(tmp_path):
    config = load(tmp_path, "network.dropout=0.5", "optim_args.betas=[0.8, 0.9]", "flip=true", "lrate=1e-5")
    assert config["network"]["dropout"] == 0.5 and config["optim_args"]["betas"] == [0.8, 0.9]
    assert config["flip"] is True and config["lrate"] == 1e-5
    assert config["diffusion"]["sigma_max"] == 80 and config["save_every"] == 100 and config["load_epoch"] == -1


def test_dataset_aliases(tmp_path):
    for alias, name, shape in (("cifar", "cifar10", [3, 32, 32]), ("tiny", "tinyimagenet", [3, 64, 64])):
        assert load(tmp_path, dataset=alias, network={"image_shape": shape})["dataset"] == name


@pytest.mark.parametrize(("override", "words"), [
    ("lrat=1", ["lrat", "lrate"]), ("network.n_chanels=1", ["network.n_chanels", "network.n_channels"]),
    ("zzzz=1", ["zzzz", "the keys are"]), ("lrate=fast", ["lrate", "number above 0", "fast"]),
    ("lrate=-1", ["lrate"]), ("lrate=.nan", ["lrate"]), ("lrate=.inf", ["lrate"]), ("n_epoch=1.5", ["n_epoch"]),
    ("n_epoch=0", ["n_epoch", "from 1 to 1e+09"]), ("n_epoch=true", ["n_epoch"]), ("flip=2", ["flip", "true or false"]),
    ("dataset=imagenet", ["dataset", "cifar10"]), ("net_type=UNetD", ["net_type", "UNetC"]), ("ema=1", ["ema"]),
    ("network.image_shape=[3,32]", ["network.image_shape", "list of 3"]), ("network=3", ["network"]),
    ("network.is_attn=[true]", ["network.is_attn", "ch_mults"]), ("network.ch_mults=[1,1,1,1,1]", ["is_attn"]),
    ("diffusion.sigma_max=0.001", ["sigma_min", "sigma_max"]), ("optim_args.betas=[0.9,1]", ["optim_args.betas"]),
    ("noequals", ["key=value"]), ("save_dir=", ["save_dir"]), ("batch_size=[]", ["batch_size"]),
    ("lrate=[", ["YAML"]), ("lrate=1e300", ["lrate", "at most"]), ("diffusion.sigma_data=1e300", ["sigma_data"]),
    ("network.image_shape=[3,8,8]", ["digits", "[1, 8, 8]", "image_shape", "[3, 8, 8]"]),
    ("network.attn_channels_per_head=5", ["attn_channels_per_head 5", "32 channels of level 1", "is_attn", "null"]),
    ("network={image_shape: [1, 8, 8], n_channels: 32, ch_mults: [1, 3], is_attn: [false, false], n_blocks: 2, "
     "attn_channels_per_head: 64}", ["attn_channels_per_head 64", "96 channels of the middle block", "always"]),
    ("network.ch_mults=[1,1,1,1,1,1,1,1,1]", ["network.ch_mults", "a list of 1 to 8"]), ("network.n_blocks=17", ["16"]),
    ("network.ch_mults=[1,x]", ["network.ch_mults", "a list of which each is a whole number"]),
    ("network={image_shape: [1, 8, 8], n_channels: 8192, ch_mults: [2], is_attn: [true]}", ["16384 channels"]),
    ("lrate=0x" + 6000 * "f", ["lrate", "number above 0"]), ("optim_args={eps: 1, eps: 2}", ["eps", "twice"]),
    ("lrate=!!int ''", ["--set lrate", "YAML"]), ("lrate=!!bool maybe", ["--set lrate", "YAML"]),
    ("lrate=" + 200 * "1:" + "1.5", ["--set lrate", "YAML"]), ("save_dir=\"\\ud800\"", ["save_dir"]),
    ("n_epoch=1e99", ["n_epoch"]), ("save_dir=" + 1001 * "x", ["save_dir", "1 to 1000 characters"]),
    ("network={image_shape: [1, 8, 8], ch_mults: [1, 1, 1, 1, 1], is_attn: [false, false, false, false, true]}",
     ["image_shape [1, 8, 8]", "halved 4 times", "ch_mults"]),
    ("data_root=[&a [*a]]", ["--set data_root", "aliases"]),
])
def test_bad_values_are_named(tmp_path, override, words):
    with pytest.raises(UserError) as error:
        load(tmp_path, override)
    for word in words:
        assert word in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "a: [", "\x00", "just text", "dataset: digits\n"])
def test_bad_files_are_named(tmp_path, content):
    path = Path(tmp_path) / "bad.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=r"bad\.yaml"):
        options.load_config(path)


@pytest.mark.parametrize(("content", "words"), [
    ("lrate: 1\nseed: 2\nlrate: 3\n", ["key 'lrate' stands twice", "lines 1 and 3"]),
    ("linear: {lrate: 1, lrate: 1}\n", ["key 'lrate' stands twice", "lines 1 and 1"]),
    ("a: &a [x, *a]\n", ["aliases unfold"]), ("a: &a\n  <<: *a\n", ["aliases unfold"]),
    ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join(9 * [f'*a{i - 1}'])}]\n" for i in range(1, 9)), ["unfold"]),
    ("a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join(9 * [f'*a{i - 1}'])}]}}\n" for i in range(1, 9)),
     ["unfold"]),
    ("lrate: 1\n" * 20000, ["longer than 100000"]), (500 * "[", ["YAML"]), ("a: 1\nb: [1\nc: 2\n", ["line 3"]),
    ("a: !" + 9000 * "x" + " 1\n", ["YAML", "line 1"]), ("a: 1\n---\nb: 2\n", ["line 2"]),
])
def test_files_that_yaml_alone_would_misread_or_never_finish(tmp_path, content, words):
    path = Path(tmp_path) / "bad.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=r"bad\.yaml") as error:
        options.load_config(path)
    for word in words:
        assert word in str(error.value)
    assert len(str(error.value)) < 500 + len(str(path))


def test_merge_keys_and_aliases(tmp_path):
    """A merged key that is written again is no duplicate."""
    path = tiny_config(tmp_path)
    path.write_text(path.read_text() + "linear: {<<: &probe {lrate: 0.1, timestep: 5}, lrate: 0.2}\n")
    assert options.load_config(path)["linear"] | {"lrate": 0.2, "timestep": 5} == options.load_config(path)["linear"]


@pytest.mark.parametrize("net_type", ["UNetC", "UNetE", "UNetG"])
def test_widths_are_refused_exactly_where_the_network_refuses_them(tmp_path, net_type):
    config, rng, refused = load(tmp_path, net_type=net_type), random.Random(0), 0
    for _ in range(100):
        levels = rng.randint(1, 3)
        config["network"] |= {
            "n_channels": rng.choice([4, 6, 16, 32, 36, 64, 96, 100, 160, 200]), "n_blocks": rng.randint(1, 2),
            "ch_mults": rng.choices([1, 2, 3], k=levels), "is_attn": rng.choices([True, False], k=levels),
            "attn_channels_per_head": rng.choice([None, None, 4, 8, 32, 64])}
        with torch.device("meta"):
            built = works(edm.build, config)
        assert works(options.check_together, config) == built, config["network"]
        refused += not built
    assert 20 < refused < 95


def works(function, config):
    """Whether function(config) raises no UserError."""
    try:
        function(config)
        return True
    except UserError:
        return False
