"""Values of a checkpoint are validated before anything is built from them."""

from __future__ import annotations

import copy
import json
import resource
from typing import Any

import pytest
from checkpoints import MINIMAL, upscaled
from hypothesis import given
from hypothesis import strategies as st

from fusion_bench_smile import CheckpointError, calibrate, load, metadata_of, save
from fusion_bench_smile.io import SmileMetadata
from fusion_bench_smile.io.schema import read_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of all values in nested JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [prefix, *(path for key, inner in items for path in paths(inner, (*prefix, key)))]


def replaced(values: Any, path: tuple[Any, ...], value: Any) -> Any:
    changed = copy.deepcopy(values)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


@given(st.sampled_from(paths(MINIMAL)[1:]), JSON)
def test_any_value_gives_metadata_or_one_clear_error(path, value):
    metadata, message = None, "folder: "
    try:
        metadata = SmileMetadata.from_dict(replaced(MINIMAL, path, value), "folder")
    except CheckpointError as error:
        message = str(error)
    assert message.startswith("folder")
    assert message.isprintable()
    assert metadata is None or SmileMetadata.from_dict(metadata.to_dict()) == metadata


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("layers", "0", "ranks"), [2], "0 has ranks of 1 experts, there are 2"),
        (("layers", "0", "ranks"), [2, -7], "layers.0.ranks.1"),
        (("layers", "0", "gate_ranks"), [10**9, 1], "layers.0.gate_ranks.0"),
        (("layers", "0", "ranks"), [2, "2"], "layers.0.ranks.1"),
        (("experts",), ["a"], "there are 1"),
        (("experts",), ["a", "a"], "two experts are called 'a'"),
        (("options", "storage"), "int2", "storage='int2' is not one of"),
        (("options", "target_modules"), 5, "options were edited"),
        (("options", "top_k"), 3, "top_k"),
        (("recipe",), {"energy": {"1": [1.0, 1.0]}}, "energy of 1: no upscaled layer"),
        (("flat_weights",), ["1"], "1 is no upscaled layer"),
    ],
)
def test_the_message_names_the_wrong_value(path, value, message):
    with pytest.raises(CheckpointError, match=message):
        SmileMetadata.from_dict(replaced(MINIMAL, path, value))


def test_no_memory_is_allocated_for_ranks_that_the_files_do_not_have(tmp_path):
    model, _ = upscaled("clip")
    save(model, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    layer = next(iter(config["quantization_config"]["layers"].values()))
    layer["ranks"] = [2**24] * len(layer["ranks"])  # 2 GB a matrix
    file.write_text(json.dumps(config))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (load, type(model).from_pretrained):
        with pytest.raises(CheckpointError, match=r"has the shape .*, its config says \(503316\d\d, "):
            read(tmp_path / "model")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10**6  # kB


@pytest.mark.parametrize("content", ["{", "[" * 10**5, "[]", "5", '"text"', "\xff\xfe", "1" * 5000], ids=range(7))
def test_files_without_a_json_object(content, tmp_path):
    (tmp_path / "file.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"file\.json is not readable JSON: ") as error:
        read_json(tmp_path / "file.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["router", "layer"])
def test_tensors_that_the_config_does_not_describe_are_refused(part, tmp_path):
    model, inputs = upscaled("clip", routing_scope="input")
    calibrate(model, {name: [inputs] for name in metadata_of(model).experts})
    save(model, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    section = config["quantization_config"]
    if part == "router":
        del section["router"]
    else:
        section["layers"].popitem()
        section["recipe"]["energy"].popitem()
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="tensors of experts that its config does not describe"):
        load(tmp_path / "model")


def test_text_that_is_no_unicode():
    with pytest.raises(CheckpointError, match=r"^folder: "):
        SmileMetadata.from_dict({**MINIMAL, "flat_weights": ["\ud800"]}, "folder")
