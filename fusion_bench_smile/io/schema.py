"""The JSON values of checkpoint format 3, with checks of every type and range.

A checkpoint may come from anybody. Nothing of it is used before it has passed these checks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..config import REMOVED_EXECUTION
from ..exceptions import CheckpointError, PlanError
from .names import check_expert_names
from .text import shortened

MAX_RANK = 2**24  # beyond the sides of any layer; the shapes of the files are compared before memory is allocated

Rank = Annotated[int, Field(ge=-1, le=MAX_RANK)]
GateRank = Annotated[int, Field(ge=0, le=MAX_RANK)]
Count = Annotated[int, Field(ge=0)]
Energy = Annotated[float, Field(ge=0)]


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class LayerValues(_Section):
    """One layer: the ranks of its experts, and options that all layers repeat."""

    ranks: list[Rank]
    gate_ranks: list[GateRank]
    top_k: int
    shared_router: bool
    expert_bias: bool
    execution: str
    storage: str

    @field_validator("execution")
    @classmethod
    def _read_removed(cls, value: str) -> str:
        return "auto" if value == REMOVED_EXECUTION else value


class ChangeValues(_Section):
    """How far an expert is from the pretrained model; see `ExpertChange`."""

    energy: Energy
    unused: Energy = 0.0
    largest: dict[str, Energy] = Field(default_factory=dict)


class RecipeValues(_Section):
    """What the model was made of; see `Provenance`."""

    energy: dict[str, list[Energy]] = Field(default_factory=dict)
    sources: dict[str, str] = Field(default_factory=dict)
    parameters: Annotated[list[Count], Field(min_length=2, max_length=2)] = [0, 0]
    versions: dict[str, str] = Field(default_factory=dict)
    changes: dict[str, ChangeValues] = Field(default_factory=dict)


class RouterValues(_Section):
    """What the router for whole inputs stores."""

    baseline: bool = False
    prototypes: Annotated[list[Annotated[int, Field(ge=1, le=MAX_RANK)]], Field(min_length=2, max_length=2)] | None = (
        None
    )
    scored_rows: Annotated[int, Field(ge=1, le=MAX_RANK)] | None = None  # absent in checkpoints that score with all


class CheckpointValues(_Section):
    """The whole section."""

    layers: dict[str, LayerValues]
    experts: Annotated[list[str], Field(min_length=1)]
    options: dict[str, Any]
    recipe: RecipeValues | None = None
    router: RouterValues | None = None
    own: dict[str, list[str]] | None = None
    needs: str = ""
    split_attention: list[str] = Field(default_factory=list)
    flat_weights: list[str] = Field(default_factory=list)  # layers whose weight is stored in one dimension

    @model_validator(mode="after")
    def _check_experts(self) -> CheckpointValues:
        check_expert_names(self.experts)
        count = len(self.experts)
        for name, layer in self.layers.items():
            if (len(layer.ranks), len(layer.gate_ranks)) != (count, count):
                raise ValueError(f"{name} has ranks of {len(layer.ranks)} experts, there are {count}")
        if unknown := [name for name in self.flat_weights if name not in self.layers]:
            raise ValueError(f"flat_weights: {unknown[0]} is no upscaled layer")
        for name, shares in (self.recipe.energy if self.recipe else {}).items():
            if name not in self.layers or len(shares) != count:
                raise ValueError(f"energy of {name}: no upscaled layer of {count} experts")
        return self


def parse_section(values: Mapping[str, Any], where: str) -> CheckpointValues:
    """Validate the JSON values of a checkpoint. Raises CheckpointError that names the first wrong value."""
    try:
        return CheckpointValues.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(str(part) for part in first["loc"])
        problem = f"{location}: {first['msg']}".strip(" :")
    except (PlanError, UnicodeError) as error:  # of the names; text that is no Unicode
        problem = str(error)
    problem = shortened(problem, limit=300)
    raise CheckpointError(f"{where}: {problem}; the file is damaged or was edited: build the model again")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError for anything else."""
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else shortened(error)
        raise CheckpointError(f"{file} is not readable JSON: {reason}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} is not readable JSON: it holds no object")
    return values
