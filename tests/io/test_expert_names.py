"""Names of experts and files never lead out of a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import upscaled
from conftest import clip_tower, experts_of
from hypothesis import given
from hypothesis import strategies as st

from fusion_bench_smile import CheckpointError, PlanError, add_expert, load, save, upscale, upscale_to_folder
from fusion_bench_smile.io.names import MAX_BYTES, check_expert_names, name_problem

HOSTILE = ["", " ", ".", "..", "../x", "/x", "a/b", "a\\b", "a\0", "a\nb", "a\x7f", "\ud800", "x" * 300, "ä" * 150]


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_hostile_names_are_refused_in_one_line(name):
    with pytest.raises(PlanError, match="use a plain name, such as sun397") as error:
        check_expert_names(["good", name])
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 150


@pytest.mark.parametrize("name", ["sun397", "glue-cola", "SST 2", "Überbau", ".hidden", "a..b", "0", "x" * MAX_BYTES])
def test_plain_names_are_accepted(name):
    check_expert_names([name])


def test_two_experts_of_one_name():
    with pytest.raises(PlanError, match="two experts are called 'a'"):
        check_expert_names(["a", "b", "a"])


@given(st.text())
def test_an_accepted_name_is_one_entry_of_a_folder(name):
    if not name_problem(name):
        assert Path("folder", name).parent == Path("folder")
        assert Path("folder", name).name == name
        assert len(name.encode()) <= MAX_BYTES


def test_names_are_checked_wherever_they_enter(tmp_path):
    base = clip_tower()
    red, green = experts_of(base, 2)
    for name, model in {"base": base, "red": red}.items():
        model.save_pretrained(tmp_path / name)
    with pytest.raises(PlanError, match="expert's name"):
        upscale(base, {"../x": red, "green": green}, gate_k=2, k=4)
    with pytest.raises(PlanError, match="expert's name"):
        upscale_to_folder(tmp_path / "base", {"../x": tmp_path / "red"}, tmp_path / "out", gate_k=2, k=4)
    with pytest.raises(PlanError, match="expert's name"):
        add_expert(upscale(base, {"green": green}, gate_k=2, k=4), red, "..")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "red"]


@pytest.mark.parametrize("name", ["../home/x", "", "..", "a\nb"])
def test_a_checkpoint_with_such_a_name_is_refused(name, tmp_path):
    model, _ = upscaled("clip")
    save(model, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["experts"][0] = name
    file.write_text(json.dumps(config))
    for read in (load, type(model).from_pretrained):
        with pytest.raises(CheckpointError, match="expert's name"):
            read(tmp_path / "model")


def test_an_index_names_files_of_its_folder(tmp_path):
    model, _ = upscaled("clip")
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    file = tmp_path / "model" / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    for value, message in (("../model.safetensors", "contains '/'"), (5, "is no string"), ("", "names no file")):
        index["weight_map"][next(iter(index["weight_map"]))] = value
        file.write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=f"the file's name .*{message}"):
            load(tmp_path / "model")
    file.write_text('{"weight_map": []}')
    with pytest.raises(CheckpointError, match="lists no files"):
        load(tmp_path / "model")
