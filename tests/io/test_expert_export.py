"""One expert as a plain checkpoint of the original class."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import clip_inputs, clip_tower, experts_of, gpt2, mlp, output, t5, t5_inputs, tied_llama
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from fusion_bench_smile import CheckpointError, PlanError, as_expert, export_expert, load, save, upscale

CASES = {
    "clip": (clip_tower, clip_inputs),
    "t5": (t5, t5_inputs),
    "gpt2": (gpt2, lambda: {"input_ids": torch.randint(1, 40, (2, 7))}),
    "tied llama": (tied_llama, lambda: {"input_ids": torch.randint(1, 40, (2, 7))}),
}
OPTIONS = [{"k": 4, "gate_k": 2}, {"k": 8, "gate_k": None, "storage": "int4"}, {"k": -1, "gate_k": 2, "density": 0.2}]


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_checkpoint_is_the_expert_of_the_model(case: str, options: dict[str, object], tmp_path: Path) -> None:
    make, make_inputs = CASES[case]
    base, inputs = make(), make_inputs()
    model = upscale(base, experts_of(base), routing_scope="input", **options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_expert(model, "1", tmp_path / "one")
    plain = type(base).from_pretrained(tmp_path / "one").eval()
    assert type(plain) is type(base)
    assert not hasattr(plain.config, "quantization_config")
    with as_expert(model, "1"):
        torch.testing.assert_close(output(plain, inputs), output(model, inputs), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_of_full_rank_it_is_the_fine_tuned_model(tmp_path: Path) -> None:
    base, inputs = clip_tower(), clip_inputs()
    expert = clip_tower()
    expert.load_state_dict(base.state_dict())
    for module in expert.modules():
        if isinstance(module, nn.Linear):
            module.weight += 0.1 * torch.randn_like(module.weight)
    save(upscale(base, {"mine": expert}, k=32, gate_k=2), tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    export_expert(load(tmp_path / "model"), "mine", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    again = type(base).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(output(again, inputs), output(expert, inputs), rtol=1e-4, atol=1e-4)


def test_it_loads_without_this_package(tmp_path: Path) -> None:
    base = clip_tower()
    export_expert(upscale(base, experts_of(base), k=4, gate_k=2), "0", tmp_path / "out")
    code = f"""
import sys
from transformers import CLIPVisionModel
model = CLIPVisionModel.from_pretrained({str(tmp_path / "out")!r})
assert type(model.vision_model.encoder.layers[0].mlp.fc1).__name__ == "Linear"
assert "fusion_bench_smile" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@torch.no_grad()
def test_other_models_are_safetensors_files(tmp_path: Path) -> None:
    base = mlp()
    expert = experts_of(base, 1)[0]
    export_expert(upscale(base, {"a": expert}, k=20, gate_k=2), "a", tmp_path / "out")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        expected = (base if name.startswith("1.") else expert).state_dict()[name]  # the norm is no routed layer
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_all_names_of_a_bias_and_a_layer_have_its_change(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=20,
    )  # fmt: skip
    base, x = BertForMaskedLM(config).eval(), {"input_ids": torch.randint(1, 40, (2, 7))}
    model = upscale(base, experts_of(base, 2, 0.3), k=16, gate_k=2, routing_scope="input")
    export_expert(model, "1", tmp_path / "bert")
    with as_expert(model, "1"):
        expected = output(model, x)
    plain = BertForMaskedLM.from_pretrained(tmp_path / "bert").eval()
    torch.testing.assert_close(output(plain, x), expected, rtol=1e-4, atol=1e-4)

    layer = nn.Linear(8, 8)
    twice, row = nn.Sequential(layer, nn.GELU(), layer), torch.randn(3, 8)
    model = upscale(twice, experts_of(twice, 2, 0.3), k=8, gate_k=2, routing_scope="input")
    export_expert(model, "1", tmp_path / "twice")
    tensors = load_file(tmp_path / "twice" / "model.safetensors")
    with as_expert(model, "1"):
        expected = model(row)
    twice.load_state_dict(tensors)
    torch.testing.assert_close(twice(row), expected, rtol=1e-4, atol=1e-4)


def test_the_generation_config_is_kept(tmp_path: Path) -> None:
    base = gpt2()
    base.generation_config.update(eos_token_id=[0, 3], max_length=77, pad_token_id=5)
    export_expert(upscale(base, experts_of(base), k=4, gate_k=2), "0", tmp_path / "out")
    again = type(base).from_pretrained(tmp_path / "out").generation_config
    assert (again.eos_token_id, again.max_length, again.pad_token_id) == ([0, 3], 77, 5)


def test_refusals(tmp_path: Path) -> None:
    base = clip_tower()
    model = upscale(base, experts_of(base), k=4, gate_k=2)
    with pytest.raises(PlanError, match="no expert 'x'; the experts are: 0, 1, 2"):
        export_expert(model, "x", tmp_path / "out")
    with pytest.raises(CheckpointError, match="was not made by upscale"):
        export_expert(base, "0", tmp_path / "out")
    attention = nn.Sequential(nn.MultiheadAttention(16, 2))
    with pytest.raises(PlanError, match="was split into layers, which its class does not have"):
        export_expert(upscale(attention, experts_of(attention), k=4, gate_k=2), "0", tmp_path / "out")
    tied = T5ForConditionalGeneration(T5Config(**{**t5().config.to_dict(), "tie_word_embeddings": True}))
    with pytest.raises(PlanError, match="computes otherwise if its head is not tied"):
        export_expert(upscale(tied, experts_of(tied), k=4, gate_k=2), "0", tmp_path / "out")
    assert not (tmp_path / "out").exists()
