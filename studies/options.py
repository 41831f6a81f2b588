"""The table of all options, from `SmileConfig` and the framework's configuration of the method.

python -m studies.options docs/options.md
"""

from __future__ import annotations

import re
import sys
from dataclasses import fields
from inspect import cleandoc
from pathlib import Path

import pandas as pd
import yaml

from fusion_bench_smile import SmileConfig, SmileUpscalingAlgorithm
from fusion_bench_smile.config import FRAMEWORK_NAMES
from fusion_bench_smile.io import as_yaml, write_atomically

METHOD = Path(__file__).parents[1] / "config" / "method" / "smile_upscaling.yaml"
HEADER = """# Options

Written by `python -m studies.options docs/options.md`. On the command line of the framework an option is
`method.NAME=VALUE`, in Python a keyword of `upscale`, and for `smile-upscale` it is `--NAME VALUE` with hyphens. Values
are written as in YAML: `8`, `true`, `null`, `[q_proj]`.

## Of the upscaled model
"""
RUN_HEADER = """
## Of a run in the framework
"""
FOOTER = """
## Names of the framework's methods for language models

They are accepted as well, so that commands for these methods run unchanged.
"""


def described(text: str) -> dict[str, str]:
    """Name → description, from the section ``Attributes`` or ``Args`` of a docstring."""
    section = re.search(r"^(?:Attributes|Args):\n(.*?)(?=^\S|\Z)", cleandoc(text), re.MULTILINE | re.DOTALL)
    assert section is not None
    entries = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", section[1], re.MULTILINE | re.DOTALL)
    return {name: " ".join(value.split()).replace("``", "`") for name, value in entries}


def page() -> str:
    """The page in Markdown."""
    texts, defaults = described(SmileConfig.__doc__ or ""), yaml.safe_load(METHOD.read_text())
    rows = []
    for field in fields(SmileConfig):
        rows.append({
            "option": f"`{field.name}`", "default": f"`{as_yaml(field.default)}`",
            "meaning": texts[field.name],
        })  # fmt: skip
    run = described(SmileUpscalingAlgorithm.__doc__ or "")
    of_run = [name for name in run if name in defaults]
    run_rows = [
        {
            "option": f"`{name}`",
            "default": f"`{as_yaml(defaults[name])}`",
            "meaning": f"{run[name][0].upper()}{run[name][1:]}",
        }
        for name in of_run
    ]
    names = [{"name": f"`{name}`", "option": f"`{own}`"} for name, own in FRAMEWORK_NAMES.items()]
    tables = [
        pd.DataFrame(table).to_markdown(index=False, tablefmt="github", disable_numparse=True)
        for table in (rows, run_rows, names)
    ]
    return f"{HEADER}\n{tables[0]}\n{RUN_HEADER}\n{tables[1]}\n{FOOTER}\n{tables[2]}\n"


if __name__ == "__main__":
    write_atomically(Path(sys.argv[1]), page())
