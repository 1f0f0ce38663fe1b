"""results.py: the table and the curves of what fid.py and probe.py leave behind."""

import json

from conftest import run, succeed
from PIL import Image


def write(folder, dataset, config, rows):
    """A run's results.jsonl; rows: (figure, value, epoch, n) and other keys."""
    folder.mkdir(parents=True)
    lines = [{"figure": figure, "value": value, "epoch": epoch, "n": n, "Mimg": (epoch + 1) / 20, "features": "f",
              "seeds": [0], "dataset": dataset, "net_type": f"UNet{config}"} | more
             for figure, value, epoch, n, more in rows]
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def runs(tmp_path):
    probes = [("probe", 80 + t, 499, 10000, {"timestep": t, "features": "out_6"}) for t in (3, 4, 5)]
    return [
        write(tmp_path / "c", "cifar10", "C", [
            ("FID", 3.5, 499, 50000, {}), ("FID", 3.0312, 999, 50000, {}), ("FID", 9.9, 99, 50000, {}),
            ("FID", 2.0, 999, 1000, {}),                            # Fewer images: not to be compared.
            ("FID", 3.2, 1000, 60000, {}),                          # More are as good.
            ("FID", 1.0, 999, 50000, {"sampling": {"eta": 0.5}}),   # Other samples than the table's.
            ("probe", 91.846, 999, 10000, {"timestep": 4}), *probes, ("KID", 0.1, 999, 50000, {})]),
        write(tmp_path / "e", "cifar10", "E", [("FID", 7.0, 1999, 50000, {}), ("FID", 2.72, 1999, 50000, {})]),
        write(tmp_path / "g", "digits", "G", [("FD(pixels)", 1.234, 59, 64, {}), ("probe", 93, 59, 360, {})]),
        write(tmp_path / "c2", "cifar10", "C", [("FID", 4, 999, 50000, {})]),
    ]


def test_table_and_curves(tmp_path):
    c, e, g, c2 = runs(tmp_path)
    done = run("results.py", c, e, g, c2, "--out", tmp_path / "out.png")
    out = done.stdout
    assert done.returncode == 0 and "other sampling settings: FID 1 @ 999" in done.stderr
    assert out.splitlines()[:5] == [
        "| | FID C | FID E | FID G | FD(pixels) C | FD(pixels) E | FD(pixels) G | probe C | probe E | probe G |",
        "|---|---|---|---|---|---|---|---|---|---|",
        f"| CIFAR-10 ({c}, {e}) | 3.03 @ 999 | 2.72 @ 1999 | - | - | - | - | 91.85 @ 999 (t=4 f, best of 4) | - | - |",
        "| digits | - | - | - | - | - | 1.23 @ 59 (n=64) | - | - | 93.00 @ 59 |",
        f"| CIFAR-10 ({c2}) | 4.00 @ 999 | - | - | - | - | - | - | - | - |"]
    with Image.open(tmp_path / "out.png") as image:
        assert image.width > 1500 and len(image.convert("RGB").getcolors(1 << 20)) > 50


def test_the_later_of_two_lines_counts_and_damaged_ones_are_said(tmp_path):
    _, e, *_ = runs(tmp_path)
    with open(e / "results.jsonl", "a") as f:
        f.write('{"figure": "FID", "value"\n[1]\n{"figure": "FID"}\n{"figure": "FID", "value": NaN}\n')
    done = run("results.py", e, "--out", tmp_path / "out.png")
    assert done.returncode == 0 and "| CIFAR-10 | 2.72 @ 1999 |" in done.stdout
    assert done.stderr.count("damaged line") == 4


def test_like_is_compared_with_like(tmp_path):
    """The timestep and block, or the n, of the most epochs: not the best of a grid, or more images, at one of them."""
    pair = [("probe", value, epoch, 360, {"timestep": 4, "features": "out_1"}) for epoch, value in ((9, 81), (19, 83))]
    grid = [("probe", 86, 19, 360, {"timestep": 1, "features": f"out_{i}"}) for i in (1, 2)]
    distances = [("FD(pixels)", 5, 9, 64, {}), ("FD(pixels)", 4, 19, 64, {}), ("FD(pixels)", 7, 19, 512, {})]
    write(tmp_path / "a", "digits", "C", pair + grid + distances)
    write(tmp_path / "b", "digits", "G", grid)
    assert succeed("results.py", tmp_path, cwd=tmp_path).splitlines()[2] == (
        "| digits | 4.00 @ 19 (n=64) | - | 83.00 @ 19 (t=4 out_1) | 86.00 @ 19 (t=1 out_1, best of 2) |")


def test_all_runs_below_here(tmp_path):
    write(tmp_path / "runs" / "digits" / "G", "digits", "G", [("probe", 93, 59, 360, {})])
    assert "| digits | 93.00 @ 59 |" in succeed("results.py", cwd=tmp_path)
    assert (tmp_path / "results.png").exists()


def test_bad_input(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "results.jsonl").write_text("")
    only_kid = write(tmp_path / "kid", "cifar10", "C", [("KID", 0.1, 999, 50000, {})])
    good = write(tmp_path / "good", "cifar10", "C", [("FID", 3, 999, 50000, {})])
    for args, words in (([tmp_path / "no"], "no results.jsonl"), ([empty], "no results"), ([], "or below runs"),
                        ([only_kid], "no FID"), ([good, "--out", tmp_path / "no" / "x.png"], "x.png"),
                        ([good, "--out", empty], "empty")):
        done = run("results.py", *args, cwd=tmp_path)
        message = done.stderr.strip().splitlines()
        assert done.returncode == 2 and len(message) == 1 and words in message[0], done.stderr
    assert not (tmp_path / "results.png").exists()
