"""What is known of an expert before its weights are read: a LoRA adapter declares its ranks."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..io import Source


@dataclass(frozen=True)
class ExpertBounds:
    """Upper bounds of one expert's deltas."""

    ranks: Mapping[str, int] = field(default_factory=dict)  # layer → rank; a layer of unknown rank is missing
    kept_biases: frozenset[str] = frozenset()  # the layers with the pretrained bias
    nbytes: int | None = None  # the size of its files, if they hold less than a whole model


def expert_bounds(source: Source | None, layers: Iterable[str]) -> ExpertBounds:
    """The bounds of an expert in some layers; none for an expert that has to be loaded first."""
    if source is None:
        return ExpertBounds()
    ranks = {layer: source.max_rank(f"{layer}.weight") for layer in layers}
    known = {layer: rank for layer, rank in ranks.items() if rank is not None}
    shapes = source.shapes()
    biases = {layer for layer in ranks if f"{layer}.bias" in shapes and source.is_pretrained(f"{layer}.bias")}
    return ExpertBounds(known, frozenset(biases), source.nbytes())
