"""A checkpoint of an upscaled model is not loaded as the pretrained one where this package is not imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import upscaled
from conftest import clip_tower, experts_of, output, tied_llama
from safetensors.torch import load_file
from transformers import PreTrainedModel

from fusion_bench_smile import load, save, upscale
from fusion_bench_smile.io.safetensors_source import flatten_tensor
from fusion_bench_smile.io.transformers_hook import METHOD, STORED_METHOD

WITHOUT_IMPORT = """
import sys, transformers
folder = sys.argv[1]
for load in (
    transformers.AutoModel.from_pretrained,
    transformers.AutoModelForCausalLM.from_pretrained,
    transformers.LlamaForCausalLM.from_pretrained,
    lambda folder: transformers.pipeline("text-generation", model=folder),
):
    try:
        load(folder)
    except Exception as error:
        print("refused", type(error).__name__)
    else:
        print("loaded")
assert "fusion_bench_smile" not in sys.modules
"""


@pytest.mark.slow
def test_plain_transformers_refuses_the_checkpoint_and_names_this_package(tmp_path: Path) -> None:
    base = tied_llama()
    save(upscale(base, experts_of(base, 2), gate_k=2, k=4), tmp_path / "model")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", WITHOUT_IMPORT, str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(lines := done.stdout.split("\n")[:-1]) == 4
    assert all(line.startswith("refused") for line in lines), lines
    assert "import fusion_bench_smile before from_pretrained" in done.stderr


def test_a_routed_weight_is_stored_in_one_dimension(tmp_path: Path) -> None:
    model, inputs = upscaled("clip")
    save(model, tmp_path / "model", max_shard_size="20KB")
    section = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    stored = {k: v for file in (tmp_path / "model").glob("*.safetensors") for k, v in load_file(file).items()}
    assert section["quant_method"] == STORED_METHOD
    assert len(section["flat_weights"]) == 1
    for name, parameter in model.named_parameters():
        flat = name.removesuffix(".weight") in section["flat_weights"] and name.endswith(".weight")
        assert stored[name].shape == ((parameter.numel(),) if flat else parameter.shape), name
        assert torch.equal(stored[name].view(parameter.shape), parameter)
    assert torch.equal(output(load(tmp_path / "model").eval(), inputs), output(model, inputs))


def test_a_tied_weight_keeps_its_shape(tmp_path: Path) -> None:
    base = tied_llama()
    model = upscale(base, experts_of(base, 2), gate_k=2, k=4)
    save(model, tmp_path / "model")
    section = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert "lm_head" in section["layers"]
    assert "lm_head" not in section["flat_weights"]


@pytest.mark.parametrize("load_model", [load, lambda folder: type(clip_tower()).from_pretrained(folder)])
def test_checkpoints_without_the_mark_are_read(load_model, tmp_path: Path) -> None:
    """Earlier releases wrote weights in their own shape."""
    model, inputs = upscaled("clip")
    type(model).save_pretrained(model, tmp_path / "model")
    section = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert section["quant_method"] == METHOD
    assert "flat_weights" not in section
    again = load_model(tmp_path / "model").eval()
    assert isinstance(again, PreTrainedModel)
    assert torch.equal(output(again, inputs), output(model, inputs))


def test_layers_that_accelerate_keeps_on_disk_are_loaded(tmp_path: Path) -> None:
    model, inputs = upscaled("clip")
    save(model, tmp_path / "model")
    on_cpu = ("embeddings", "pre_layrnorm", "post_layernorm", "encoder.layers.0")
    devices = {f"vision_model.{name}": "cpu" for name in on_cpu} | {"vision_model.encoder.layers.1": "disk"}
    offload = {"device_map": devices, "offload_folder": str(tmp_path / "offload")}
    again = type(model).from_pretrained(tmp_path / "model", **offload)
    assert again.vision_model.encoder.layers[1].mlp.fc1.weight.is_meta
    assert torch.equal(output(again.eval(), inputs), output(model, inputs))


def test_headers_alone_are_written(tmp_path: Path) -> None:
    model, _ = upscaled("clip")
    type(model).save_pretrained(model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    before, size = load_file(file), file.stat().st_size
    name = next(name for name in before if name.endswith("fc1.weight"))
    assert flatten_tensor(tmp_path / "model", name)
    assert not flatten_tensor(tmp_path / "model", "absent")
    after = load_file(file)
    assert file.stat().st_size == size
    assert after[name].ndim == 1
    assert all(torch.equal(after[key].view(value.shape), value) for key, value in before.items())
