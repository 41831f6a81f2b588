"""The command ``smile-upscale``: from folders or names on the hub to a folder with the upscaled model.

smile-upscale PRETRAINED EXPERT EXPERT … --output FOLDER --gate-k 8 --k 16
smile-upscale PRETRAINED digits=EXPERT flags=EXPERT --plan    # parameters, bytes and time; no weights are read
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import Progress

from ..config import SmileConfig
from ..exceptions import ConfigError, PlanError, SmileError
from ..io.hub import model_folder
from ..io.text import as_yaml
from .plan_table import plan_table
from .streaming import plan_folder, upscale_to_folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Upscale the models that the command line names, or print the plan. An error is one line, and exits with 1."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    options = _parser().parse_args(arguments)
    try:
        run(options)
    except SmileError as error:
        raise SystemExit(f"error: {error}") from None


def run(options: argparse.Namespace) -> None:
    """Upscale, or print the plan; raises SmileError."""
    given = vars(options)
    config = SmileConfig.from_dict(
        {field.name: given[field.name] for field in fields(SmileConfig) if field.name in given}
    )
    pretrained, experts = model_folder(options.pretrained), named_experts(options.experts)
    if options.plan:
        plan = plan_folder(pretrained, experts, config)
        Console().print(plan_table(plan, config, "plan of smile-upscale (--plan)"))
        return
    if options.output is None:
        raise ConfigError("--output is missing: name the folder of the upscaled model, or give --plan")
    if options.output.exists():
        raise ConfigError(f"{options.output} exists: name another folder, or remove it")
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("layers", total=None)
        upscale_to_folder(
            pretrained, experts, options.output, config,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )  # fmt: skip
    print(f"{options.output}: import fusion_bench_smile, then from_pretrained({str(options.output)!r}) loads the model")


def named_experts(given: Sequence[str]) -> dict[str, str]:
    """Name → folder or name on the hub, from ``NAME=EXPERT`` or ``EXPERT``, whose last part is its name.

    Raises PlanError if two experts have one name.
    """
    experts: dict[str, str] = {}
    for text in given:
        name, separator, expert = text.partition("=")
        if not separator or Path(text).exists():
            name, expert = Path(text).resolve().name, text
        if name in experts:
            raise PlanError(f"two experts are called {name!r}: give them names, as in first={experts[name]}")
        experts[name] = expert
    return experts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Upscale a pretrained model and its fine-tuned experts to one SMILE model, layer by layer from "
        "files to files: no more than one shard is in memory."
    )
    parser.add_argument(
        "pretrained", metavar="PRETRAINED", help="folder of the pretrained model, or its name on the hub"
    )
    parser.add_argument(
        "experts", metavar="EXPERT", nargs="+",
        help="folder or name on the hub of a fine-tuned model or a PEFT LoRA adapter; NAME=EXPERT names it",
    )  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="folder of the upscaled model")
    parser.add_argument("--plan", action="store_true", help="print layers, ranks, parameters, bytes and time, and stop")
    group = parser.add_argument_group(
        "options of SMILE", "written as on the command line of fusion_bench: 8, true, null, [q_proj]"
    )
    for field in fields(SmileConfig):
        flag = f"--{field.name.replace('_', '-')}"
        default = f"(default: {as_yaml(field.default)})"
        group.add_argument(flag, dest=field.name, type=_value, metavar="VALUE", default=argparse.SUPPRESS, help=default)
    return parser


def _value(text: str) -> Any:
    """A value as on the command line of fusion_bench; what YAML can't read, such as ``*_proj``, is text."""
    try:
        value = yaml.safe_load(text)
        return float(value) if isinstance(value, str) else value  # YAML reads 2e-2 as text
    except (yaml.YAMLError, ValueError):
        return text
