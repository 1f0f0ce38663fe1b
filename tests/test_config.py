"""Configs: defaults, types, ranges, overrides, the files that are shipped, and mutated ones."""

import copy
import inspect
from collections import Counter
from datetime import date
from pathlib import Path
import pytest
import yaml
from conftest import NETS, ROOT, run, tiny_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from edm2 import checkpoint, diffusion
from edm2.config import Network, load_config
from edm2.errors import UserError

SHIPPED = [ROOT / "config" / dataset / f"{letter}.yaml" for dataset in (
    "cifar10", "cifar100", "digits", "tinyimagenet") for letter in "CEG"]

def load(folder, *overrides, **changes):
    """The Config of a tiny run."""
    return load_config(tiny_config(folder, **changes), overrides)

# Spec section 4. G's learning rate: docs/config-g.md.
KEYS = ["n_epoch", "batch_size", "lrate", "warm_epoch", "tref_epoch", "flip", "ema", "optim"]
RECIPE = {  # Of 32x32 images and of Tiny ImageNet: KEYS; betas, dropout; parameters.
    "C": ([1000, 512, 4e-4, 200, None, True, 0.9993, "Adam"], [0.9, 0.999], 0.13, 39_509_888),
    "E": ([2000, 512, 2e-2, 200, 400, True, 0.9993, "Adam"], [0.9, 0.999], 0.13, 39_509_888),
    "G": ([2000, 512, 1e-2, 200, 400, True, 0.9993, "Adam"], [0.9, 0.99], 0, 39_542_685),
    "tiny C": ([2000, 192, 15e-5, 200, None, False, 0.9993, "Adam"], [0.9, 0.999], 0.1, 62_414_720),
    "tiny E": ([2000, 192, 7.5e-3, 200, 400, False, 0.9993, "Adam"], [0.9, 0.999], 0.1, 62_414_720),
    "tiny G": ([2000, 192, 3.75e-3, 200, 400, False, 0.9993, "Adam"], [0.9, 0.99], 0, 62_447_533)}

@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_shipped_config_is_the_recipe(path):
    config, letter, name = load_config(path), path.stem, path.parent.name
    assert config.net_type == f"UNet{letter}" and config.dataset == name
    assert config.save_dir.endswith(f"{name}/{letter}")
    assert config.network.attn_channels_per_head == 64
    if name != "digits":
        tiny = name == "tinyimagenet"
        assert RECIPE["tiny " * tiny + letter] == (
            [getattr(config, key) for key in KEYS], config.optim_args.betas, config.network.dropout,
            diffusion.cost(config)[0])
        assert config.linear.model_dump() == {"n_epoch": 15, "batch_size": 128, "lrate": 1e-3,
                                              "flip": True, "timestep": 5 if tiny else 4,
                                              "blockname": "out_6"}
        assert list(config.diffusion.model_dump().values()) == [        # Spec section 3.
            0.5, -1.2, 1.2, 0.002, 80, 7, 0.01, 1, 1.007]

@pytest.mark.parametrize("letter", "CEG")
def test_the_small_config_is_the_shipped_one_made_small(letter):
    """Nothing but sizes, the length of the run and what goes with it; no dropout."""
    small, large = (load_config(ROOT / "config" / name / f"{letter}.yaml")
                    for name in ("cifar10_small", "cifar10"))
    differ = {key for key, value in small if value != getattr(large, key)}
    assert differ - {"tref_epoch"} == {
        "network", "n_epoch", "batch_size", "lrate", "warm_epoch", "ema", "eval_every", "eval",
        "save_dir", "save_every", "linear"}
    assert {name for name, value in small.network if value != getattr(large.network, name)} - {
        "dropout"} == {"n_channels", "ch_mults", "is_attn", "attn_channels_per_head", "n_blocks"}
    assert small.network.dropout == 0 and (small.tref_epoch is None) == (letter == "C")
    assert set(dict(small.linear).items()) ^ set(dict(large.linear).items()) == {
        ("blockname", "out_5"), ("blockname", "out_6")}
    assert diffusion.cost(small)[0] == 314_352 + 528 * (letter == "G")

@pytest.mark.parametrize("net_type", NETS)
def test_network_defaults_are_the_constructors(net_type):
    parameters = inspect.signature(getattr(diffusion.NETWORKS[net_type], net_type)).parameters
    values = {name: list(p.default) if isinstance(p.default, tuple) else p.default
              for name, p in parameters.items()}
    assert Network().model_dump() | {"augment_dim": 0} == values

def test_what_an_older_checkpoint_lacks_has_its_default(trained):
    """A key of today, or of one's own, does not part a run from its checkpoints."""
    config = load_config(trained / "config.yaml")
    saved = config.model_dump()
    for key in ("seed", "label_dropout", "augment", "posthoc_ema"):
        del saved[key]
    del saved["network"]["label_dim"], saved["network"]["n_blocks"]
    with pytest.raises(UserError, match=r"network\.n_blocks 3 there, 1 here"):
        checkpoint.check_same(config, saved, config.model_dump())
    saved["network"]["n_blocks"] = 1
    checkpoint.check_same(config, saved, config.model_dump())
    with pytest.raises(UserError, match=r"augment 0\.0 there, 0\.5 here"):
        checkpoint.check_same(load_config(trained / "config.yaml", ["augment=0.5"]), saved,
                              config.model_dump())

def test_defaults_overrides_and_types(tmp_path):
    config = load(tmp_path, "network.dropout=0.5", "optim_args.betas=[0.8, 0.9]", "flip=true",
                  "n_epoch=3", "n_epoch=4.0", "cache_dir=null", "save_dir=~/a=b", "eval=",
                  "linear={<<: {lrate: 0.1, timestep: 5}, lrate: 0.2}",     # No duplicate.
                  dataset="tiny", network={"image_shape": [3, 64, 64]}, lrate="2e-2", seed="1e3")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["lrate"] == "2e-2"    # YAML 1.1.
    assert config.lrate == 0.02 and config.seed == 1000 and isinstance(config.seed, int)
    assert config.network.dropout == 0.5 and config.optim_args.betas == [0.8, 0.9]
    assert config.optim_args.eps == 1e-8 and config.network.n_channels == 32
    assert config.flip is True and config.n_epoch == 4 and config.dataset == "tinyimagenet"
    assert config.cache_dir is None and config.save_dir == str(Path.home() / "a=b")
    assert config.diffusion.sigma_max == 80 and config.save_every == 100
    assert config.load_epoch == -1 and config.data_root == "./data" and config.eval.fid == 0
    assert (config.linear.lrate, config.linear.timestep, config.linear.n_epoch) == (0.2, 5, 15)
    network = {"image_shape": [3, 32, 32]}
    assert load(tmp_path, dataset="cifar", network=network).dataset == "cifar10"
    with pytest.raises(ValidationError, match="frozen"):
        config.lrate = 1

@pytest.mark.parametrize(("override", "words"), [
    ("lrat=1", "unknown key lrat; did you mean lrate?"), ("warm_epochs=1", "mean warm_epoch?"),
    ("network.n_chanels=1", "unknown key network.n_chanels; did you mean network.n_channels?"),
    ("zzzz=1", "unknown key zzzz; the keys are dataset, … n_sample"), ("noequals", "KEY=VALUE"),
    ("eval_every", "KEY=VALUE"), ("lrate=fast", "number, not 'fast'"), ("lrate=-1", "0, not -1"),
    ("lrate=true", "number, not True"), ("lrate=.nan", "not nan"), ("lrate=.inf", "not inf"),
    ("n_epoch=1.5", "integer, not 1.5"), ("n_epoch=true", "integer, not True"), ("ema=1", "than 1"),
    ("n_epoch=0", "equal to 1, not 0"), ("seed=-1", "equal to 0, not -1"), ("classes=0", "to 1"),
    ("seed=null", "not None"), ("flip=2", "boolean, not 2"), ("flip=1", "boolean, not 1"),
    ("lrate=[", "--set lrate … YAML"), ("lrate=2024-13-45", "YAML"), ("lrate=!!bool maybe", "YAML"),
    ("batch_size=[]", "integer, not []"), ("dataset=imagenet", "'cifar10' … not 'imagenet'"),
    ("save_dir=", "at least 1 character"), ("net_type=UNetD", "'UNetC' … not 'UNetD'"),
    ("network=3", "not 3"),
    ("lrate.x=1", "{'x': 1}"), ("network.n_blocks=17", "network.n_blocks … 16, not 17"),
    ("network.is_attn=[1,0]", "network.is_attn.0 … boolean, not 1"), ("eval.fid=1", "covariance"),
    ("network.is_attn=[true]", "network.is_attn has 1 … network.ch_mults 2"),
    ("network.ch_mults=[1,1,1,1,1]", "network.is_attn has 2 … network.ch_mults 5"),
    ("network.ch_mults=[1,1,1,1,1,1,1,1,1]", "at most 8"), ("network.ch_mults=[1,x]", "1 … 'x'"),
    ("network.image_shape=[3,32]", "3 items … [3, 32]"), ("eval={fid: 9}", "needs eval_every"),
    ("network.image_shape=[3,8,8]", "network.image_shape … [3, 8, 8] … digits … [1, 8, 8]"),
    ("network={image_shape: [1, 8, 8], ch_mults: [1, 1, 1, 1, 1], is_attn: [false, false, false, "
     "false, true]}", "network.image_shape [1, 8, 8] … halved … 5 levels of ch_mults"),
    ("diffusion.sigma_max=0.001", "sigma_min"), ("diffusion.rho=1e-300", "0.5, not '1e-300'"),
    ("linear.timestep=19", "18, not 19"), ("optim_args.betas=[0.9,1]", "betas.1 … less than 1"),
    ("optim_args={eps: 1, eps: 2}", "--set optim_args … 'eps' stands twice"),
    ("posthoc_ema.sigma_rels=[0.1]", "[0.1] … two or more"),
    ("posthoc_ema.sigma_rels=[0.1,0.1]", "[0.1, 0.1] … different")])
def test_bad_values_are_named(tmp_path, override, words):
    with pytest.raises(UserError) as error:
        load(tmp_path, override)
    assert str(error.value).startswith((f"config {tmp_path}", "--set"))
    key = override.partition("=")[0].split(".")[-1]
    assert all(word in str(error.value) for word in [key, *words.split(" … ")]), error.value
    assert len(str(error.value)) < 600

@pytest.mark.parametrize(("content", "words"), [
    ("", "keys and values"), ("- a\n- b\n", "keys and values"), ("just text", "keys and values"),
    ("a: [", "YAML: line 1"), ("\x00", "YAML"), ("\tseed: 0\n", "YAML: line 1"),
    ("é", "cannot read"), ("dataset: digits\n", "key net_type is missing"), (500 * "[", "YAML"),
    ("lrate: 1\nseed: 2\nlrate: 3\n", "line 3: 'lrate' stands twice"), ("a: *x", "undefined alias"),
    ("lrate: !!python/object/apply:os.getpid []", "could not determine a constructor"),
    ("linear: {lrate: 1, lrate: 1}", "line 1: 'lrate' stands twice"),
    ("a: 1\nb: [1\nc: 2", "line 3")])
def test_bad_files_are_named(tmp_path, content, words):
    path = tmp_path / "bad.yaml"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"bad\.yaml") as error:
        load_config(path)
    assert words in str(error.value) and len(str(error.value)) < 500

@pytest.mark.parametrize(("network", "words"), [
    ({"n_channels": 200, "attn_channels_per_head": None}, "200 channels: group norm"),
    ({"attn_channels_per_head": 5}, "attn_channels_per_head 5 cannot divide 32"),
    ({"ch_mults": [1, 3], "is_attn": [False, False], "attn_channels_per_head": 64, "n_blocks": 2},
     "attn_channels_per_head 64 cannot divide 96")])
@pytest.mark.parametrize("net_type", NETS)
@pytest.mark.parametrize("function", [diffusion.cost, diffusion.build])
def test_widths_that_do_not_divide(tmp_path, net_type, network, words, function):
    config = load(tmp_path, net_type=net_type, network=network)
    if net_type == "UNetG" and "n_channels" in network:         # It has no group norms.
        function(config)
    else:
        with pytest.raises(UserError, match=f"network: {words}"):
            function(config)

TEXTS = [path.read_text() for path in [*SHIPPED, *SHIPPED[6:9] * 3]]     # Digits': they are fast.
VALUES = st.one_of(
    st.integers(-1, 200), st.floats(), st.text(max_size=9), st.lists(st.booleans(), max_size=5),
    st.lists(st.integers(-2, 9), max_size=9), st.sampled_from([
        None, True, 2**64, "1e-3", "1_000", "on", "x" * 3000, "\x1b[31m", "é\u2028", "~no/x", {},
        [[]], [None], [0.9, 0.99], [1, 8, 8], {1: 2}, {"a": {"b": 1}}, b"byte", date(2024, 2, 9)]))
BITS = ["", "\t", " ", ": ", "- ", "[", "}", "#", "!!int ", "!!bool ", "!x ", "*a", "|", "? ",
        "@", "'", '"', "---\n", "...\n", "\x00", "\x85", "\ufeff", "\\", "é"]

@st.composite
def mutated(draw):
    """A shipped config, as bytes, with characters or a key or two changed or left out."""
    text = draw(st.sampled_from(TEXTS))
    if draw(st.booleans()):
        at, n = draw(st.integers(0, len(text))), draw(st.sampled_from([0, 1, 2, 3, 9, 10**6]))
        text = text[:at] + draw(st.sampled_from(BITS)) + text[at + n:]
        return text.encode(draw(st.sampled_from(["utf-8"] * 9 + ["utf-16", "latin-1"])), "replace")
    values = yaml.safe_load(text)
    for _ in range(draw(st.integers(1, 2))):
        below = [v for v in values.values() if isinstance(v, dict) and v]
        section = draw(st.sampled_from([values, *below]))
        key = draw(st.sampled_from(sorted(section, key=str)))
        old = section.pop(key)
        names = [key] * 6 + [f"{key}s", str(key)[1:], str(key).upper(), "x" * 999, 7, None]
        wraps = st.sampled_from([[old], {key: old}, str(old), [old, old]])
        if draw(st.integers(0, 5)):
            section[draw(st.sampled_from(names))] = copy.deepcopy(draw(st.one_of(VALUES, wraps)))
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=draw(st.booleans())).encode()

def test_mutated_configs(tmp_path, monkeypatch):
    """train.py --dry_run of each is a dry run, or one line and exit code 2; nothing is written."""
    monkeypatch.setattr(diffusion, "training_bytes", lambda *args: (1, 1))      # A second each.
    path, ends = tmp_path / "config.yaml", Counter()

    @settings(max_examples=150, derandomize=True, database=None, deadline=None,
              suppress_health_check=list(HealthCheck))
    @given(mutated())
    def check(content):
        path.write_bytes(content)
        done = run("train.py", "--config", path, "--dry_run", cwd=tmp_path)
        if done.returncode == 0:
            assert "parameters" in done.stdout and done.stderr == ""
        else:
            assert done.returncode == 2 and done.stderr.startswith("train.py: error: ")
            assert len(done.stderr.splitlines()) == 1 and len(done.stderr) < 2000
        assert list(tmp_path.iterdir()) == [path]
        ends[done.returncode] += 1

    check()
    assert ends.total() >= 150 and min(ends[0], ends[2]) >= 15, ends
