"""benchmarks/gpu.py's own bookkeeping: parts that fail, hang or are missing. `make gpu REHEARSE=1`
walks its whole way."""

import json
import sys
import pytest
from conftest import ROOT
from edm2.errors import UserError

@pytest.fixture
def gpu(monkeypatch):
    """The module benchmarks/gpu.py, which trains nothing."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")        # As it sets it.
    import gpu
    monkeypatch.setattr(gpu, "train", lambda *args: None)
    return gpu

def rehearse(gpu, folder, monkeypatch, plan, *words):
    """Run main with these parts; return its exit message and the parts of the JSON."""
    monkeypatch.setattr(gpu, "plan", lambda args: plan)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--rehearse", "--out", str(folder), *words])
    message = None
    try:
        gpu.main()
    except SystemExit as e:
        message = e.code
    (path,) = folder.glob("gpu-rehearsal-*.json")
    return message, json.loads(path.read_text())["parts"], path.with_suffix(".md").read_text()

def python(code):
    return [sys.executable, "-c", code]

def test_it_goes_on_after_a_failure_and_then_does_what_is_missing(gpu, tmp_path, monkeypatch):
    count = "with open('%s', 'a') as f: f.write('x')" % (tmp_path / "count")
    row = {"batch": 8, "faster": 2.5, "img_per_s": 9.0, "seconds": 0.5, "MFU": 0.4, "memory": 1.0}
    rows = f"import json; json.dump({[row, row]}, open({str(tmp_path / 'rows')!r}, 'w'))"
    plan = [("tests", 60, python(count)), ("breaks", 60, python("raise ValueError('is broken')")),
            ("dies", 60, python("import os; os._exit(3)")),
            ("hangs", 1, python("import time; print('begun', flush=True); time.sleep(60)")),
            ("step cifar10/C", 60, python(rows))]
    message, parts, page = rehearse(gpu, tmp_path, monkeypatch, plan)
    assert message == "gpu.py: 3 of 5 parts failed: breaks, dies, hangs"
    assert [part["ok"] for part in parts.values()] == [True, False, False, False, True]
    assert "is broken" in page and "it ran past 1 s" in page and "3 of 5 parts failed" in page
    assert parts["dies"]["error"].strip() == "exit code 3"      # Without a word.
    assert "| step cifar10/C | 2.50 | 2.0 | 8 | 9.0 | 500.0 | 40.0% | 1.00 | 1.00 |" in page
    plan[1] = "breaks", 60, python("print()")
    plan[2:4] = [(name, 60, python("print()")) for name in ("dies", "hangs")]
    message, parts, page = rehearse(gpu, tmp_path, monkeypatch, plan)
    assert message is None and all(part["ok"] for part in parts.values())
    assert "Failed" not in page and "0 of 5 parts failed" in page
    assert (tmp_path / "count").read_text() == "x"          # What was done is not done again.

def test_without_time_parts_are_left_out_and_said(gpu, tmp_path, monkeypatch):
    message, parts, page = rehearse(gpu, tmp_path, monkeypatch, [("tests", 60, python(""))],
                                    "--minutes", "0")
    assert "1 of 1 parts failed" in message and "no time was left" in page
    assert parts["tests"]["seconds"] == 0

def test_without_a_gpu_it_says_so(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    monkeypatch.setattr(gpu.distributed, "init", lambda: gpu.torch.device("cpu"))
    with pytest.raises(UserError, match="no GPU that PyTorch can use; --rehearse"):
        gpu.main()
