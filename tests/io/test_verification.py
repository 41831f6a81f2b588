"""Digests of saved tensors find damage that loading does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import upscaled
from conftest import clip_tower, experts_of, mlp, output

from fusion_bench_smile import CheckpointError, load, save, upscale, upscale_to_folder, verify_checkpoint
from fusion_bench_smile.io.digests import DIGESTS_FILE
from fusion_bench_smile.io.verification import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, _ = upscaled("clip")
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


def flip_a_bit(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.unlink()  # loaded models have mapped it
    file.write_bytes(content)


def test_a_flipped_bit_is_found_and_the_tensor_named(folder):
    whole = load(folder, verify=True)
    assert verify_checkpoint(folder) == len(json.loads((folder / DIGESTS_FILE).read_text())["tensors"]) > 40
    flip_a_bit(sorted(folder.glob("*.safetensors"))[1], -1)
    damaged = load(folder)  # nothing else notices it
    (name,) = [n for n, p in damaged.named_parameters() if not torch.equal(p, whole.get_parameter(n))]
    for check in (verify_checkpoint, lambda path: load(path, verify=True)):
        with pytest.raises(CheckpointError, match=rf"1 of \d+ tensors are damaged \(first: {name}\)"):
            check(folder)


def test_shards_of_two_checkpoints_are_told_apart(folder, tmp_path):
    other, _ = upscaled("clip")
    other.save_pretrained(tmp_path / "other", max_shard_size="20KB")
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes((tmp_path / "other" / shard.name).read_bytes())
    with pytest.raises(CheckpointError, match="tensors are damaged"):
        verify_checkpoint(folder)


def test_edited_options_are_found(folder):
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"top_k": 1', '"top_k": 2'))
    load(folder)
    with pytest.raises(CheckpointError, match="the options were edited"):
        verify_checkpoint(folder)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"tensors": 5}', "[" * 10**5], ids=range(5))
def test_digests_that_are_missing_or_damaged(folder, content):
    (folder / DIGESTS_FILE).unlink()
    if content is not None:
        (folder / DIGESTS_FILE).write_text(content)
    load(folder)
    with pytest.raises(CheckpointError, match=DIGESTS_FILE):
        verify_checkpoint(folder)


def test_all_ways_of_saving_write_digests(tmp_path):
    base = mlp()
    model = upscale(base, experts_of(base, 2), gate_k=2, k=4)
    save(model, tmp_path / "other")
    x = torch.randn(5, 20)
    assert torch.equal(output(load(tmp_path / "other", base, verify=True), {"input": x}), output(model, {"input": x}))
    tower = clip_tower()
    for name, member in zip(("base", "red"), (tower, experts_of(tower, 1)[0]), strict=True):
        member.save_pretrained(tmp_path / name)
    upscale_to_folder(tmp_path / "base", {"red": tmp_path / "red"}, tmp_path / "streamed", k=4, gate_k=2)
    assert verify_checkpoint(tmp_path / "streamed") > 0


def test_the_command(folder, tmp_path, capsys):
    main([str(folder)])
    assert "tensors are as they were saved" in capsys.readouterr().out
    flip_a_bit(sorted(folder.glob("*.safetensors"))[0], -1)
    with pytest.raises(SystemExit) as code:
        main([str(folder), str(tmp_path / "nowhere")])
    assert code.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith("error: ") for line in lines] == [True, True]
    assert "nowhere is not a folder" in lines[1]
