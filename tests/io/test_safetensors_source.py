"""The safetensors files of a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import clip_inputs, clip_tower, experts_of, mlp, output, t5, t5_inputs, tied_llama
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel

from fusion_bench_smile import CheckpointError, PlanError, upscale
from fusion_bench_smile.io import SafetensorsSource, StateDictSource
from fusion_bench_smile.io.file_source import MAX_MAPPED_BYTES
from fusion_bench_smile.io.safetensors_source import check_tensors

OPTIONS = {"k": 4, "gate_k": 2}


def saved(models: list[nn.Module], folder: Path, **kwargs) -> dict[str, Path]:
    for number, model in enumerate(models):
        model.save_pretrained(folder / str(number), **kwargs)
    return {str(number): folder / str(number) for number in range(len(models))}


@pytest.mark.parametrize("shard", ["1GB", "8KB"])
@pytest.mark.parametrize(
    ("make", "inputs"),
    [(clip_tower, clip_inputs), (t5, t5_inputs), (tied_llama, lambda: {"input_ids": torch.randint(1, 40, (2, 5))})],
)
def test_files_give_the_model_that_modules_give(tmp_path, make, inputs, shard):
    model = make()
    experts = experts_of(model)
    x = inputs()
    from_files = upscale(model, saved(experts, tmp_path, max_shard_size=shard), **OPTIONS)
    expected = upscale(model, experts, **OPTIONS)
    assert torch.equal(output(from_files, x), output(expected, x))


def test_another_component_in_the_files_is_left_out(tmp_path):
    config = CLIPConfig(
        text_config={
            "vocab_size": 20,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
        },
        vision_config=clip_tower().config.to_dict(),
        projection_dim=8,
    )
    whole = CLIPModel(config)
    whole.save_pretrained(tmp_path / "whole")
    pretrained = clip_tower()
    source = SafetensorsSource(tmp_path / "whole", like=StateDictSource(pretrained.state_dict()).shapes())
    assert set(source.shapes()) == set(pretrained.state_dict())
    from_files = upscale(pretrained, {"a": tmp_path / "whole"}, **OPTIONS)
    tower = clip_tower()
    tower.vision_model.load_state_dict(whole.vision_model.state_dict())
    x = clip_inputs()
    assert torch.equal(output(from_files, x), output(upscale(pretrained, {"a": tower}, **OPTIONS), x))


def test_damaged_and_missing_files_are_named(tmp_path):
    model = clip_tower()
    folders = saved(experts_of(model), tmp_path, max_shard_size="8KB")
    shards = sorted(folders["1"].glob("*.safetensors"))
    shards[1].write_bytes(shards[1].read_bytes()[:-20])
    with pytest.raises(PlanError, match=rf"expert '1': .*{shards[1].name} can't be read.*incomplete or corrupt"):
        upscale(model, folders, **OPTIONS)
    shards[1].unlink()
    with pytest.raises(PlanError, match=f"lacks {shards[1].name}"):
        upscale(model, folders, **OPTIONS)
    with pytest.raises(PlanError, match="nowhere does not exist"):
        upscale(model, {"0": tmp_path / "nowhere"}, **OPTIONS)
    with pytest.raises(PlanError, match=r"holds neither model.safetensors"):
        upscale(model, {"0": tmp_path}, **OPTIONS)


def test_every_tensor_is_read_as_it_was_saved(tmp_path):
    state = mlp().state_dict()
    save_file(state, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    assert source.shapes() == {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert all(torch.equal(source.read(name), tensor) for name, tensor in state.items())
    assert source.low_rank("0.weight") is None
    assert not source.is_pretrained("0.weight")
    halved = SafetensorsSource(tmp_path / "model.safetensors", dtypes={"0.weight": torch.float16})
    assert halved.read("0.weight").dtype == torch.float16
    assert halved.read("0.bias").dtype == torch.float32


def test_an_identity_changes_with_the_file_the_name_and_the_dtype(tmp_path):
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    identities = [source.identity("a"), source.identity("b")]
    assert identities[0] == SafetensorsSource(tmp_path).identity("a")
    identities.append(SafetensorsSource(tmp_path, dtypes={"a": torch.float16}).identity("a"))
    save_file({"a": torch.zeros(3)}, tmp_path / "new")
    (tmp_path / "new").replace(tmp_path / "model.safetensors")
    identities.append(SafetensorsSource(tmp_path).identity("a"))
    assert len(set(identities)) == 4


def test_more_than_the_mapped_bytes_is_read(tmp_path):
    rows = MAX_MAPPED_BYTES // 4 // 1024 // 2 + 1
    state = {str(number): torch.full((rows, 1024), float(number)) for number in range(5)}
    save_file(state, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in state.items())


def test_a_tied_tensor_is_read_under_its_stored_name(tmp_path):
    save_file({"a": torch.arange(3.0)}, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path, aliases={"a": ("b",), "b": ("a",), "c": ("d",)})
    assert source.shapes() == {"a": (3,), "b": (3,)}
    assert torch.equal(source.read("b"), torch.arange(3.0))


def test_required_tensors_are_compared_with_the_headers(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds neither .* this is no complete SMILE checkpoint"):
        check_tensors(tmp_path, {})
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    check_tensors(tmp_path, {"a": (3,)})
    with pytest.raises(CheckpointError, match=r"lacks 2 of 3 tensors \(first: b\)"):
        check_tensors(tmp_path, {"a": (3,), "b": (1,), "c": (1,)})
    with pytest.raises(CheckpointError, match=r"a has the shape \(3,\), its config says \(4,\)"):
        check_tensors(tmp_path, {"a": (4,)})


def test_files_of_a_model_with_a_head(tmp_path):
    """As ``from_pretrained`` reads them: the base model inside loses its prefix, the head is left out."""
    base, head = torch.randn(3, 4), torch.randn(2, 3)
    save_file({"transformer.h.0.weight": base, "score.weight": head}, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path, like={"h.0.weight": (3, 4)})
    assert source.shapes() == {"h.0.weight": (3, 4)}
    assert source.read("h.0.weight").equal(base)
    towers = SafetensorsSource(tmp_path, like={"h.0.weight": (3, 4), "weight": (2, 3)})
    assert "h.0.weight" not in towers.shapes(), "two prefixes are those of no base model"
