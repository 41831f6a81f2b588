"""Digests of the tensors of a checkpoint, which show damage that no loader would notice."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from ..exceptions import CheckpointError, PlanError
from .safetensors_source import SafetensorsSource
from .schema import read_json
from .sources import tensor_digest
from .text import shortened

DIGESTS_FILE = "smile_digests.json"


def write_digests(folder: Path, section: Mapping[str, Any]) -> None:
    """Write the digests of a complete checkpoint beside it: of its SMILE section and of all tensors in its files."""
    source = SafetensorsSource(folder)
    tensors = {name: tensor_digest(source.read(name)) for name in sorted(source.shapes())}
    values = {"section": _section_digest(section), "tensors": tensors}
    (folder / DIGESTS_FILE).write_text(json.dumps(values, indent=1) + "\n")


def check_digests(folder: Path, section: Mapping[str, Any]) -> int:
    """Compare a checkpoint with the digests that were written with it; the number of tensors that were read.

    Raises CheckpointError, which names the first damaged tensor, or if there are no digests.
    """
    if not (folder / DIGESTS_FILE).exists():
        raise CheckpointError(f"{folder} has no {DIGESTS_FILE}: load the model and save it again to write one")
    values = read_json(folder / DIGESTS_FILE)
    expected = values.get("tensors")
    if not isinstance(expected, dict):
        raise CheckpointError(f"{folder / DIGESTS_FILE} holds no digests: load the model and save it again")
    try:
        source = SafetensorsSource(folder)
        if missing := sorted(expected.keys() ^ source.shapes().keys()):
            raise CheckpointError(
                f"{folder}: {shortened(missing[0])} is in the files or in {DIGESTS_FILE} alone; copy it again"
            )
        damaged = [name for name in expected if tensor_digest(source.read(name)) != expected[name]]
    except PlanError as error:
        raise CheckpointError(f"{error}; copy it again, or build the model again") from None
    if damaged:
        problem = f"{len(damaged)} of {len(expected)} tensors are damaged (first: {damaged[0]})"
        raise CheckpointError(f"{folder}: {problem}: copy the checkpoint again, or build the model again")
    if values.get("section") != _section_digest(section):
        raise CheckpointError(f"{folder}: the options were edited or damaged: copy the checkpoint again")
    return len(expected)


def _section_digest(section: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(section, sort_keys=True).encode()).hexdigest()
