"""Routed layers: a linear layer, and its kin, with a router and low-rank experts beside it. Imports torch alone.

Three ways to compute the same thing:

- *masked*: every token with every expert, times its routing weight, which is zero for most. Nothing depends on how the
  tokens were routed: no loop over data, no host synchronisation, so it can be compiled and exported.
- *grouped*: the tokens of each expert are gathered, and computed with that expert alone.
- *merged*: where whole inputs were chosen for beforehand, those of each expert are gathered, and computed with the sum
  of the plain weight and that expert's delta: the plain product of all tokens is saved, for making the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DENSE = -1
ROWS = ("gate", "down", "up", "dense")  # what the experts' deltas are stored as
ROUTED = (*ROWS, *(f"{name}_scale" for name in ROWS), "expert_bias")
# On a CPU, handling an expert's tokens apart costs as much as these multiply-adds, and several times as much where what
# it gives must be weighted; few tokens take as long as SAME_TIME of them, because the weights have to be read.
SAVED_FROM, SAVED_FROM_WEIGHTED = 10_000_000, 40_000_000
SAME_TIME = 8
Execution = Literal["auto", "grouped", "masked", "merged"]
Score = Literal["norm", "weighted", "relative", "dual", "output"]
SHARES_OF_ENERGY = ("relative", "dual")  # of several layers, these are multiplied
RIDGE = 0.03  # of the router rows' products with each other, which are 1 for each with itself
Storage = Literal["same", "int8"]
See = Callable[[Tensor, Tensor, Tensor], None]
Groups = tuple[int, list[tuple[int, Tensor]]]  # number of inputs; each expert that serves some, and which ones (n,)


@dataclass(frozen=True)
class SmileLayout:
    """How the routed part of one layer is stored.

    Attributes:
        ranks: for each expert its rank; 0 where it left this weight unchanged, −1 where its delta is kept dense.
        gate_ranks: for each expert the number of router rows; 0 gives it the score 0.
        top_k: experts kept for each token.
        shared_router: the router rows are an expert's own leading directions; otherwise they are others.
        expert_bias: some expert changed the bias.
        execution: how the layer is computed; see `Routed.grouped_pays`.
        score: how well an expert fits a token; see `Routed.scores`.
        storage: of the experts' rows: in the weight's dtype, or as int8 with a scale for each row.
    """

    ranks: tuple[int, ...]
    gate_ranks: tuple[int, ...]
    top_k: int = 1
    shared_router: bool = True
    expert_bias: bool = False
    execution: Execution = "auto"
    score: Score = "norm"
    storage: Storage = "same"

    @property
    def num_experts(self) -> int:
        return len(self.ranks)

    @cached_property
    def low_ranks(self) -> tuple[int, ...]:
        return tuple(max(rank, 0) for rank in self.ranks)

    @cached_property
    def shared_ranks(self) -> tuple[int, ...]:
        """For each expert how many of its directions are router rows."""
        if not self.shared_router:
            return (0,) * self.num_experts
        return tuple(min(k, g) for k, g in zip(self.low_ranks, self.gate_ranks, strict=True))

    @cached_property
    def down_rows(self) -> tuple[int, ...]:
        """For each expert the directions that are no router rows."""
        return tuple(k - s for k, s in zip(self.low_ranks, self.shared_ranks, strict=True))

    @cached_property
    def dense_experts(self) -> tuple[int, ...]:
        return tuple(i for i, rank in enumerate(self.ranks) if rank == DENSE)

    @cached_property
    def dense_rows(self) -> tuple[int, ...]:
        """For each expert 1 if its delta is kept dense, else 0."""
        return tuple(int(rank == DENSE) for rank in self.ranks)

    def to_dict(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SmileLayout:
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)


class InputChoice(Protocol):
    """Who chooses the experts of whole inputs; see `scopes.InputRouter`."""

    def known(self, layer: Routed, rows: int) -> Tensor | None:
        """The weight of each expert for each of so many inputs, (rows, T), if it is known before the layer is run."""

    def weights(self, layer: Routed, x: Tensor, out: Tensor) -> Tensor | None:
        """The weight of each expert for each input of x: (inputs, T); None where the layer stays the plain one."""

    def groups(self, weights: Tensor) -> Groups | None:
        """The inputs by the experts that serve them; None where that isn't to be waited for."""


class Routed(nn.Module):
    """y = W₀x + b₀ + Σᵢ wᵢ(x)·(ΔWᵢ x + Δbᵢ), with wᵢ from the router (arXiv 2408.10174, section 4).

    A routed layer is the plain layer of its kind, with the same settings, the same `weight` and `bias` under their old
    names, and beside them, each only where it is needed, and expert after expert:

    - `gate` (Σ gate_ranks, in): the router rows; with a shared router each expert's leading right singular vectors;
    - `down` (Σ down_rows, in): the right singular vectors that are no router rows;
    - `up` (Σ ranks, out): the left singular vectors times the singular values, one a row;
    - `dense` (D, out, in): the deltas of the dense experts;
    - `expert_bias` (T, out): the bias deltas.

    Rows that are stored as int8 have beside them what each is multiplied with, e.g. `gate_scale` (Σ gate_ranks, 1);
    `rows` gives them as they are computed with.

    out and in are the sides of the weight as a matrix (`matrix`); a token is what that matrix maps.
    """

    layout: SmileLayout
    weight: Tensor
    gate: Tensor | None
    down: Tensor | None
    up: Tensor | None
    dense: Tensor | None
    expert_bias: Tensor | None
    input_choice: InputChoice | None = None  # None: every token has its own
    see: See | None = None  # told the scores, choices and weights of every call, while somebody watches

    @classmethod
    def around(cls, plain: nn.Module, layout: SmileLayout, device: torch.device | str | None = None) -> Routed:
        """A routed layer with `plain`'s own parameters and settings; its experts are zero, so it computes the same.

        Args:
            device: of the routed parameters; None puts them where `plain` is.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.__dict__.update({key: copy(value) for key, value in plain.__dict__.items()})
        layer.add_experts(layout, device)
        return layer

    def without_experts(self, plain: type[nn.Module]) -> nn.Module:
        """The plain layer of the kind `plain`, with this one's own parameters and settings."""
        layer = plain.__new__(plain)
        nn.Module.__init__(layer)
        own = ("layout", "input_choice", "see")
        layer.__dict__.update({key: copy(value) for key, value in self.__dict__.items() if key not in own})
        for name in ROUTED:
            layer._parameters.pop(name)
        return layer

    def add_experts(self, layout: SmileLayout, device: torch.device | str | None = None) -> None:
        """Register the routed parameters, all zero."""
        self.layout = layout
        out, columns = self.matrix(self.weight).shape
        shapes = {
            "gate": (sum(layout.gate_ranks), columns),
            "down": (sum(layout.down_rows), columns),
            "up": (sum(layout.low_ranks), out),
            "dense": (len(layout.dense_experts), out, columns),
            "expert_bias": (layout.num_experts if layout.expert_bias else 0, out),
        }
        device, dtype, small = device or self.weight.device, self.weight.dtype, layout.storage == "int8"
        for name, shape in shapes.items():
            as_int8 = small and name in ROWS
            self._register(name, shape, torch.int8 if as_int8 else dtype, device)
            if name in ROWS:
                self._register(f"{name}_scale", (*shape[:-1], 1) if as_int8 else (0,), dtype, device)

    def _register(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> None:
        """A parameter of zeros; None where it is empty."""
        zeros = None if 0 in shape else torch.zeros(shape, device=device, dtype=dtype)
        self.register_parameter(name, None if zeros is None else nn.Parameter(zeros, dtype.is_floating_point))

    def rows(self, name: str, of: Sequence[int] | None = None, expert: int = 0) -> Tensor | None:
        """One of `gate`, `down`, `up` and `dense` as it is computed with, in the weight's dtype; None if there is none.

        Args:
            of: how many rows each expert has, to get those of one `expert` alone.
        """
        stored: Tensor | None = getattr(self, name)
        if stored is None or (of is not None and not of[expert]):
            return None
        part = slice(None) if of is None else slice(sum(of[:expert]), sum(of[: expert + 1]))
        mine = stored if of is None else stored[part]
        return mine if mine.dtype != torch.int8 else mine.to(self.weight.dtype) * getattr(self, f"{name}_scale")[part]

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        """The weight as a matrix (out, in); a view, in which it can be changed."""
        return weight

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What a layer of this kind makes of x, with some weight and bias: (…, out)."""
        return F.linear(x, weight, bias)

    def project(self, x: Tensor, rows: Tensor) -> Tensor:
        """Every token of x times rows (r, in): (…, r)."""
        return F.linear(x, rows)

    def route(self, x: Tensor) -> Tensor:
        """What the plain layer gives, with the experts' part added: (…, out)."""
        choice = self.input_choice
        if choice is not None and self.layout.execution == "merged":
            weights = choice.known(self, len(x))
            groups = None if weights is None else choice.groups(weights)
            if groups is not None:
                return self._merged(x, groups)
        out = self.plain(x, *self._with_delta(None))
        if choice is not None:
            weights = choice.weights(self, x, out)
            return out if weights is None else self._by_input(x, out, weights, choice.groups(weights))
        projected = self._projected(x)
        scores = None if projected is None else self._scores(x, out, projected)
        if scores is not None and self.see is not None:
            self.see(scores.detach(), *self.chosen(scores.detach()))
        if scores is not None and projected is not None and self.grouped_pays(x):
            return self._grouped(x, out, projected, scores)
        return self._masked(x, out, projected, self._weights(out, scores))

    def grouped_pays(self, x: Tensor) -> bool:
        """Whether the layer is computed expert by expert for an input (…, in).

        ``"auto"``: on the CPU, where the products saved outweigh handling each expert's tokens apart. Elsewhere the
        sizes of the groups would have to be waited for, and while compiling or exporting they aren't known.
        """
        layout = self.layout
        if layout.execution != "auto":
            return layout.execution == "grouped" and layout.top_k < layout.num_experts
        if x.device.type != "cpu" or torch.compiler.is_compiling() or layout.top_k >= layout.num_experts:
            return False
        out, columns = self.matrix(self.weight).shape
        tokens = x.numel() // columns
        dense = len(layout.dense_experts) * columns * out
        low = sum(layout.down_rows) * columns + sum(layout.low_ranks) * out
        saved = (dense + low) * (1 - layout.top_k / layout.num_experts) * max(tokens, SAME_TIME)
        each = SAVED_FROM if layout.top_k == 1 else SAVED_FROM_WEIGHTED
        return saved > each * min(layout.num_experts, tokens * layout.top_k)

    def scores(self, x: Tensor, out: Tensor | None = None, kind: Score | None = None) -> Tensor | None:
        """How well each expert fits each token of x: (…, T), in float32 or, for float64 input, float64.

        None where the layer has no router: it has one expert, or only biases were changed. `out` is what the plain
        layer makes of x, which the score ``"output"`` needs. With pᵢⱼ = vᵢⱼᵀx, the projections on an expert's router
        rows, `kind`, by default the layout's `score`, is one of

        - ``"norm"``, the paper's: (Σⱼ pᵢⱼ²)^½;
        - ``"weighted"``: (Σⱼ (sᵢⱼ/sᵢ₁)² pᵢⱼ²)^½, by relative singular values, of the rows that the expert has itself;
        - ``"relative"``: Σⱼ pᵢⱼ² / ‖x‖², the share of the token's energy, the same for large and small tokens;
        - ``"dual"``: the same of cᵢⱼ, the coefficients of x in the dual basis of all experts' rows (`_coefficients`);
        - ``"output"``: (Σⱼ sᵢⱼ² pᵢⱼ²)^½ / ‖W₀x + b₀‖, what the expert would change of the layer's output.
        """
        projected = self._projected(x)
        return None if projected is None else self._scores(x, x if out is None else out, projected, kind)

    def energies(self, x: Tensor) -> Tensor | None:
        """What each expert's router rows capture of each token's energy ‖x‖²: (…, 2·T), None without a router.

        First the score ``"dual"`` of all experts, then Σⱼ sᵢⱼ² pᵢⱼ² / ‖x‖².
        """
        projected = self._projected(x)
        if projected is None:
            return None
        weighted = projected * self.singular_values.to(projected.dtype)
        both = torch.cat([self._norms(self._coefficients(projected)), self._norms(weighted)], dim=-1)
        return both.square() / self.token_energies(x)

    @property
    def singular_values(self) -> Tensor:
        """Of each expert's router rows, zero where the expert doesn't hold that direction: (Σ gate_ranks,), float32."""
        layout = self.layout
        up = self.rows("up")
        own = self.weight.new_zeros(0).float() if up is None else torch.linalg.vector_norm(up.float(), dim=1)
        of_experts = zip(own.split(list(layout.low_ranks)), layout.shared_ranks, layout.gate_ranks, strict=True)
        return torch.cat([F.pad(s[:shared], (0, rows - shared)) for s, shared, rows in of_experts])

    def chosen(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Which experts serve tokens with these scores (…, T), and with what weights: both (…, top_k)."""
        kept, chosen = scores.topk(self.layout.top_k, dim=-1)
        # softmax over the kept scores equals softmax over all, top-k, renormalise
        return chosen, torch.ones_like(kept) if self.layout.top_k == 1 else kept.softmax(dim=-1)

    def _projected(self, x: Tensor) -> Tensor | None:
        """x on the router rows: (…, Σ gate_ranks), in at least float32: rounded scores choose wrong experts."""
        gate = self.rows("gate")
        if gate is None:
            return None
        dtype = torch.promote_types(x.dtype, torch.float32)
        if not torch.is_autocast_enabled(x.device.type):
            return self.project(x.to(dtype), gate.to(dtype))
        with torch.autocast(x.device.type, enabled=False):
            return self.project(x.to(dtype), gate.to(dtype))

    def _scores(self, x: Tensor, out: Tensor, projected: Tensor, kind: Score | None = None) -> Tensor:
        kind = kind or self.layout.score
        if kind == "norm":
            return self._norms(projected)
        if kind in SHARES_OF_ENERGY:
            parts = projected if kind == "relative" else self._coefficients(projected)
            return self._norms(parts).square() / self.token_energies(x)
        values = self.singular_values.to(projected.dtype)
        if kind == "weighted":
            return self._norms(projected * self._relative(values))
        size = torch.linalg.vector_norm(out, dim=-1, keepdim=True, dtype=projected.dtype)
        return self._norms(projected * values) / size.clamp(min=torch.finfo(size.dtype).tiny)

    def _coefficients(self, projected: Tensor) -> Tensor:
        """What of all experts' router rows G together gives x best: (GGᵀ + ridge)⁻¹ Gx, (…, Σ gate_ranks).

        A direction that several experts have is shared out among them, so that what all inputs have in common, which
        the rows of LoRA's random A all see, tells little; what one expert alone has tells all.
        """
        gate = self.rows("gate")
        assert gate is not None
        gate = gate.to(projected.dtype)
        with torch.autocast(projected.device.type, enabled=False):
            gram = gate @ gate.mT + RIDGE * torch.eye(len(gate), dtype=gate.dtype, device=gate.device)
            return projected @ torch.linalg.inv_ex(gram).inverse  # without waiting for an accelerator

    def _norms(self, projected: Tensor) -> Tensor:
        """The norm of each expert's columns of (…, Σ gate_ranks): (…, T)."""
        gate_ranks = self.layout.gate_ranks
        if _uniform(gate_ranks):
            return torch.linalg.vector_norm(projected.unflatten(-1, (len(gate_ranks), gate_ranks[0])), dim=-1)
        return torch.stack([torch.linalg.vector_norm(p, dim=-1) for p in projected.split(list(gate_ranks), -1)], -1)

    def _relative(self, values: Tensor) -> Tensor:
        """Singular values over their expert's first one: (Σ gate_ranks,)."""
        each = values.split(list(self.layout.gate_ranks))
        return torch.cat([s / s[:1].clamp(min=torch.finfo(s.dtype).tiny) for s in each])

    def token_energies(self, x: Tensor) -> Tensor:
        """‖x‖² of every token: (…, 1), above zero."""
        squares = x.to(torch.promote_types(x.dtype, torch.float32)).square()
        ones = squares.new_ones(1, self.matrix(self.weight).shape[1])
        return self.project(squares, ones).clamp(min=torch.finfo(squares.dtype).tiny)

    def _by_input(self, x: Tensor, out: Tensor, weights: Tensor, groups: Groups | None) -> Tensor:
        """`out` (B, …, out) with the experts' part added, each with a weight (B, T) for all tokens of an input."""
        if groups is None:
            of_tokens = weights.view(len(weights), *[1] * (out.ndim - 2), -1).expand(*out.shape[:-1], -1)
            return self._masked(x, out, self._projected(x), of_tokens)
        for expert, inputs in groups[1]:
            alone = len(inputs) == len(x)
            added = self._expert_output(expert, x if alone else x.index_select(0, inputs))
            if added is None:
                continue
            if self.layout.top_k > 1:
                share = weights[:, expert] if alone else weights[inputs, expert]
                added = added * share.view(-1, *[1] * (out.ndim - 1)).to(added.dtype)
            # an expert that changed the bias alone adds the same to all tokens
            added = added.to(out.dtype).expand(len(inputs), *out.shape[1:])
            out = out + added if alone else out.index_add_(0, inputs, added)
        return out

    def _merged(self, x: Tensor, groups: Groups) -> Tensor:
        """What one expert for each input makes of x (B, …, in): (B, …, out); an input in no group gets none."""
        count = groups[0]
        of_experts: list[tuple[int | None, Tensor]] = [*groups[1]]
        alone = torch.ones(count, dtype=torch.bool, device=x.device)
        for _, inputs in groups[1]:
            alone[inputs] = False
        if sum(len(inputs) for _, inputs in groups[1]) < count:
            of_experts.append((None, alone.nonzero()[:, 0]))
        parts = [
            self.plain(x if len(inputs) == count else x.index_select(0, inputs), *self._with_delta(expert))
            for expert, inputs in of_experts
        ]
        if len(parts) == 1:
            return parts[0]
        out = parts[0].new_empty(count, *parts[0].shape[1:])
        for (_, inputs), part in zip(of_experts, parts, strict=True):
            out.index_copy_(0, inputs, part)
        return out

    def _with_delta(self, expert: int | None) -> tuple[Tensor, Tensor | None]:
        """The plain weight and bias, with one expert's deltas added."""
        weight, bias = self.weight, cast("Tensor | None", self.bias)
        if expert is None:
            return weight, bias
        dense, up = self.rows("dense", self.layout.dense_rows, expert), self.rows("up", self.layout.low_ranks, expert)
        if dense is not None:
            weight = weight.clone()
            self.matrix(weight).add_(dense[0])
        elif up is not None:
            weight = weight.clone()
            self.matrix(weight).addmm_(up.mT, self._directions(expert))
        if self.expert_bias is not None:
            bias = self.expert_bias[expert] if bias is None else bias + self.expert_bias[expert]
        return weight, bias

    def _expert_output(self, expert: int, x: Tensor) -> Tensor | None:
        """What one expert adds to all tokens of x: (…, out); None if nothing."""
        layout = self.layout
        added: Tensor | None = None
        dense, up = self.rows("dense", layout.dense_rows, expert), self.rows("up", layout.low_ranks, expert)
        if dense is not None:
            added = self.project(x, dense[0])
        elif up is not None:
            added = self.project(x, self._directions(expert)) @ up
        if self.expert_bias is None:
            return added
        return self.expert_bias[expert] if added is None else added + self.expert_bias[expert]

    def _directions(self, expert: int) -> Tensor:
        """The right singular vectors of one expert: (rank, in)."""
        layout, shared = self.layout, self.layout.shared_ranks[expert]
        gate = self.rows("gate", layout.gate_ranks, expert) if shared else None
        down = self.rows("down", layout.down_rows, expert)
        if gate is None or down is None:
            return cast(Tensor, down if gate is None else gate[:shared])
        return torch.cat([gate[:shared], down])

    def _masked(self, x: Tensor, out: Tensor, projected: Tensor | None, weights: Tensor) -> Tensor:
        """`out` with every expert's part added, times its weight for each token (…, T)."""
        layout, up, dense = self.layout, self.rows("up"), self.rows("dense")
        if up is not None:
            out = _plus_product(out, self._weighted_directions(x, projected, weights), up)
        weights = weights.to(out.dtype)
        if dense is not None:
            for row, expert in enumerate(layout.dense_experts):
                out = out + weights[..., expert, None] * self.project(x, dense[row])
        if self.expert_bias is not None:
            out = _plus_product(out, weights, self.expert_bias)
        return out

    def _weighted_directions(self, x: Tensor, projected: Tensor | None, weights: Tensor) -> Tensor:
        """x on the directions of all experts, times the experts' weights (…, T): (…, Σ ranks)."""
        layout, parts = self.layout, []
        if projected is not None and any(layout.shared_ranks):
            parts.append((projected, layout.gate_ranks, layout.shared_ranks))
        down = self.rows("down")
        if down is not None:
            parts.append((self.project(x, down), layout.down_rows, layout.down_rows))
        if all(_uniform(sizes) for _, *both in parts for sizes in both):
            blocks = [p.unflatten(-1, (len(sizes), sizes[0]))[..., : keep[0]] for p, sizes, keep in parts]
            return (torch.cat(blocks, dim=-1) * weights[..., None]).flatten(-2)
        split = [_blocks(*part) for part in parts]
        each = zip(weights.split(1, -1), *split, strict=True)
        return torch.cat([block * weight for weight, *of_expert in each for block in of_expert], dim=-1)

    def _grouped(self, x: Tensor, out: Tensor, projected: Tensor, scores: Tensor) -> Tensor:
        """Adds to `out` in place."""
        layout = self.layout
        tokens, summed = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
        chosen, share = (each.flatten() for each in self.chosen(scores))  # (N·top_k,)
        projected = projected.flatten(0, -2) if projected.ndim > 1 else projected[None]
        order = chosen.argsort(stable=True)
        counts = chosen.bincount(minlength=layout.num_experts).tolist()
        token = order if layout.top_k == 1 else order // layout.top_k
        shared = self._shared_columns(projected, token, chosen.index_select(0, order), counts)
        of_experts = zip(order.split(counts), token.split(counts), shared, strict=True)
        for expert, (entry, mine, columns) in enumerate(of_experts):
            added = self._expert(expert, tokens, mine, columns) if len(mine) else None
            if added is not None:
                added = added if layout.top_k == 1 else added * share[entry, None].to(added.dtype)
                summed.index_add_(0, mine, added.to(out.dtype))
        return out

    def _shared_columns(self, projected: Tensor, token: Tensor, expert: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """For each expert its directions that are router rows, of its own tokens: (n, shared rank)."""
        layout = self.layout
        if not _uniform(layout.gate_ranks):
            each = projected.split(list(layout.gate_ranks), dim=-1)
            mine = zip(each, token.split(counts), layout.shared_ranks, strict=True)
            return [columns[:, :rank].index_select(0, tokens) for columns, tokens, rank in mine]
        rows = projected.reshape(-1, layout.gate_ranks[0])  # (N·T, gate rank): one gather for all experts
        gathered = rows.index_select(0, token * layout.num_experts + expert).split(counts)
        return [columns[:, :rank] for columns, rank in zip(gathered, layout.shared_ranks, strict=True)]

    def _expert(self, expert: int, tokens: Tensor, token: Tensor, shared: Tensor) -> Tensor | None:
        """What one expert adds to some tokens, of which `shared` is known: (n, out); None if nothing."""
        layout = self.layout
        bias = None if self.expert_bias is None else self.expert_bias[expert]
        dense, up = self.rows("dense", layout.dense_rows, expert), self.rows("up", layout.low_ranks, expert)
        if dense is not None:
            return F.linear(tokens.index_select(0, token), dense[0], bias)
        if up is not None:
            down = self.rows("down", layout.down_rows, expert)
            joined = shared
            if down is not None:
                joined = torch.cat([shared, F.linear(tokens.index_select(0, token), down)], dim=-1)
            return F.linear(joined.to(up.dtype), up.mT, bias)
        return None if bias is None else bias.expand(len(token), -1)

    def _weights(self, out: Tensor, scores: Tensor | None) -> Tensor:
        """What each expert contributes to each token: (…, T), at most `top_k` of them not zero."""
        experts = self.layout.num_experts
        if scores is None:  # one expert, or changed biases alone: nothing tells the tokens apart
            return out.new_full((*out.shape[:-1], experts), 1 / experts)
        return self.shares(scores)

    def shares(self, scores: Tensor) -> Tensor:
        """What each expert contributes where it has these scores (…, T): (…, T), at most `top_k` of them not zero."""
        if self.layout.top_k >= self.layout.num_experts:
            return scores.softmax(dim=-1)
        chosen, share = self.chosen(scores)
        return torch.zeros_like(scores).scatter(-1, chosen, share)

    def extra_repr(self) -> str:
        layout = self.layout
        return (
            f"{super().extra_repr()}, experts={layout.num_experts}, top_k={layout.top_k}, "
            f"ranks={_short(layout.ranks)}, gate_ranks={_short(layout.gate_ranks)}"
        )


class SmileLinear(Routed, nn.Linear):
    """A routed `torch.nn.Linear`; see `Routed`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        layout: SmileLayout,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device=device, dtype=dtype)
        self.add_experts(layout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in) to (…, out)."""
        return self.route(x)


class SmileConv2d(Routed, nn.Conv2d):
    """A routed `torch.nn.Conv2d`, with its own settings; every output position is a token, routed by its patch.

    A rank-k expert is a convolution to k channels and one of size 1 from there. See `Routed`.
    """

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What a convolution makes of x (…, C, H, W): (…, H', W', out)."""
        return self._conv_forward(x, weight, bias).movedim(-3, -1)

    def project(self, x: Tensor, rows: Tensor) -> Tensor:
        """Every patch of x (…, C, H, W) times rows (r, C·kh·kw): (…, H', W', r)."""
        kernel = rows.unflatten(1, self.weight.shape[1:])
        return self._conv_forward(x, kernel, None).movedim(-3, -1)

    def grouped_pays(self, x: Tensor) -> bool:
        """Never: patches overlap, and gathering them would copy each pixel many times."""
        return False

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, C, H, W) to (…, out, H', W')."""
        return self.route(x).movedim(-1, -3)


def _plus_product(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """out (…, n) + left (…, m) @ right (m, n); may be written into `out`."""
    flat, left = out.reshape(-1, out.shape[-1]), left.reshape(-1, left.shape[-1]).to(right.dtype)
    # autocast brings different dtypes together, and export keeps sizes dynamic, but not in place
    in_place = flat.dtype == right.dtype and not torch.compiler.is_compiling()
    return (flat.addmm_(left, right) if in_place else torch.addmm(flat, left, right)).reshape(out.shape)


def _blocks(columns: Tensor, sizes: Sequence[int], keep: Sequence[int]) -> list[Tensor]:
    """Of each expert's sizes[i] columns the first keep[i]."""
    return [block[..., :kept] for block, kept in zip(columns.split(list(sizes), dim=-1), keep, strict=True)]


def _uniform(sizes: Sequence[int]) -> bool:
    return len(set(sizes)) == 1


def _short(ranks: Sequence[int]) -> str:
    return str(ranks[0]) if _uniform(ranks) else str(list(ranks))
