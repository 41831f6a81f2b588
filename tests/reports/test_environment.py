"""Hardware and software of a run."""

from __future__ import annotations

import subprocess

import torch

from fusion_bench_smile.reports import environment, git_revision


def test_the_environment_of_this_process():
    here = environment(torch.device("cpu"), 3)
    assert (here.processes, here.threads) == (3, torch.get_num_threads())
    assert here.accelerator.startswith("cpu (")
    assert here.packages["torch"] == torch.__version__.split("+")[0] or here.packages["torch"] == torch.__version__


def test_the_git_revision(tmp_path):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert git_revision(tmp_path / "missing") is None
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "one")
    git("tag", "v1")
    assert git_revision(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("2")
    assert git_revision(tmp_path) == git("rev-parse", "HEAD") + "-dirty"
