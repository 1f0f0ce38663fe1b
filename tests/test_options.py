"""Configs: defaults, types, ranges, overrides, and the files that are shipped."""

from pathlib import Path

import pytest
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
        "lrate": [(4e-4, 2e-2, 5e-3), (1.5e-4, 7.5e-3, 3e-3)],
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
    path = tiny_config(tmp_path)
    path.write_text(path.read_text() + "lrate: 2e-2\nseed: 1e3\n")
    assert yaml.safe_load(path.read_text())["lrate"] == "2e-2"      # What YAML 1.1 makes of it.
    config = options.load_config(path)
    assert config["lrate"] == 0.02 and config["seed"] == 1000 and isinstance(config["seed"], int)


def test_defaults_and_overrides(tmp_path):
    config = load(tmp_path, "network.dropout=0.5", "optim_args.betas=[0.8, 0.9]", "flip=true", "lrate=1e-5")
    assert config["network"]["dropout"] == 0.5 and config["optim_args"]["betas"] == [0.8, 0.9]
    assert config["flip"] is True and config["lrate"] == 1e-5
    assert config["diffusion"]["sigma_max"] == 80 and config["save_every"] == 100 and config["load_epoch"] == -1


def test_dataset_aliases(tmp_path):
    assert load(tmp_path, dataset="cifar")["dataset"] == "cifar10"
    assert load(tmp_path, dataset="tiny")["dataset"] == "tinyimagenet"


@pytest.mark.parametrize(("override", "words"), [
    ("lrat=1", ["lrat", "lrate"]), ("network.n_chanels=1", ["network.n_chanels", "network.n_channels"]),
    ("zzzz=1", ["zzzz", "the keys are"]), ("lrate=fast", ["lrate", "number above 0", "fast"]),
    ("lrate=-1", ["lrate"]), ("lrate=.nan", ["lrate"]), ("lrate=.inf", ["lrate"]), ("n_epoch=1.5", ["n_epoch"]),
    ("n_epoch=0", ["n_epoch", "1 or more"]), ("n_epoch=true", ["n_epoch"]), ("flip=2", ["flip", "true or false"]),
    ("dataset=imagenet", ["dataset", "cifar10"]), ("net_type=UNetD", ["net_type", "UNetC"]), ("ema=1", ["ema"]),
    ("network.image_shape=[3,32]", ["network.image_shape", "list of 3"]), ("network=3", ["network"]),
    ("network.is_attn=[true]", ["network.is_attn", "ch_mults"]), ("network.image_shape=[1,9,9]", ["halved"]),
    ("diffusion.sigma_max=0.001", ["sigma_min", "sigma_max"]), ("optim_args.betas=[0.9,1]", ["optim_args.betas"]),
    ("noequals", ["key=value"]), ("save_dir=", ["save_dir"]), ("batch_size=[]", ["batch_size"]),
    ("lrate=[", ["YAML"]),
])
def test_bad_values_are_named(tmp_path, override, words):
    with pytest.raises(UserError) as error:
        load(tmp_path, override)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "a: [", "\x00", "just text", "dataset: digits\n"])
def test_bad_files_are_named(tmp_path, content):
    path = Path(tmp_path) / "bad.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=r"bad\.yaml"):
        options.load_config(path)
