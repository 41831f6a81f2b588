"""What an upscaled model was made of: recorded while it is built, kept in its checkpoint, told by its model card."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import xxhash
from huggingface_hub import ModelCardData
from torch import Tensor

from .stack import Stack

MARK = "<!-- written by fusion_bench_smile -->"
PACKAGES = ("fusion-bench-smile", "torch", "transformers")


@dataclass
class Recipe:
    """What was made of what.

    Attributes:
        energy: upscaled layer → for each expert the part of ‖ΔW‖² that its rank keeps.
        sources: expert → a hash of the weights (or LoRA factors) that it was made of, in the upscaled layers.
        parameters: of the pretrained model, and of the upscaled one.
        calibrated: how many of these calibration added.
        versions: package → version.
    """

    energy: dict[str, list[float]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    parameters: tuple[int, int] = (0, 0)
    calibrated: int = 0
    versions: dict[str, str] = field(default_factory=lambda: {name: version(name) for name in PACKAGES})

    def to_dict(self) -> dict[str, Any]:
        energy = {name: [round(value, 6) for value in values] for name, values in self.energy.items()}
        return {**vars(self), "energy": energy, "parameters": list(self.parameters)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Raises TypeError for unknown keys."""
        return cls(**{**values, "parameters": tuple(values.get("parameters", (0, 0)))})


class Recording:
    """Collects, layer by layer, what becomes a recipe.

    Args:
        experts: their names, in order.
    """

    def __init__(self, experts: Sequence[str]) -> None:
        self._experts = experts
        self._energy: dict[str, list[float]] = {}
        self._made_of: list[Sequence[str]] = []
        self._added = 0

    def add(self, layer: str, stack: Stack, tensors: Iterable[Tensor]) -> None:
        """One layer of the plan, and the tensors it was given, unless no expert changed it."""
        self._made_of.append(stack.made_of)
        if not stack.changes_nothing:
            self._energy[layer] = stack.energies
            self._added += sum(tensor.numel() for tensor in tensors)

    def recipe(self, parameters: int) -> Recipe:
        """Of a pretrained model with so many parameters."""
        known = [made_of for made_of in self._made_of if made_of]  # nothing is known of a layer that was left alone
        sources = {name: _hash(of[number] for of in known) for number, name in enumerate(self._experts)}
        return Recipe(self._energy, sources, (parameters, parameters + self._added))


def _hash(digests: Iterable[str]) -> str:
    return xxhash.xxh3_128("/".join(digests).encode()).hexdigest()


def model_card(recipe: Recipe, experts: Sequence[str], options: Mapping[str, Any], base: str | None, needs: str) -> str:
    """The README.md of a checkpoint.

    Args:
        base: the pretrained model's name on a hub.
        needs: what loading it needs.
    """
    data = ModelCardData(library_name="transformers", tags=["fusion-bench", "smile", "merge"], base_model=base)
    before, after = recipe.parameters
    kept = [value for values in recipe.energy.values() for value in values]
    lines = [
        "---", data.to_yaml(), "---", MARK, "",
        "# A SMILE model", "",
        "One model with the experts of several, by zero-shot sparse mixture of low-rank experts (arXiv 2408.10174), "
        "built with `fusion_bench_smile` from the pretrained model and its fine-tuned variants, without data or "
        "training.", "",
        f"To load it: {needs}.", "",
        f"- parameters: {after:,}, {after / max(before, 1):.3f} times the pretrained model's {before:,}",
        f"- experts: {len(experts)}; upscaled layers: {len(recipe.energy)}",
    ]  # fmt: skip
    if kept:
        lines.append(f"- energy ‖ΔW‖² kept: at least {min(kept):.4f}, median {statistics.median(kept):.4f}")
    lines.append(f"- versions: {', '.join(f'{name} {number}' for name, number in recipe.versions.items())}")
    lines += ["", "| expert | hash of its weights |", "|---|---|"]
    lines += [f"| {name} | `{recipe.sources.get(name, 'unknown')}` |" for name in experts]
    lines += ["", "| option | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in options.items()), ""]
    return "\n".join(lines)
