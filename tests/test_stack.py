"""One layer's experts, side by side."""

from __future__ import annotations

import pickle

import torch
from hypothesis import given
from hypothesis import strategies as st

from fusion_bench_smile.config import SmileConfig
from fusion_bench_smile.layers import DENSE
from fusion_bench_smile.parts import ExpertPart
from fusion_bench_smile.stack import Stack

OUT, IN, CPU = 5, 7, torch.device("cpu")


@st.composite
def expert_parts(draw) -> list[ExpertPart]:
    parts = []
    for _ in range(draw(st.integers(1, 5))):
        rank, gate_rank, biased = draw(st.integers(-1, 4)), draw(st.integers(0, 3)), draw(st.booleans())
        rows = max(rank, 0)
        parts.append(
            ExpertPart(
                rank=rank,
                gate_rank=gate_rank,
                gate=torch.randn(gate_rank, IN) if gate_rank else None,
                down=torch.randn(max(rows - gate_rank, 0), IN),
                up=torch.randn(rows, OUT),
                dense=torch.randn(OUT, IN) if rank == DENSE else None,
                bias=torch.randn(OUT) if biased else None,
            )
        )
    return parts


def joined(parts: list[ExpertPart]) -> dict[str, torch.Tensor]:
    values = {
        "gate": torch.cat([part.gate for part in parts if part.gate is not None] or [torch.zeros(0, IN)]),
        "down": torch.cat([part.down for part in parts]),
        "up": torch.cat([part.up for part in parts]),
        "dense": torch.stack([p.dense for p in parts if p.dense is not None] or [torch.zeros(0, 0)]),
    }
    if any(part.bias is not None for part in parts):
        values["expert_bias"] = torch.stack([torch.zeros(OUT) if p.bias is None else p.bias for p in parts])
    return {name: value for name, value in values.items() if value.numel()}


@given(expert_parts(), st.data())
def test_a_stack_holds_the_parts_side_by_side_however_they_come(parts, data):
    cut = data.draw(st.integers(0, len(parts)))
    first, second = Stack(data.draw(st.integers(1, 6)), *parts[:cut]), Stack(len(parts), *parts[cut:])
    first.extend(pickle.loads(pickle.dumps(second)))  # as from another process
    expected = joined(parts)
    for stack in (first, Stack(len(parts), *parts)):
        tensors = stack.tensors(CPU)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
        assert all(tensor.is_contiguous() for tensor in tensors.values())
        assert tensors.keys().isdisjoint({"expert_bias"}) != stack.layout(SmileConfig()).expert_bias
        assert stack.layout(SmileConfig()).ranks == tuple(part.rank for part in parts)
        assert stack.changes_nothing == all(part.rank == 0 and part.bias is None for part in parts)


def test_parts_of_one_size_are_written_where_they_stay():
    parts = [ExpertPart(rank=3, gate_rank=0, down=torch.randn(3, IN), up=torch.randn(3, OUT)) for _ in range(4)]
    stack = Stack(4, parts[0])
    places = {name: tensor.data_ptr() for name, tensor in stack._room.items()}
    for part in parts[1:]:
        stack.add(part)
    assert {name: tensor.data_ptr() for name, tensor in stack.tensors(CPU).items()} == places


def test_what_is_sent_to_another_process_has_no_spare_room():
    part = ExpertPart(rank=3, gate_rank=0, down=torch.randn(3, 1000), up=torch.randn(3, 1000))
    assert len(pickle.dumps(Stack(50, part))) < 3 * part.down.nbytes
