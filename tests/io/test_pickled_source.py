"""The files that older repositories have: what `torch.save` wrote."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
import torch
from conftest import clip_inputs, clip_tower, experts_of, mlp, output, perturbed, tied_llama
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from fusion_bench_smile import PlanError, load, upscale, upscale_to_folder
from fusion_bench_smile.io import SafetensorsSource, open_weights
from fusion_bench_smile.io.pickled_source import PickledSource

OPTIONS = {"k": 4, "gate_k": 2}


def pickled(model: nn.Module, folder: Path, shards: int = 1, **options: object) -> Path:
    """The model in a folder as transformers wrote it before safetensors."""
    folder.mkdir()
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(folder)
        (folder / "model.safetensors").unlink()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin", **options)
        return folder
    names, index = list(state), {}
    for shard in range(shards):
        part, file = names[shard::shards], f"pytorch_model-{shard + 1:05d}-of-{shards:05d}.bin"
        torch.save({name: state[name] for name in part}, folder / file, **options)
        index |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("shards", [1, 3])
def test_files_give_the_model_that_modules_give(tmp_path, shards, options):
    base, x = clip_tower(), clip_inputs()
    experts = experts_of(base)
    folders = {str(i): pickled(expert, tmp_path / str(i), shards, **options) for i, expert in enumerate(experts)}
    assert torch.equal(output(upscale(base, folders, **OPTIONS), x), output(upscale(base, experts, **OPTIONS), x))


def test_tensors_are_mapped_and_not_read(tmp_path):
    base = mlp()
    source = PickledSource(pickled(base, tmp_path / "a"))
    assert source.shapes() == {name: tuple(tensor.shape) for name, tensor in base.state_dict().items()}
    assert all(torch.equal(source.read(name), tensor) for name, tensor in base.state_dict().items())
    file = tmp_path / "a" / "pytorch_model.bin"
    assert str(file) in [mapping.path for mapping in psutil.Process().memory_maps()]
    halved = PickledSource(file, dtypes={"0.weight": torch.float16})
    assert halved.read("0.weight").dtype == torch.float16
    assert source.identity("0.weight") != halved.identity("0.weight")


def test_safetensors_come_first_as_in_transformers(tmp_path):
    base = clip_tower()
    pickled(perturbed(base), tmp_path / "a")
    assert isinstance(open_weights(tmp_path / "a"), PickledSource)
    assert isinstance(open_weights(tmp_path / "a" / "pytorch_model.bin"), PickledSource)
    base.save_pretrained(tmp_path / "a")
    assert isinstance(open_weights(tmp_path / "a"), SafetensorsSource)


def test_streaming_reads_pickled_files(tmp_path):
    base = tied_llama()
    experts = {str(i): expert for i, expert in enumerate(experts_of(base))}
    folders = {name: pickled(expert, tmp_path / name, 2) for name, expert in experts.items()}
    upscale_to_folder(pickled(base, tmp_path / "base"), folders, tmp_path / "streamed", **OPTIONS)
    streamed, expected = load(tmp_path / "streamed").state_dict(), upscale(base, experts, **OPTIONS).state_dict()
    assert all(torch.equal(streamed[name], tensor) for name, tensor in expected.items())
    assert not list((tmp_path / "streamed").glob("*.bin*"))


class Unpickled:
    """Something that must never be created from a file."""


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda file: file.write_bytes(b"no pickle"), "can't be read"),
        (lambda file: torch.save({"a": Unpickled()}, file), "holds more than tensors"),
        (lambda file: torch.save(torch.zeros(3), file), "is no state dict"),
        (lambda file: torch.save({"a": 1}, file), "is no state dict"),
    ],
    ids=["damaged", "other objects", "a tensor", "a number"],
)
def test_other_files_are_refused_in_one_line(tmp_path, write, message):
    write(tmp_path / "pytorch_model.bin")
    with pytest.raises(PlanError) as error:
        upscale(mlp(), {"a": tmp_path}, **OPTIONS)
    assert message in str(error.value)
    assert str(error.value).startswith(f"expert 'a': {tmp_path}")
    assert "\n" not in str(error.value)


def test_a_missing_shard_is_named(tmp_path):
    folder = pickled(mlp(), tmp_path / "a", 2)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(PlanError, match=r"lacks pytorch_model-00002-of-00002\.bin"):
        upscale(mlp(), {"a": folder}, **OPTIONS)


def test_adapters_in_the_older_format_are_read_as_factors(tmp_path):
    base = clip_tower()
    peft = get_peft_model(clip_tower(), LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    peft.save_pretrained(tmp_path / "new")
    peft.save_pretrained(tmp_path / "old", safe_serialization=False)
    assert (tmp_path / "old" / "adapter_model.bin").exists()
    x = clip_inputs()
    results = [output(upscale(base, {"a": tmp_path / kind}, **OPTIONS), x) for kind in ("new", "old")]
    assert torch.equal(*results)
