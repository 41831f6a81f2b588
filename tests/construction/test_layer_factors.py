"""The factors of all experts in one layer, expert after expert."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import RAGGED, UNIFORM, random_layer
from torch.overrides import TorchFunctionMode

from fusion_bench_smile.construction.layer_factors import ExpertFactors, LayerFactors
from fusion_bench_smile.nn import DENSE, ExpertLayout

OUT, IN, CPU = 5, 7, torch.device("cpu")


@st.composite
def expert_factors(draw: st.DrawFn) -> list[ExpertFactors]:
    experts = []
    for _ in range(draw(st.integers(1, 5))):
        rank, gate_rank, biased = draw(st.integers(-1, 4)), draw(st.integers(0, 3)), draw(st.booleans())
        rows = max(rank, 0)
        experts.append(
            ExpertFactors(
                rank=rank,
                gate_rank=gate_rank,
                gate=torch.randn(gate_rank, IN) if gate_rank else None,
                down=torch.randn(max(rows - gate_rank, 0), IN),
                up=torch.randn(rows, OUT),
                dense=torch.randn(OUT, IN) if rank == DENSE else None,
                bias=torch.randn(OUT) if biased else None,
            )
        )
    return experts


def joined(experts: list[ExpertFactors]) -> dict[str, torch.Tensor]:
    values = {
        "gate": torch.cat([expert.gate for expert in experts if expert.gate is not None] or [torch.zeros(0, IN)]),
        "down": torch.cat([expert.down for expert in experts]),
        "up": torch.cat([expert.up for expert in experts]),
        "dense": torch.stack([e.dense for e in experts if e.dense is not None] or [torch.zeros(0, 0)]),
    }
    if any(expert.bias is not None for expert in experts):
        values["expert_bias"] = torch.stack([torch.zeros(OUT) if e.bias is None else e.bias for e in experts])
    return {name: value for name, value in values.items() if value.numel()}


@given(expert_factors(), st.data())
def test_the_experts_are_stored_one_after_the_other_in_any_grouping(experts, data):
    cut = data.draw(st.integers(0, len(experts)))
    first = LayerFactors(data.draw(st.integers(1, 6)), experts[:cut])
    second = LayerFactors(len(experts), experts[cut:])
    first.extend(pickle.loads(pickle.dumps(second)))  # as from another process
    expected = joined(experts)
    for factors in (first, LayerFactors(len(experts), experts)):
        tensors = factors.tensors(CPU)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
        assert all(tensor.is_contiguous() for tensor in tensors.values())
        assert tensors.keys().isdisjoint({"expert_bias"}) != factors.layout(True).expert_bias
        assert factors.layout(True).ranks == tuple(expert.rank for expert in experts)
        assert factors.layout(True).shared_router
        assert not factors.layout(False).shared_router
        assert factors.is_unchanged == all(expert.rank == 0 and expert.bias is None for expert in experts)
        assert factors.num_bias_parameters == (expected["expert_bias"].numel() if "expert_bias" in expected else 0)


class Calls(TorchFunctionMode):
    """The names of the torch functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_experts_of_one_size_are_copied_once_to_their_place():
    experts = [ExpertFactors(rank=3, gate_rank=0, down=torch.randn(3, IN), up=torch.randn(3, OUT)) for _ in range(4)]
    with Calls() as first:
        factors = LayerFactors(4, experts[:1])
    with Calls() as later:
        for expert in experts[1:]:
            factors.append(expert)
        rows = {name: factors.rows(name) for name in ("down", "up")}
    assert first.names.count("new_empty") == 2
    assert not {"new_empty", "clone", "cat"} & set(later.names)  # memory is allocated with the first expert alone
    tensors = factors.tensors(CPU)
    assert {name: tensor.data_ptr() for name, tensor in tensors.items()} == {
        name: tensor.data_ptr() for name, tensor in rows.items()
    }  # fmt: skip


def test_factors_for_another_process_have_no_spare_memory():
    expert = ExpertFactors(rank=3, gate_rank=0, down=torch.randn(3, 1000), up=torch.randn(3, 1000))
    assert len(pickle.dumps(LayerFactors(50, [expert]))) < 3 * expert.down.nbytes


@pytest.mark.parametrize("storage", ["same", "int8"])
@pytest.mark.parametrize("layout", [UNIFORM, RAGGED, ExpertLayout(ranks=(DENSE, 0), gate_ranks=(2, 1))])
def test_from_a_layer_and_back(layout, storage):
    layer = random_layer(layout, IN, OUT, storage=storage)
    factors = LayerFactors.from_layer(layer, [0.5] * layout.num_experts)
    assert factors.layout(layout.shared_router) == layout
    assert [expert.energy for expert in factors.experts] == [0.5] * layout.num_experts
    for name, tensor in factors.tensors(CPU).items():
        expected = layer.expert_bias if name == "expert_bias" else layer.rows(name)
        assert torch.equal(tensor, expected)
    assert [expert.energy for expert in LayerFactors.from_layer(layer).experts] == [1.0] * layout.num_experts


def test_a_truncation_keeps_the_leading_rows_and_their_share_of_the_energy():
    layer = random_layer(UNIFORM, IN, OUT)
    factors = LayerFactors.from_layer(layer, [0.5, 1.0, 1.0])
    before = {name: tensor.clone() for name, tensor in factors.tensors(CPU).items()}
    smaller = factors.truncate([2, 4, 3], shared_router=True)
    assert smaller.layout(True).ranks == (2, 4, 3)
    for expert, rank in enumerate([2, 4, 3]):
        start = 4 * expert
        squares = before["up"][start : start + 4].square().sum(1)
        share = (squares[:rank].sum() / squares.sum()).item()
        assert smaller.experts[expert].energy == pytest.approx(factors.experts[expert].energy * share)
        assert smaller.squared_singular_values()[expert] == pytest.approx(squares[:rank].tolist())
    assert torch.equal(smaller.rows("gate"), before["gate"])
    assert torch.equal(smaller.rows("up"), torch.cat([before["up"][i : i + r] for i, r in ((0, 2), (4, 4), (8, 3))]))
    assert torch.equal(smaller.rows("down"), torch.cat([before["down"][2:4], before["down"][4:5]]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in factors.tensors(CPU).items())


def test_a_selection_has_the_rows_of_its_experts():
    layer = random_layer(RAGGED, IN, OUT)
    selected = LayerFactors.from_layer(layer, [0.1, 0.2, 0.3]).select([2, 1], shared_router=True)
    assert selected.layout(True) == ExpertLayout(ranks=(2, 0), gate_ranks=(3, 0))
    assert [expert.energy for expert in selected.experts] == [0.3, 0.2]
    assert torch.equal(selected.rows("gate"), layer.gate[2:])
    assert torch.equal(selected.rows("up"), layer.up[4:])


def test_a_single_expert_with_and_without_router_rows():
    layer = random_layer(UNIFORM, IN, OUT)
    single = LayerFactors.from_layer(layer).select([1], shared_router=True)
    plain = single.without_router(shared_router=True)
    assert plain.layout(True) == ExpertLayout(ranks=(4,), gate_ranks=(0,), expert_bias=True)
    assert torch.equal(plain.rows("down"), layer.directions(1))
    again = plain.with_router(2)
    assert again.layout(True) == single.layout(True)
    assert all(torch.equal(tensor, single.tensors(CPU)[name]) for name, tensor in again.tensors(CPU).items())
    separate = single.without_router(shared_router=False)  # its router rows are not directions
    assert torch.equal(separate.rows("down"), single.rows("down"))
