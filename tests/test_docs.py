"""README and docs: every command is one that exists, and those that need no GPU, network or cluster
run, page by page, as they stand there, in a copy of the repository where the digits' networks are
small and have 4 epochs, not 60, so that the last is 3, not 59."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
import pytest
import torch
from conftest import ROOT, last_step, run, wait_until

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
         "benchmarks/README.md"]
NEEDS = ("network", "GPU", "cluster")         # What a block may need, said behind its language.
SCRIPT = r"((?:train|sample|fid|probe)\.py|edm2\.\w+|benchmarks/\w+\.py)"
SMALL = {"n_channels: 32": "n_channels: 8", "attn_channels_per_head: 64":
         "attn_channels_per_head: 8", "n_epoch: 60": "n_epoch: 4", "n_sample: 64": "n_sample: 4"}

def blocks(page):
    """The fenced blocks of a page: (language, what follows it, text)."""
    text = (ROOT / page).read_text()
    assert text.count("\n```") % 2 == 0
    return re.findall(r"^```(\S*) ?(.*)\n((?:(?!```).*\n)*)```$", text, re.M)

def commands(page):
    """(script or module, its words) of what a page types, in blocks and in inline code."""
    text = re.sub(r"\\\n\s*", "", (ROOT / page).read_text())
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    for line in [line for _, _, block in blocks(page) for line in re.sub(
            r"\\\n\s*", "", block).splitlines()] + [" ".join(code.split()) for code in inline]:
        for part in re.split(r" [;|#] |&& ", line):
            if found := re.search(rf"(?:^|\s){SCRIPT} (.*)", part):
                yield found[1], found[2].replace('"', "").split()

@pytest.fixture
def copy(tmp_path):
    """The repository, with small digits, and this Python as its .venv."""
    folder = tmp_path / "copy"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(
        ".git", ".venv", "runs", "cache", "data", "__pycache__", ".*_cache"))
    (folder / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir():
        (folder / ".venv" / path.name).symlink_to(path)
    for name in ("installed", "installed-dev"):         # Nothing is to be installed.
        (folder / ".venv" / name).unlink(missing_ok=True)
        (folder / ".venv" / name).touch()
    for path in [*folder.glob("config/digits/*.yaml"), *folder.glob("config/folder/*.yaml")]:
        text = path.read_text().replace("n_channels: 128", "n_channels: 32")
        for old, new in SMALL.items():
            assert path.parent.name == "folder" or old in text
            text = text.replace(old, new)
        path.write_text(text)
    return folder

def environment(**more):
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return env | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | more

def follow(folder, page):
    """Do what the blocks of a page say; return what they print."""
    said = ""
    for language, what, text in blocks(page):
        if what in NEEDS or language in ("text", "bibtex"):
            continue
        if language == "diff":
            lines, path = text.splitlines(keepends=True), folder / what
            old, new = ("".join(line[1:] for line in lines if line[0] in kinds)
                        for kinds in (" -", " +"))
            assert path.read_text().count(old) == 1, text
            path.write_text(path.read_text().replace(old, new))
            continue
        text = re.sub(r"(?<![0-9])59(?![0-9])", "3", text)
        command = {"sh": ["bash", "-e"], "python": [sys.executable, "-"]}[language]
        done = subprocess.run(command, input=text, cwd=folder, env=environment(), text=True,
                              capture_output=True)
        assert done.returncode == 0, text + done.stdout[-2000:] + done.stderr[-4000:]
        said += done.stdout
    return said

@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    """Each script, flag and config that a page names is there; each block is of a known kind."""
    kinds = {("sh", what) for what in ("", *NEEDS)} | {("python", ""), ("text", ""), ("bibtex", "")}
    strange = {(language, what) for language, what, _ in blocks(page)} - kinds
    assert all(language == "diff" and (ROOT / what).suffix == ".py" for language, what in strange)
    for script, words in commands(page):
        flags = {word.partition("=")[0] for word in words if re.match(r"--\w", word)}
        if script.startswith("benchmarks/") and script != "benchmarks/judge.py":
            known = set(re.findall(r'"(--[\w-]+)"', (ROOT / script).read_text()))
        else:                                   # The judge has fid.py's.
            name = script.replace("benchmarks/judge", "fid").removeprefix("edm2.")
            known = set(re.findall(r"(?<!\w)--[\w-]+",
                                   run(f"{name.removesuffix('.py')}.py", "--help").stdout))
        assert flags <= known, (script, flags - known)
        for before, word in zip(["", *words], words, strict=False):
            if re.fullmatch(r"config/\w+/\w+\.yaml", word) and before == "--config":
                assert (ROOT / word).exists() or word == "config/digits/H.yaml", word

@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(
    language in ("sh", "python") and what not in NEEDS for language, what, _ in blocks(page))])
def test_what_a_page_says_runs(copy, page):
    said = follow(copy, page)
    if page == "docs/change-it.md":         # Config H was trained, and is another network than G.
        state = torch.load(copy / "runs/digits/H/ckpts/model_3.pth", weights_only=True)
        assert state["config"]["net_type"] == "UNetH" and state["epoch"] == 3
        assert said.count("UNetH: ") == 1 and "model.safetensors" in said
        diff = subprocess.run(["diff", "blockG.py", "blockH.py"], cwd=copy, text=True,
                              stdout=subprocess.PIPE).stdout
        assert diff.count("\n---\n") == 3 and "x = mp_sum(x, y, self.res_t)" in diff
        assert state["config"]["network"]["res_t"] == 0.5
        for value, code, words in ((0.3, 0, "UNetG: "), (0.5, 2, "res_t is no key of UNetG")):
            done = subprocess.run([sys.executable, "train.py", "--config", "config/digits/G.yaml",
                                   "--dry_run", "--set", f"network.res_t={value}"], cwd=copy,
                                  env=environment(), capture_output=True, text=True)
            assert done.returncode == code and words in done.stdout + done.stderr
    for name in re.findall(r"docs/\w+\.png", said):
        assert (copy / name).exists()

@pytest.mark.slow
def test_a_slurm_script_on_two_nodes(copy, tmp_path):
    """By a stand-in for srun, which starts two torchrun. SIGUSR1 to all their processes, then to
    these two alone (which it is depends on Slurm's set-up): saved; a third job goes to the end."""
    (_, _, script), *_ = (block for block in blocks("docs/clusters.md") if "#SBATCH" in block[2])
    (copy / "train.sbatch").write_text(script)
    config = copy / "config" / "digits" / "C.yaml"
    config.write_text(config.read_text().replace("eval_every: 10", "log_every: 2").replace(
        "n_epoch: 4", "n_epoch: 12"))
    tools, job_id = tmp_path / "tools", str(os.getpid())
    tools.mkdir()
    start_all = 'for i in $(seq $SLURM_NNODES); do "$@" & done; wait -n || exit; wait'
    for name, text in (("srun", start_all), ("scontrol", "echo localhost")):
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    env = environment(SLURM_SUBMIT_DIR=str(copy), SLURM_NNODES="2", SLURM_NTASKS="2",
                      SLURM_GPUS_ON_NODE="1", SLURM_CPUS_PER_TASK="1",
                      SLURM_JOB_NODELIST="two", SLURM_JOB_ID=job_id)
    env["PATH"] = f"{tools}:{env['PATH']}"

    def processes():
        """Those of the step: torchrun and its processes."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_text().split("\0")
                ours = f"\0SLURM_JOB_ID={job_id}\0" in (folder / "environ").read_text()
            except OSError:                 # Ended meanwhile.
                continue
            if ours and "train.py" in words and "python" in words[0]:
                yield int(folder.name), words[1].endswith("torchrun")

    def start():
        return subprocess.Popen(["bash", "train.sbatch", "train.py", "--config",
                                 "config/digits/C.yaml"], cwd=copy, env=env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    step, after = 0, 26                 # After the first epoch, at whose end samples are drawn.
    for launchers_alone in (False, True):
        job = start()
        wait_until(lambda: last_step(copy / "runs" / "digits" / "C") >= after)        # noqa: B023
        found = dict(processes())
        assert sorted(found.values()) == [False, False, True, True]
        for pid, is_launcher in found.items():
            if is_launcher or not launchers_alone:
                os.kill(pid, signal.SIGUSR1)
        out, _ = job.communicate(timeout=120)
        assert job.returncode != 0 and "2 processes on" in out, out
        assert "stopped by SIGUSR1 after step" in out and 'train.py", line' not in out, out
        assert step == 0 or f"going on in ./runs/digits/C after step {step}\n" in out, out
        step = int(re.search(r"after step (\d+) and saved", out)[1])
        after = step + 4
    out, _ = start().communicate(timeout=300)
    assert f"going on in ./runs/digits/C after step {step}\n" in out, out
    path = copy / "runs" / "digits" / "C" / "ckpts" / "model_11.pth"
    assert torch.load(path, weights_only=True)["step"] == 12 * (1437 // 64)
