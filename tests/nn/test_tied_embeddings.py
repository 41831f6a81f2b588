"""Embeddings of the experts that are tied to a routed head, and those of subclasses."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, Architecture, first_output
from conftest import perturbed
from torch import Tensor, nn

from fusion_bench_smile import as_expert, choose_experts, load, metadata_of, save, upscale

OPTIONS = {"k": 32, "gate_k": 2, "routing_scope": "two_pass", "expert_parameters": "all"}
NAMES = (
    "GPT2LMHeadModel", "Gemma2ForCausalLM", "OPTForCausalLM", "BloomForCausalLM", "T5ForConditionalGeneration",
    "BartForConditionalGeneration",
)  # fmt: skip
TIED = [case for case in ARCHITECTURES if case.name in NAMES]


def models(case: Architecture) -> tuple[nn.Module, list[nn.Module]]:
    """The pretrained model and two experts that changed all parameters but T5's relative positions."""
    base = case.make().float()
    experts = [perturbed(base, 0.1, seed) for seed in (1, 2)]
    for expert in experts:
        for name, parameter in expert.named_parameters():
            if "relative" in name:
                parameter.data.copy_(base.get_parameter(name))
    return base, experts


def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return first_output(model(**inputs))


@pytest.mark.parametrize("case", TIED, ids=str)
def test_tied_embeddings_of_an_expert_are_lossless(case: Architecture, caplog, tmp_path: Path) -> None:
    base, experts = models(case)
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    assert head.weight is embedding.weight
    model, inputs = upscale(base, experts, **OPTIONS), case.inputs(4)
    tuned = [run(expert, inputs) for expert in experts]
    assert (tuned[0] - run(base, inputs)).abs().max() > 0.1
    for number, expected in enumerate(tuned):
        with as_expert(model, str(number)):
            torch.testing.assert_close(run(model, inputs), expected, atol=1e-4, rtol=1e-4)
    encoder_inputs = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    choice, routed = choose_experts(model, **encoder_inputs).argmax(-1).tolist(), run(model, inputs)
    for row, expert in enumerate(choice):
        torch.testing.assert_close(routed[row], tuned[expert][row], atol=1e-4, rtol=1e-4)
    assert metadata_of(model).provenance.unused_share == 0
    assert "does not use" not in caplog.text
    save(model, tmp_path / "model")
    assert torch.equal(run(load(tmp_path / "model").eval(), inputs), routed)


def test_a_tied_embedding_that_stays_pretrained_is_reported(caplog) -> None:
    case = TIED[0]
    base, experts = models(case)
    for expert in experts:
        kept = copy.deepcopy(base.state_dict())
        kept.update({name: value for name, value in expert.state_dict().items() if "wte" in name or "lm_head" in name})
        expert.load_state_dict(kept)
    provenance = metadata_of(upscale(base, experts, k=32, gate_k=2)).provenance
    assert provenance.unused_share == pytest.approx(0.5, rel=1e-4)  # the head uses the same change
    assert list(provenance.largest_unused) == ["transformer.wte.weight"]
    assert "transformer.wte.weight (50 %)" in caplog.text
