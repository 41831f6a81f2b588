"""Plain ``save_pretrained`` and ``from_pretrained`` of upscaled models."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from checkpoints import damage, upscaled
from conftest import clip_tower, experts_of, mlp, output, t5, tied_llama
from safetensors import SafetensorError
from torch import nn

from fusion_bench_smile import CheckpointError, load, metadata_of, save, upscale
from fusion_bench_smile.io.transformers_hook import is_tied, prepare_model, stored_shapes
from fusion_bench_smile.nn import RoutedLayer

OPTIONS = [
    {"gate_k": 2, "k": 4},
    {"gate_k": 6, "k": 4, "top_k": 2, "average_experts": True},
    {"gate_k": 2, "k": -1, "routing_use_diff": False},
    {"gate_k": 2, "k": -1, "density": 0.1, "storage": "int4"},
]
FRESH = """
import sys, torch, transformers
import fusion_bench_smile
model = getattr(transformers, sys.argv[1]).from_pretrained(sys.argv[2]).eval()
inputs = torch.load(sys.argv[3])
with torch.no_grad():
    result = model(**inputs)
torch.save(result.logits if "logits" in result else result.last_hidden_state, sys.argv[4])
"""


@pytest.mark.parametrize("architecture", ["clip", "t5"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_plain_from_pretrained_gives_the_same_bits(architecture, options, tmp_path):
    model, inputs = upscaled(architecture, **options)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1, "with one shard the test shows nothing"
    again = type(model).from_pretrained(tmp_path / "model").eval()
    assert torch.equal(output(again, inputs), output(model, inputs))
    assert torch.equal(output(load(tmp_path / "model").eval(), inputs), output(model, inputs))
    again.save_pretrained(tmp_path / "again")  # a loaded model can be saved as well
    third = load(tmp_path / "again").eval()
    assert torch.equal(output(third, inputs), output(model, inputs))
    assert again.half().dtype == torch.float16
    assert type(model).from_pretrained(tmp_path / "model", torch_dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.slow
def test_a_fresh_process_needs_to_import_the_package_alone(tmp_path):
    model, inputs = upscaled("clip")
    save(model, tmp_path / "model")
    torch.save(inputs, tmp_path / "inputs.pt")
    arguments = ["CLIPVisionModel", str(tmp_path / "model"), str(tmp_path / "inputs.pt"), str(tmp_path / "out.pt")]
    subprocess.run([sys.executable, "-c", FRESH, *arguments], check=True, cwd=tmp_path, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "out.pt"), output(model, inputs))


def test_copies_and_pickles_can_be_saved(tmp_path):
    model, inputs = upscaled("clip")
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
    copied.save_pretrained(tmp_path / "copy")
    assert torch.equal(output(load(tmp_path / "copy").eval(), inputs), output(copied, inputs))
    pickle.loads(pickle.dumps(model)).save_pretrained(tmp_path / "pickled")
    assert torch.equal(output(load(tmp_path / "pickled").eval(), inputs), output(model, inputs))


def test_tied_weights_survive(tmp_path):
    base = tied_llama()
    model = upscale(base, experts_of(base, 2), gate_k=2, k=4)
    model.save_pretrained(tmp_path / "llama")
    again = type(base).from_pretrained(tmp_path / "llama").eval()
    assert again.lm_head.weight is again.model.embed_tokens.weight
    inputs = {"input_ids": torch.randint(0, 40, (2, 7))}
    assert torch.equal(output(again, inputs), output(model, inputs))


@pytest.mark.parametrize("kind", ["missing expert tensor", "missing plain tensor", "newer format", "truncated weights"])
def test_plain_from_pretrained_never_fills_in_random_weights(kind, tmp_path):
    model, _ = upscaled("clip")
    save(model, tmp_path / "model")
    damage(kind, tmp_path / "model")
    with pytest.raises((CheckpointError, SafetensorError)):
        type(model).from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("options", [{}, {"routing_scope": "input"}, {"storage": "int4"}])
def test_a_prepared_model_has_the_parameters_of_the_upscaled_one(options):
    base = t5()
    model = upscale(base, experts_of(base), gate_k=2, k=4, **options)
    prepared = copy.deepcopy(base)
    prepare_model(prepared, metadata_of(model))
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert {name: parameter.shape for name, parameter in prepared.named_parameters()} == expected
    added = [module for module in prepared.modules() if isinstance(module, RoutedLayer)]
    assert added
    assert not any(layer.up.any() for layer in added)


def test_a_checkpoint_of_another_architecture_is_refused():
    model, _ = upscaled("clip")
    with pytest.raises(CheckpointError, match=r"Sequential has no layer vision_model\..*load this checkpoint with"):
        prepare_model(mlp(), metadata_of(model))


def test_tied_parameters_are_stored_once():
    llama, tower = tied_llama(), clip_tower()
    assert is_tied(llama, "lm_head.weight")
    assert "lm_head.weight" not in stored_shapes(llama)
    assert stored_shapes(tower) == {name: tuple(parameter.shape) for name, parameter in tower.named_parameters()}


def test_only_upscaled_models_have_metadata():
    for model in (mlp(), clip_tower(), nn.Linear(2, 2)):
        with pytest.raises(CheckpointError, match="was not made by upscale"):
            metadata_of(model)
