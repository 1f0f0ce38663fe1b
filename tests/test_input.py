"""A thousand mutated YAML files: each is a dry run, or one clear line and exit code 2."""

import contextlib
import functools
import io
import json
import signal
import sys
import threading
from collections import Counter
from datetime import date

import pytest
import yaml
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_errors import refused

import runtime
import train

# ----------------------------------------------------------------------------------------------------------------------
# Mutated YAML files.

TEXTS = [path.read_text() for path in sorted((ROOT / "config").glob("*/*.yaml"))]
TEXTS += [text for text in TEXTS if "dataset: digits" in text] * 3          # Small networks: a dry run takes less time.
EXTREMES = [None, True, False, 0, -1, 1, 2, 3, 4, 7, 8, 32, 64, 0.0, 0.5, 1e-3, 0.9, 5e-324, 1e308, -1e308, 1e400,
            float("nan"), 2**31, 2**63, 2**64, 10**30, 10**400, "", " ", "1e-3", "2e-2", ".inf", "0x10", "1_000", "on",
            "null", "~", "\x00", "\x1b[31m", "é\u2028ü", "💥", "a\nb", "Traceback", "x" * 3000, "../" * 50, "/",
            "/dev/null", "/proc/self", "~nobody/x", "UNetC", "UNetG", "cifar", "folder", "AdamW", [], {}, [[]], [None],
            [1, 2], [1, 1], [True, False], [0.9, 0.99], [1, 8, 8], [3, 8, 8], [3, 32, 32], [[1, 2], [3]], [1e308] * 3,
            list(range(500)), {"a": {"b": {"c": 1}}}, {1: 2}, date(2024, 2, 29), b"bytes"]
VALUES = st.one_of(st.sampled_from(EXTREMES), st.integers(0, 200), st.integers(), st.floats(), st.floats(0, 1),
                   st.text(max_size=20), st.lists(st.integers(-2, 9), max_size=10), st.lists(st.booleans(), max_size=5))
BITS = ["\t", ":", ": ", "-", "- ", "&a ", "*a", "[", "]", "{", "}", "#", "!!int ", "!!bool ", "!!timestamp ",
        "!!float ", "!!python/name:os.abort ", "!x ", "<<: ", "? ", "| ", ">", "%", "@", "`", "'", '"', "---\n",
        "...\n", "\x00", "\x85", "\ufeff", "\ud800", "0x", "1:1:", "2024-13-45", "=", "&a [*a]", "\\", "\r", "é"]


def places(values, path=()):
    """The paths of all keys and list items in a config."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


@st.composite
def mutated_values(draw):
    """A shipped config with one to three keys or items dropped, renamed, replaced, wrapped or doubled, as bytes."""
    values = yaml.safe_load(draw(st.sampled_from(TEXTS)))
    for _ in range(draw(st.integers(1, 3))):
        *parents, key = draw(st.sampled_from(sorted(places(values), key=str)))
        target = functools.reduce(lambda at, parent: at[parent], parents, values)
        kind = draw(st.sampled_from(["replace", "replace", "replace", "drop", "rename", "wrap", "double"]))
        if kind == "replace" or (kind == "rename" and isinstance(target, list)):
            target[key] = draw(VALUES)
        elif kind == "drop":
            del target[key]
        elif kind == "rename":
            other = draw(st.sampled_from([f"{key}s", str(key)[1:], str(key).upper(), "x" * 999, 7, None]))
            target[other] = target.pop(key)
        elif kind == "wrap":
            target[key] = draw(st.sampled_from([[target[key]], {key: target[key]}, str(target[key])]))
        elif isinstance(target, list):
            target.insert(key, target[key])
        else:
            target[key] = [target[key], target[key]]
        if not values:
            break
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=draw(st.booleans())).encode()


@st.composite
def mutated_text(draw):
    """The text of a shipped config with lines doubled, moved or cut, characters inserted and bits flipped, as bytes."""
    text = draw(st.sampled_from(TEXTS))
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(text)))
        lines = text.splitlines(keepends=True)
        i, j = (draw(st.integers(0, max(0, len(lines) - 1))) for _ in range(2))
        kind = draw(st.sampled_from(["insert", "delete", "cut", "repeat", "move", "indent", "flip", "comment"]))
        if kind == "insert":
            text = text[:at] + draw(st.sampled_from(BITS)) + text[at:]
        elif kind == "delete":
            text = text[:at] + text[at + draw(st.integers(1, 9)):]
        elif kind == "cut":
            text = text[:at]
        elif kind == "flip" and text[at:]:
            text = text[:at] + chr(ord(text[at]) ^ 1 << draw(st.integers(0, 7))) + text[at + 1:]
        elif lines:
            line = lines[i] if kind == "repeat" else lines.pop(i)
            if kind == "indent":
                lines.insert(i, draw(st.sampled_from([" ", "   ", "\t"])) + line)
            elif kind == "comment":
                lines.insert(i, f"# {line}")
            else:
                lines.insert(j, line)
            text = "".join(lines)
    encoding = draw(st.sampled_from(["utf-8"] * 18 + ["utf-16", "latin-1"]))
    return text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")


def dry_run(path):
    """train.py --dry_run in this process: exit code, standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["train.py", "--config", str(path), "--dry_run"])
        patch.setattr(threading, "excepthook", threading.excepthook)        # command() sets its own.
        with pytest.raises(SystemExit) as end:
            runtime.command(train.main)()
    return end.value.code, out.getvalue(), err.getvalue()


@pytest.fixture
def time_limit():
    """A function that gives what follows 60 s, in the middle of which pytest.fail then stands."""
    def stop(*_):
        pytest.fail("no end after 60 s")
    old = signal.signal(signal.SIGALRM, stop)
    yield lambda: signal.alarm(60)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


def is_one_line(err, script="train.py"):
    """Whether a standard error is one error line of sane length."""
    return (err.startswith(f"{script}: error: ") and len(err.splitlines()) == 1 and len(err) < 2000
            and 'File "' not in err)


@pytest.mark.slow
def test_a_thousand_mutated_configs(tmp_path, monkeypatch, time_limit):
    """Each is a dry run or one line and exit code 2."""
    cost, seen, ends = train.edm.cost, {}, Counter()

    def cost_once(config):
        """The network's cost depends on these keys alone: networks that come again are not built again."""
        key = json.dumps([config["net_type"], config["network"], config["diffusion"]])
        if key not in seen:
            seen[key] = cost(config)
        return seen[key]

    monkeypatch.setattr(train.edm, "cost", cost_once)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"

    @settings(max_examples=1200, derandomize=True, database=None, deadline=None,
              suppress_health_check=list(HealthCheck))
    @given(st.one_of(mutated_values(), mutated_text()))
    def check(content):
        path.write_bytes(content)
        time_limit()
        code, out, err = dry_run(path)
        if code == 0:
            assert "parameters" in out and err == ""
        else:
            assert code == 2 and is_one_line(err), err
        assert list(tmp_path.iterdir()) == [path]
        ends[code] += 1

    check()
    assert ends.total() >= 1000 and min(ends[0], ends[2]) >= 100, ends


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new", "words"), [
    ("seed: 0", "seed: 0\nseed: 1", ["key 'seed' stands twice", "lines"]),
    ("seed: 0", "seed: [", ["not valid YAML", "line"]),
    ("seed: 0", "\tseed: 0", ["not valid YAML", "line"]),
    ("seed: 0", "sead: 0", ["unknown key sead", "did you mean seed?"]),
    ("seed: 0", "seed: 0x" + 5000 * "f", ["seed must be a whole number", "of that size"]),
    ("seed: 0", "data_root: &a [*a]", ["aliases unfold"]),
    ("is_attn: [false, true]", "is_attn: [true]", ["network.is_attn has 1 entries", "network.ch_mults 2"]),
    ("ch_mults: [1, 2]", "ch_mults: [1, 3]", ["attn_channels_per_head 64 does not divide the 96 channels of level 1"]),
    ("image_shape: [1, 8, 8]", "image_shape: [1, 9, 9]", ["digits has images of shape [1, 8, 8]", "[1, 9, 9]"]),
    ("sigma_data: 0.85", "sigma_data: 1e308", ["diffusion.sigma_data must be a number from 1e-06 to 1e+06"]),
    ("dataset: digits", "dataset: [*x]", ["not valid YAML", "undefined alias"]),
])
def test_bad_yaml_as_a_user_meets_it(tmp_path, old, new, words):
    path = tmp_path / "config.yaml"
    text = (ROOT / "config" / "digits" / "G.yaml").read_text() + "seed: 0\n"
    assert old in text
    path.write_text(text.replace("./runs", str(tmp_path)).replace(old, new))
    refused(tmp_path, "train.py", "--config", path, words=[str(path), *words])
