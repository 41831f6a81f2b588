"""The pages of the documentation: the tutorial runs as it is written, and the table of options is up to date."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ENVIRONMENT

from studies import options

REPOSITORY = Path(__file__).parents[2]
MEASURED = ("│ time to factor", "│ memory beyond")  # they depend on the machine
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_tutorial_runs_as_it_is_written(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "tutorial.md").read_text()
    printed, path = "", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    variables = {**os.environ, **ENVIRONMENT, "PATH": path}
    for language, code in BLOCK.findall(page):
        command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euc", code]
        run = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
        printed += run.stdout
    for output in re.findall(r"^```text\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        for line in output.splitlines():
            if line.startswith(("│", "digits:", "flags:")) and not line.startswith(MEASURED):
                assert line in printed
    assert {path.name for path in tmp_path.iterdir()} >= {"smile", "smile-of-three", "flags-again"}


def test_the_table_of_options_is_up_to_date() -> None:
    assert (REPOSITORY / "docs" / "options.md").read_text() == options.page()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "studies/README.md", "zoo/README.md"])
def test_links_to_files_of_the_repository_exist(page: str) -> None:
    """The pages in docs/ are checked by ``mkdocs build --strict``."""
    file = REPOSITORY / page
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", file.read_text())
    missing = [target for target, _ in links if target and not (file.parent / target).exists()]
    assert not missing
    for target, anchor in links:
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (file.parent / target).read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
