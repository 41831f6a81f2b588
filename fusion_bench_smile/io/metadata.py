"""The metadata of an upscaled model: one object that layers, router, checkpoint and model card read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version as installed_version
from typing import Any

import xxhash
from torch import nn

from ..config import SmileConfig
from ..exceptions import CheckpointError, ConfigError
from ..nn.attachment import router_of
from ..nn.attention import split_names
from ..nn.layout import ExpertLayout
from ..nn.prototypes import Prototypes
from ..nn.routed import count_parameters, routed_layers
from .names import check_expert_names
from .schema import LayerValues, RecipeValues, RouterValues, parse_section
from .text import shortened

FORMAT_VERSION = 3
NUM_LARGEST = 5  # tensors that are named
PACKAGES = ("fusion-bench-smile", "torch", "transformers")
LOADING = "pip install fusion-bench-smile, and import fusion_bench_smile before from_pretrained"
# format 3 repeats these options in the description of every layer
REPEATED_OPTIONS = {
    "top_k": "top_k", "execution": "execution", "storage": "storage", "shared_router": "routing_use_diff",
}  # fmt: skip


@dataclass(frozen=True)
class ExpertChange:
    """How far one expert is from the pretrained model, in energy ‖Δ‖², and how much of that the upscaled model lacks.

    A tensor counts once for the upscaled layers that hold it, and once for all others. Averaged tensors do not count.
    """

    energy: float  # of all floating-point tensors
    unused: float = 0.0  # of those that the upscaled model holds as pretrained
    largest: dict[str, float] = field(default_factory=dict)  # the largest of the unused, name → energy


@dataclass(frozen=True)
class Provenance:
    """What an upscaled model was made of: energies ‖ΔW‖², digests of the experts, parameters, package versions."""

    energy: dict[str, list[float]] = field(default_factory=dict)  # layer → the share that each expert's rank keeps
    sources: dict[str, str] = field(default_factory=dict)  # expert → digest of its weights in the upscaled layers
    parameters: tuple[int, int] = (0, 0)  # of the pretrained model and of the upscaled one
    versions: dict[str, str] = field(default_factory=lambda: {name: installed_version(name) for name in PACKAGES})
    changes: dict[str, ExpertChange] = field(default_factory=dict)  # of each expert; older checkpoints lack them

    @property
    def unused_share(self) -> float | None:
        """The share of the experts' total change, Σ‖Δ‖², that the model does not use; None if it is unknown."""
        if not self.changes or self.changes.keys() != self.sources.keys():
            return None
        return sum(change.unused for change in self.changes.values()) / self._total_change

    @property
    def largest_unused(self) -> dict[str, float]:
        """Names of the largest changed tensors that the model does not use → their share of the total change."""
        totals: Counter[str] = Counter()
        for change in self.changes.values():
            totals.update(change.largest)
        return {name: energy / self._total_change for name, energy in totals.most_common(NUM_LARGEST)}

    @property
    def _total_change(self) -> float:
        return sum(change.energy for change in self.changes.values()) or 1.0

    def describe_unused(self) -> str:
        """The unused share of the experts' change and its largest tensors as text; empty if there is none."""
        if not self.unused_share:
            return ""
        names = ", ".join(f"{name} ({_percent(share)})" for name, share in self.largest_unused.items())
        return f"{_percent(self.unused_share)} of the experts' total change ‖Δ‖² (largest: {names})"

    @classmethod
    def of_layers(
        cls, experts: Sequence[str], energy: Mapping[str, Sequence[float]], digests: Iterable[Sequence[str]],
        parameters: tuple[int, int],
    ) -> Provenance:  # fmt: skip
        """The provenance of a model from the energies and the experts' digests (none if unchanged) of its layers."""
        by_layer = [layer_digests for layer_digests in digests if layer_digests]
        joined = {name: "/".join(layer[index] for layer in by_layer) for index, name in enumerate(experts)}
        sources = {name: xxhash.xxh3_128(text.encode()).hexdigest() for name, text in joined.items()}
        rounded = {name: [round(share, 6) for share in shares] for name, shares in energy.items()}
        return cls(rounded, sources, parameters)


@dataclass(frozen=True)
class SmileMetadata:
    """The description of an upscaled model. Raises PlanError for an expert's name that cannot be that of a folder."""

    config: SmileConfig  # the options it was built with
    experts: tuple[str, ...]  # the experts' names, in the order of the layouts
    layouts: dict[str, ExpertLayout]  # layer → the ranks of the experts in it
    provenance: Provenance = field(default_factory=Provenance)
    prototypes: tuple[int, int] | None = None  # the number of features and of directions of the router's prototypes
    scored_rows: int | None = None  # router rows of each expert that the prototypes' features are computed with
    loading: str = LOADING  # what loading the checkpoint requires, for people
    split_attention: tuple[str, ...] = ()  # the attention modules that are split, see `split_attention`

    def __post_init__(self) -> None:
        check_expert_names(self.experts)

    def describes_same_weights(self, other: SmileMetadata) -> bool:
        """Whether a model with this metadata can hold the tensors of one with the other; the options may differ."""
        return (self.experts, self.layouts, self.provenance) == (other.experts, other.layouts, other.provenance)

    def to_dict(self) -> dict[str, Any]:
        """JSON values in checkpoint format 3."""
        calibrated = Prototypes.size(len(self.experts), *self.prototypes) if self.prototypes else 0
        router = {"prototypes": list(self.prototypes) if self.prototypes else None, "scored_rows": self.scored_rows}
        return {
            "layers": {name: self._layer_dict(layout) for name, layout in self.layouts.items()},
            "experts": list(self.experts), "options": json.loads(json.dumps(self.config.to_dict())),
            "recipe": {
                "energy": self.provenance.energy, "sources": self.provenance.sources,
                "parameters": list(self.provenance.parameters), "calibrated": calibrated,
                "versions": self.provenance.versions, **_changes_dict(self.provenance),
            },
            "router": {} if self.config.routing_scope == "token" else router,
            "format_version": FORMAT_VERSION, "needs": self.loading,
            **({"split_attention": list(self.split_attention)} if self.split_attention else {}),
        }  # fmt: skip

    def _layer_dict(self, layout: ExpertLayout) -> dict[str, Any]:
        return {
            "ranks": list(layout.ranks), "gate_ranks": list(layout.gate_ranks), "top_k": self.config.top_k,
            "shared_router": layout.shared_router, "expert_bias": layout.expert_bias,
            "execution": self.config.execution, "storage": self.config.storage,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "this checkpoint") -> SmileMetadata:
        """Read checkpoint format 3; CheckpointError for another format, or if a layer contradicts the options."""
        version = values.get("format_version", 0)
        if version != FORMAT_VERSION:
            newer = isinstance(version, int) and version > FORMAT_VERSION
            hint = "upgrade fusion-bench-smile" if newer else "build the model again"
            found = f"{where} has format version {shortened(repr(version))}"
            raise CheckpointError(f"{found}, this package reads {FORMAT_VERSION}: {hint}")
        section = parse_section(values, where)
        if section.own or (section.router and section.router.baseline):
            removed = "expert_parameters" if section.own else "noise_baseline"
            raise CheckpointError(f"{where} was saved with {removed}, which was removed: build the model again")
        try:
            config = SmileConfig.from_checkpoint(section.options)
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"{where}: {shortened(error)}; the options were edited: build it again") from None
        if config.top_k > len(section.experts):
            problem = f"top_k={config.top_k} is more than its {len(section.experts)} experts"
            raise CheckpointError(f"{where}: {problem}; the options were edited: build the model again")
        for name, layer in section.layers.items():
            _check_repeated_options(name, layer, config, where)
        router = section.router or RouterValues()
        return cls(
            config, tuple(section.experts), {name: _layout(layer) for name, layer in section.layers.items()},
            _provenance(section.recipe or RecipeValues()),
            None if router.prototypes is None else (router.prototypes[0], router.prototypes[1]), router.scored_rows,
            section.needs or LOADING, tuple(section.split_attention),
        )  # fmt: skip


def _layout(layer: LayerValues) -> ExpertLayout:
    return ExpertLayout(tuple(layer.ranks), tuple(layer.gate_ranks), layer.shared_router, layer.expert_bias)


def _provenance(recipe: RecipeValues) -> Provenance:
    changes = {name: ExpertChange(**change.model_dump()) for name, change in recipe.changes.items()}
    parameters = (recipe.parameters[0], recipe.parameters[1])
    return Provenance(recipe.energy, recipe.sources, parameters, recipe.versions, changes)


def describe_model(
    model: nn.Module, config: SmileConfig, experts: Sequence[str], provenance: Provenance
) -> SmileMetadata:
    """The metadata of a complete upscaled model, of which layouts and router are read and parameters counted."""
    router = router_of(model)
    prototypes = None if router is None else router.prototypes
    return SmileMetadata(
        config, tuple(experts), layouts={name: layer.layout for name, layer in routed_layers(model).items()},
        provenance=replace(provenance, parameters=(provenance.parameters[0], count_parameters(model))),
        prototypes=None if prototypes is None else (len(prototypes.scale), len(prototypes.variances)),
        scored_rows=None if prototypes is None else prototypes.rows,
        split_attention=tuple(split_names(model)),
    )  # fmt: skip


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _changes_dict(provenance: Provenance) -> dict[str, Any]:
    """The changes of the experts for `recipe`, under a key that is absent where they are unknown."""
    changes = {name: asdict(change) for name, change in provenance.changes.items()}
    return {"changes": changes} if changes else {}


def _check_repeated_options(name: str, layer: LayerValues, config: SmileConfig, where: str) -> None:
    for key, option in REPEATED_OPTIONS.items():
        if (repeated := getattr(layer, key)) != (value := getattr(config, option)):
            problem = (
                f"{key} is {shortened(repr(repeated))} in {name} and {value!r} in the options; the file was edited"
            )
            raise CheckpointError(f"{where}: {problem}: build the model again")
