"""What experts changed outside the upscaled layers: measured, logged, recorded, and refused in recurrent layers."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from command_line import in_two_processes
from conftest import clip_tower, experts_of, gpt2, mlp, perturbed, tied_llama
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from fusion_bench_smile import (
    PlanError,
    SmileConfig,
    add_expert,
    load,
    metadata_of,
    remove_expert,
    save,
    upscale,
    upscale_to_folder,
)
from fusion_bench_smile.construction.changes import CHUNK, TensorChanges, squared_distance
from fusion_bench_smile.construction.plan import make_plan
from fusion_bench_smile.io import Provenance


class Recurrent(nn.Module):
    """A recurrent layer with a linear head."""

    def __init__(self, kind: type[nn.Module] = nn.LSTM) -> None:
        super().__init__()
        self.encoder, self.head = kind(12, 12), nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x)[0])


def moved(model: nn.Module, **scales: float) -> nn.Module:
    """A copy in which the children of some names moved, each by noise of its scale."""
    expert = copy.deepcopy(model)
    for name, scale in scales.items():
        expert.get_submodule(name).load_state_dict(perturbed(model.get_submodule(name), scale).state_dict())
    return expert


def expected_share(base: nn.Module, experts: list[nn.Module], unused: tuple[str, ...]) -> float:
    """The unused share, from all parameters at once."""
    energies = {
        name: sum((dict(e.named_parameters())[name] - p).double().square().sum().item() for e in experts)
        for name, p in base.named_parameters()
    }
    return sum(energies[name] for name in unused) / sum(energies.values())


def provenance_of(model: nn.Module) -> Provenance:
    return metadata_of(model).provenance


def test_the_unused_share_is_logged_and_stored_in_the_checkpoint(caplog, tmp_path: Path) -> None:
    base = mlp()
    experts = experts_of(base, 2)
    model = upscale(base, experts, gate_k=2, k=4)
    expected = expected_share(base, experts, ("1.weight", "1.bias"))
    assert 0.01 < expected < 0.2
    assert provenance_of(model).unused_share == pytest.approx(expected, rel=1e-4)
    assert provenance_of(model).largest_unused.keys() == {"1.weight", "1.bias"}
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING and "does not use" in r.message]
    assert f"{100 * expected:.3g} %" in record.message
    assert "1.weight (" in record.message
    save(model, tmp_path / "model")
    assert provenance_of(load(tmp_path / "model", base)) == provenance_of(model)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "- not used, outside the upscaled layers: " in card
    assert "1.bias (" in card


@pytest.mark.parametrize("options", [{"average_experts": True}, {"exclude_modules": ("3",), "average_experts": True}])
def test_averaged_tensors_are_used(options, caplog) -> None:
    base = mlp()
    model = upscale(base, experts_of(base, 2), gate_k=2, k=4, **options)
    assert provenance_of(model).unused_share == 0
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_nothing_is_logged_where_nothing_is_lost(caplog) -> None:
    base = mlp()
    experts = [moved(base, **{"0": 0.05, "3": 0.05}) for _ in range(2)]
    model = upscale(base, experts, gate_k=2, k=4)
    assert provenance_of(model).unused_share == 0
    assert provenance_of(model).changes["0"].energy > 0
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_only_the_largest_tensors_are_named() -> None:
    base = clip_tower()
    provenance = provenance_of(upscale(base, experts_of(base, 2), gate_k=2, k=4))
    shares = list(provenance.largest_unused.values())
    assert len(shares) == 5
    assert shares == sorted(shares, reverse=True)
    assert next(iter(provenance.largest_unused)) == "vision_model.embeddings.patch_embedding.weight"
    assert sum(shares) < provenance.unused_share


def test_convolutions_and_bare_parameters_are_counted() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv1d(3, 4, 3), nn.Linear(4, 4)
            self.experts = nn.Parameter(torch.randn(2, 4, 4))
            self.register_buffer("steps", torch.tensor(3))

    base = Mixed()
    experts = [perturbed(base, 0.1, seed) for seed in (1, 2)]
    experts[0].steps += 1000  # counts are no weights
    provenance = provenance_of(upscale(base, experts, gate_k=2, k=4))
    unused = ("conv.weight", "conv.bias", "experts")
    assert provenance.unused_share == pytest.approx(expected_share(base, experts, unused), rel=1e-4)
    assert provenance.largest_unused.keys() == set(unused)


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
def test_experts_that_changed_mostly_recurrent_layers_are_refused(make, caplog, tmp_path) -> None:
    base = Recurrent(make)
    expert = moved(base, encoder=0.1, head=0.1)
    before = copy.deepcopy(base.state_dict())
    message = r"expert 'red' has \d\d% .* recurrent layers .*encoder\..*average_experts=true"
    with pytest.raises(PlanError, match=message):
        upscale(base, {"blue": moved(base, head=0.1), "red": expert}, gate_k=2, k=4, in_place=True)
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())
    averaged = upscale(base, {"red": expert}, gate_k=2, k=4, average_experts=True)
    assert torch.equal(averaged.encoder.weight_hh_l0, expert.encoder.weight_hh_l0)
    little = moved(base, encoder=0.01, head=0.1)
    model = upscale(base, {"red": little}, gate_k=2, k=4)
    assert 0 < provenance_of(model).unused_share < 0.5
    assert "encoder.weight_hh_l0 (" in caplog.text
    with pytest.raises(PlanError, match="recurrent layers"):
        add_expert(upscale(base, [little, little], gate_k=2, k=4), expert, "red")


def test_editing_keeps_the_changes_of_all_experts(caplog) -> None:
    base = mlp()
    red, green, blue = experts_of(base, 3)
    green[1].load_state_dict(base[1].state_dict())
    both = upscale(base, {"red": red, "green": green}, gate_k=2, k=4)
    three = upscale(base, {"red": red, "green": green, "blue": blue}, gate_k=2, k=4)
    caplog.clear()
    added = add_expert(both, blue, "blue")
    assert provenance_of(added).changes == provenance_of(three).changes
    assert "does not use" in caplog.text
    removed = remove_expert(three, "red")
    assert list(provenance_of(removed).changes) == ["green", "blue"]
    assert provenance_of(remove_expert(removed, "blue")).unused_share == 0


def test_the_share_of_an_older_checkpoint_is_unknown() -> None:
    old = Provenance({}, {"red": "ab"}, (1, 2), {})
    assert old.unused_share is None
    assert old.largest_unused == {}
    assert old.describe_unused() == ""


@pytest.mark.parametrize(
    "options", [{}, {"k": -1}, {"k": -1, "density": 0.1}, {"routing_use_diff": False}, {"param_ratio": 1.5}]
)
def test_the_change_of_a_layer_does_not_depend_on_its_rank(options) -> None:
    base = mlp()
    experts = experts_of(base, 2)
    provenance = provenance_of(upscale(base, experts, **{"gate_k": 2, "k": 4, **options}))
    for name, expert in zip("01", experts, strict=True):
        pairs = zip(expert.parameters(), base.parameters(), strict=True)
        energy = sum((a - b).double().square().sum().item() for a, b in pairs)
        assert provenance.changes[name].energy == pytest.approx(energy, rel=1e-4)


def test_the_deltas_of_an_adapter_count(tmp_path: Path) -> None:
    base = clip_tower()
    adapted = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["pre_layrnorm"])
    )
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "red")
    merged = adapted.merge_and_unload()
    provenance = provenance_of(upscale(base, {"red": tmp_path / "red"}, k=2))
    unused = ("vision_model.pre_layrnorm.weight", "vision_model.pre_layrnorm.bias")
    assert provenance.unused_share == pytest.approx(expected_share(base, [merged], unused), rel=1e-3)
    assert provenance.largest_unused.keys() == set(unused)


def test_streaming_records_the_same_changes(tmp_path: Path, caplog) -> None:
    base = tied_llama()
    experts = dict(zip(("red", "green"), experts_of(base, 2), strict=True))
    for name, model in {"base": base, **experts}.items():
        model.save_pretrained(tmp_path / name)
    folders = {name: tmp_path / name for name in experts}
    expected = provenance_of(upscale(base, folders, gate_k=2, k=4))
    assert expected.largest_unused.keys() > {"model.embed_tokens.weight"}  # the head uses the tied tensor
    caplog.clear()
    upscale_to_folder(tmp_path / "base", folders, tmp_path / "out", gate_k=2, k=4)
    assert provenance_of(load(tmp_path / "out")).changes == expected.changes
    assert "does not use" in caplog.text
    with pytest.raises(PlanError, match=r"exclude_modules=\['lm_head'\]"):
        upscale_to_folder(tmp_path / "base", folders, tmp_path / "bad", gate_k=2, k=4, average_experts=True)
    assert not (tmp_path / "bad").exists()
    options = {"gate_k": 2, "k": 4, "average_experts": True, "exclude_modules": ("lm_head",)}
    upscale_to_folder(tmp_path / "base", folders, tmp_path / "averaged", **options)
    mean = sum(e.model.embed_tokens.weight for e in experts.values()) / 2
    torch.testing.assert_close(load(tmp_path / "averaged").model.embed_tokens.weight, mean)


def test_a_tied_embedding_that_stays_pretrained_is_reported(caplog) -> None:
    base = gpt2()
    expert = base.state_dict() | {"transformer.wte.weight": perturbed(base).transformer.wte.weight}
    provenance = provenance_of(upscale(base, [expert | {"lm_head.weight": expert["transformer.wte.weight"]}], k=24))
    assert provenance.unused_share == pytest.approx(0.5, rel=1e-4)  # the head uses the same change
    assert list(provenance.largest_unused) == ["transformer.wte.weight"]
    assert "transformer.wte.weight (50 %)" in caplog.text


def test_a_tied_embedding_cannot_be_averaged_beside_a_routed_head() -> None:
    base = gpt2()
    experts = experts_of(base, 2)
    message = r"expert '0' changed transformer.wte.weight, .*upscaled layer lm_head: .*exclude_modules=\['lm_head'\]"
    with pytest.raises(PlanError, match=message):
        upscale(base, experts, gate_k=2, k=4, average_experts=True)
    model = upscale(base, experts, gate_k=2, k=4, average_experts=True, exclude_modules=["lm_head"])
    mean = (experts[0].transformer.wte.weight + experts[1].transformer.wte.weight) / 2
    torch.testing.assert_close(model.transformer.wte.weight, mean)
    assert model.lm_head.weight is model.transformer.wte.weight
    for expert in experts:  # without a change there is nothing to refuse
        expert.transformer.wte.weight.data.copy_(base.transformer.wte.weight)
    model = upscale(base, experts, gate_k=2, k=4, average_experts=True)
    assert torch.equal(model.transformer.wte.weight, base.transformer.wte.weight)


def test_an_expert_that_unties_a_tensor_is_not_averaged() -> None:
    base = gpt2()
    expert = dict(perturbed(base, 0.1).state_dict())
    options = {"k": 4, "exclude_modules": ["lm_head"]}
    upscale(base, {"red": expert}, average_experts=True, **options)
    expert["lm_head.weight"] = expert["lm_head.weight"] + 1
    with pytest.raises(PlanError, match=r"'red' has two tensors transformer.wte.weight and lm_head.weight, .* one in"):
        upscale(base, {"red": expert}, average_experts=True, **options)
    changes = metadata_of(upscale(base, {"red": expert}, **options)).provenance.changes["red"]
    assert changes.unused > expert["lm_head.weight"].numel() * 0.9  # the larger of the two


def test_a_module_around_a_layer_does_not_use_its_parameters() -> None:
    """BERT's prediction head has the bias of its decoder as a parameter."""
    config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    base = BertForMaskedLM(config)
    assert base.cls.predictions.bias is base.cls.predictions.decoder.bias
    plan = make_plan(base, 2, SmileConfig(gate_k=2, k=4))
    assert plan.tied_tensors == {"bert.embeddings.word_embeddings.weight": "cls.predictions.decoder"}


def test_distances() -> None:
    tensor = torch.randn(3, CHUNK // 2)
    other = tensor.clone()
    other[2, -1] += 2
    assert squared_distance(other, tensor) == pytest.approx(4, rel=1e-5)
    assert squared_distance(tensor.clone(), tensor) == 0
    assert squared_distance(tensor.bfloat16(), tensor) == 0  # stored in another dtype, not changed
    assert squared_distance(torch.tensor([5]), torch.tensor([7])) == 0
    assert TensorChanges({"a": 1e16}, {"b": 1.0, "c": 1.0}).energy == 1e16 + 2


def work(rank: int, size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    torch.manual_seed(0)
    base = mlp()
    model = upscale(base, experts_of(base, 3), gate_k=2, k=4, share_work=True)
    base = Recurrent()
    with pytest.raises(PlanError) as refusal:
        upscale(base, experts_of(base, 3), gate_k=2, k=4, share_work=True)
    torch.save((metadata_of(model).to_dict()["recipe"]["changes"], str(refusal.value)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_all_processes_agree(tmp_path: Path) -> None:
    in_two_processes(work, tmp_path)
    (changes, refusal), second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert second == (changes, refusal)
    assert "recurrent layers" in refusal
    torch.manual_seed(0)
    base = mlp()
    assert changes == metadata_of(upscale(base, experts_of(base, 3), gate_k=2, k=4)).to_dict()["recipe"]["changes"]
