"""Other methods for the same experts: those of the framework, and two that are written here from their papers.

- TSV-M, TSV-C: *Task Singular Vectors*, arXiv 2412.00081. The framework has the first. The second keeps the leading n/T
  singular triples of each of T deltas of rank n, and needs to know the task: it is oracle routing at that rank.
- MASS: *MoErging through Adaptive Subspace Selection*, arXiv 2504.05342.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from fusion_bench import BaseModelPool
from fusion_bench.method import ISO_C_Merge, TaskSingularVectorMerging
from fusion_bench.method.dare import DareTaskArithmetic
from fusion_bench.method.emr_merging import EMRMerging
from torch import Tensor, nn

Experts = Mapping[str, nn.Module]
Encode = Callable[[nn.Module, Tensor], object]  # calls a model with inputs


# merging methods of the framework, with their default options
MERGING: dict[str, Callable[[], Any]] = {
    "TSV-M": lambda: TaskSingularVectorMerging(alpha=1.0),
    "Iso-C": lambda: ISO_C_Merge(scaling_factor=1.0),
    "DARE": lambda: DareTaskArithmetic(0.3, 0.5, only_on_linear_weights=False),
}
MOST_MODELS = 32  # that MASS keeps


def merged(pretrained: nn.Module, experts: Experts, method: str) -> nn.Module:
    """The model that one of `MERGING` makes."""
    pool = _copied_pool(pretrained, experts)
    with redirect_stdout(io.StringIO()):
        return MERGING[method]().run(pool).eval()


def _copied_pool(pretrained: nn.Module, experts: Experts) -> BaseModelPool:
    """A pool of copies: the framework's methods may change the models that they get."""
    return BaseModelPool({"_pretrained_": deepcopy(pretrained), **{n: deepcopy(m) for n, m in experts.items()}})


def emr(pretrained: nn.Module, experts: Experts) -> dict[str, nn.Module]:
    """The model of EMR-Merging for each task, which must be known: an elected vector, masked and rescaled."""
    pool = _copied_pool(pretrained, experts)
    model = EMRMerging().run(pool)
    models = {}
    for name in experts:
        model.set_task(name)
        models[name] = deepcopy(model.backbone).eval()
    return models


@dataclass
class Mass:
    """MASS for one backbone with T experts.

    The first pass is that of the model that TSV-M makes of all experts, with n/T singular triples of each. The residual
    ‖z − VᵢVᵢᵀz‖ of the hidden state z before one layer, as the mean over the tokens, scores expert i. The experts with
    at least `threshold` in the softmax of the negative residuals serve the input, by TSV-M of them alone.

    Attributes:
        pretrained: The backbone.
        experts: Name → fine-tuned backbone.
        layer: The layer whose input is scored; `choose_layer` sets the best one.
    """

    pretrained: nn.Module
    experts: Experts
    threshold: float = 0.2
    layer: str = ""
    factors: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = field(default_factory=dict)
    models: dict[tuple[int, ...], nn.Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, module in self.pretrained.named_modules():
            if isinstance(module, nn.Linear):
                tuned = [cast(nn.Linear, expert.get_submodule(name)).weight for expert in self.experts.values()]
                self.factors[name] = [self._truncated(weight.detach() - module.weight) for weight in tuned]

    def _truncated(self, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        kept = len(s) // len(self.experts)
        return u[:, :kept], s[:kept], vh[:kept]

    @property
    def num_bytes(self) -> int:
        """The bytes of the pretrained model and all factors, in float32."""
        values = sum(p.numel() for p in self.pretrained.parameters())
        values += sum(part.numel() for triples in self.factors.values() for triple in triples for part in triple)
        return 4 * values

    @torch.no_grad()
    def model(self, chosen: tuple[int, ...]) -> nn.Module:
        """TSV-M of some experts, by index; the last ones are kept."""
        if chosen not in self.models:
            if len(self.models) >= MOST_MODELS:
                del self.models[next(key for key in self.models if len(key) < len(self.experts))]
            model = deepcopy(self.pretrained)
            for name, triples in self.factors.items():
                weight = cast(nn.Linear, model.get_submodule(name)).weight
                weight += merge_triples([triples[index] for index in chosen])
            self.models[chosen] = model.eval()
        return self.models[chosen]

    def residuals(self, encode: Encode, inputs: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Layer → the residual of each expert for each input, (B, T)."""
        model = self.model(tuple(range(len(self.experts))))
        hidden: dict[str, Tensor] = {}

        def record(name: str) -> Callable[..., None]:
            return lambda module, args: hidden.update({name: args[0].mean(dim=1)})

        handles = [model.get_submodule(name).register_forward_pre_hook(record(name)) for name in layers]
        encode(model, inputs)
        for handle in handles:
            handle.remove()
        found = {}
        for name in layers:
            z = hidden[name]
            found[name] = torch.stack([(z - z @ vh.T @ vh).norm(dim=-1) for _, _, vh in self.factors[name]], dim=-1)
        return found

    def choose_layer(self, encode: Encode, inputs: Mapping[str, Tensor]) -> float:
        """Take the layer that names the task of most inputs right; returns the share in percent."""
        names, right = list(self.factors), dict.fromkeys(self.factors, 0.0)
        for index, name in enumerate(self.experts):
            for layer, rest in self.residuals(encode, inputs[name], names).items():
                right[layer] += 100 * (rest.argmin(dim=-1) == index).float().mean().item() / len(self.experts)
        self.layer = max(right, key=right.__getitem__)
        return right[self.layer]

    def choose(self, encode: Encode, inputs: Tensor) -> tuple[list[tuple[int, ...]], Tensor]:
        """For each input the experts that serve it, and the best one, (B,)."""
        weights = (-self.residuals(encode, inputs, [self.layer])[self.layer]).softmax(dim=-1)
        best = weights.argmax(dim=-1)
        chosen = [
            tuple(index for index, weight in enumerate(row) if weight >= self.threshold or index == first)
            for row, first in zip(weights.tolist(), best.tolist(), strict=True)
        ]
        return chosen, best


def merge_triples(triples: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """TSV-M of singular triples: U⊥ S V⊥ᵀ, (out, in), with orthogonal left and right vectors of all experts."""
    u, s, v = (torch.cat(parts, dim=-1) for parts in zip(*((u, s, vh.T) for u, s, vh in triples), strict=True))
    return nearest_orthogonal(u) @ torch.diag(s) @ nearest_orthogonal(v).T


def nearest_orthogonal(vectors: Tensor) -> Tensor:
    """The orthogonal factor of the polar decomposition of vectors (n, r)."""
    p, _, qh = torch.linalg.svd(vectors, full_matrices=False)
    return p @ qh
