"""One layer's experts side by side, as its routed layer stores them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .config import SmileConfig
from .layers import ROWS, SmileLayout
from .parts import ExpertPart


class Stack:
    """What the experts add to one layer, each part copied to its place as soon as it is made.

    Parts that are kept until all are there, and joined then, are in memory twice.

    Args:
        experts: about how many there will be: room is made for as many of the first one's size.
    """

    def __init__(self, experts: int, *parts: ExpertPart) -> None:
        self._experts = experts
        self._room: dict[str, Tensor] = {}
        self._filled = dict.fromkeys(ROWS, 0)
        self._biases: list[Tensor | None] = []
        self.ranks: list[int] = []
        self.gate_ranks: list[int] = []
        self.energies: list[float] = []
        self.made_of: list[str] = []
        for part in parts:
            self.add(part)

    @property
    def changes_nothing(self) -> bool:
        return not any(self.ranks) and all(bias is None for bias in self._biases)

    def add(self, part: ExpertPart) -> None:
        """The next expert's part, copied."""
        self.ranks.append(part.rank)
        self.gate_ranks.append(part.gate_rank)
        self.energies.append(part.energy)
        self.made_of.append(part.made_of)
        self._biases.append(part.bias)
        for name in ROWS:
            value = getattr(part, name)
            if value is not None:
                self._append(name, value[None] if name == "dense" else value)

    def extend(self, other: Stack) -> None:
        """The next experts, copied from a stack of theirs; it may be on another device."""
        self.ranks += other.ranks
        self.gate_ranks += other.gate_ranks
        self.energies += other.energies
        self.made_of += other.made_of
        self._biases += other._biases
        for name in other._room:
            self._append(name, other._tensor(name))

    def _append(self, name: str, value: Tensor) -> None:
        start = self._filled[name]
        end = start + len(value)
        if start == end:
            return
        if name not in self._room or end > len(self._room[name]):
            larger = value.new_empty(max(end, len(value) * self._experts), *value.shape[1:])
            if start:
                larger[:start] = self._tensor(name)
            self._room[name] = larger
        self._room[name][start:end] = value
        self._filled[name] = end

    def _tensor(self, name: str) -> Tensor:
        room, filled = self._room[name], self._filled[name]
        return room if filled == len(room) else room[:filled].clone()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_room": {name: self._tensor(name) for name in self._room}}  # without what is spare

    def layout(self, config: SmileConfig) -> SmileLayout:
        return SmileLayout(
            ranks=tuple(self.ranks),
            gate_ranks=tuple(self.gate_ranks),
            top_k=config.top_k,
            shared_router=config.routing_use_diff,
            expert_bias=any(bias is not None for bias in self._biases),
            execution=config.execution,
            score=config.routing_score,
            storage=config.storage,
        )

    def energies_of_directions(self) -> tuple[tuple[float, ...], ...]:
        """For each expert the squared singular values of its directions, in descending order."""
        if "up" not in self._room:
            return ((),) * len(self.ranks)
        squares = self._tensor("up").double().square().sum(dim=1).cpu()
        return tuple(tuple(of_expert.tolist()) for of_expert in squares.split([max(rank, 0) for rank in self.ranks]))

    def truncated(self, ranks: Sequence[int], shared: bool) -> Stack:
        """A copy with these ranks, none larger than before, nor smaller than its expert's shared router rows."""
        layout = SmileLayout(tuple(self.ranks), tuple(self.gate_ranks), shared_router=shared)
        sizes = {"gate": layout.gate_ranks, "down": layout.down_rows, "up": layout.low_ranks}
        rows: dict[str, Any] = {
            name: self._tensor(name).split(list(sizes[name])) for name in sizes if name in self._room
        }
        smaller = Stack(len(ranks))
        for expert, rank in enumerate(ranks):
            squares = rows["up"][expert].double().square().sum(dim=1) if "up" in rows else torch.zeros(1)
            kept = float(squares[:rank].sum() / squares.sum()) if squares.sum() > 0 else 1.0
            keep = {
                "gate": layout.gate_ranks[expert],
                "down": rank - min(rank, layout.shared_ranks[expert]),
                "up": rank,
            }
            parts = {name: rows[name][expert][: keep[name]] if name in rows else None for name in sizes}
            smaller.add(
                ExpertPart(
                    rank=rank,
                    gate_rank=self.gate_ranks[expert],
                    bias=self._biases[expert],
                    energy=self.energies[expert] * kept,
                    made_of=self.made_of[expert],
                    **parts,
                )
            )
        return smaller

    @property
    def bias_parameters(self) -> int:
        """What the experts' biases take: a row for each expert, if any has one."""
        some = next((bias for bias in self._biases if bias is not None), None)
        return 0 if some is None else some.numel() * len(self._biases)

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """What the routed layer holds beside weight and bias, each name only where it is needed."""
        values = {name: self._tensor(name) for name in self._room}
        some = next((bias for bias in self._biases if bias is not None), None)
        if some is not None:
            rows = [torch.zeros_like(some) if bias is None else bias for bias in self._biases]
            values["expert_bias"] = torch.stack([row.to(device) for row in rows])
        return {name: value.to(device) for name, value in values.items()}
