"""Save and load, and refuse incomplete checkpoints."""

from __future__ import annotations

import itertools
import json
import os
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from checkpoints import damage, upscaled
from command_line import start_code
from conftest import experts_of, mlp, mlp_inputs, output, tied_llama

from fusion_bench_smile import CheckpointError, SmileLinear, load, metadata_of, save, upscale
from fusion_bench_smile.io import is_checkpoint
from fusion_bench_smile.io.checkpoint import copy_companions, is_companion

TESTS = Path(__file__).resolve().parents[1]


def test_any_module_is_saved_and_loaded_into_its_pretrained_model(tmp_path):
    base = mlp()
    model = upscale(base, experts_of(base), gate_k=2, k=4)
    save(model, tmp_path / "mlp")
    inputs = mlp_inputs()
    assert torch.equal(output(load(tmp_path / "mlp", base).eval(), inputs), output(model, inputs))
    assert not any(isinstance(m, SmileLinear) for m in base.modules())
    with pytest.raises(CheckpointError, match="give the pretrained model"):
        load(tmp_path / "mlp")


DAMAGE = {
    "truncated weights": "incomplete or corrupt",
    "garbage weights": "incomplete or corrupt",
    "no weights": "holds neither model.safetensors",
    "no config": "not a complete SMILE checkpoint",
    "broken config": "not readable JSON",
    "missing expert tensor": "lacks 1 of",
    "missing plain tensor": "lacks 1 of",
    "wrong shape": "has the shape",
    "newer format": "upgrade fusion-bench-smile",
    "older format": "build the model again",
    "another model": "has no SMILE section",
    "contradicting option": "top_k is 3 in vision_model.* and 1 in the options",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoints_are_refused(kind, tmp_path):
    model, _ = upscaled("clip")
    save(model, tmp_path / "model")
    damage(kind, tmp_path / "model")
    with pytest.raises(CheckpointError, match=DAMAGE[kind]):
        load(tmp_path / "model")


def test_an_existing_checkpoint_is_replaced_by_a_complete_one_or_not_at_all(tmp_path, monkeypatch):
    model, inputs = upscaled("clip")
    folder = tmp_path / "model"
    save(model, folder)
    (folder / "tokenizer.json").write_text("{}")
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    monkeypatch.setattr(json, "dumps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(model, folder)
    monkeypatch.undo()
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    assert os.listdir(tmp_path) == ["model"]
    other, _ = upscaled("clip", k=8)
    save(other, folder, max_shard_size="20KB")
    assert not (folder / "model.safetensors").exists()
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert torch.equal(output(load(folder).eval(), inputs), output(other, inputs))


def test_a_checkpoint_that_is_replaced_while_it_is_loaded_is_one_of_both(tmp_path):
    (first, inputs), (second, _) = upscaled("clip"), upscaled("clip")
    expected = [output(model, inputs) for model in (first, second)]
    folder, stop, loads = tmp_path / "model", threading.Event(), 0
    save(first, folder, max_shard_size="20KB")

    def replace_again_and_again() -> None:
        for model in itertools.cycle((second, first)):
            if stop.wait(0.1):
                return
            save(model, folder, max_shard_size="20KB")

    writer = threading.Thread(target=replace_again_and_again)
    writer.start()
    try:
        for read in [load, type(first).from_pretrained] * 20:
            if loads == 6:
                break
            with suppress(CheckpointError, OSError):  # from_pretrained misses a file that is gone
                found = output(read(folder).eval(), inputs)
                assert any(torch.equal(found, one) for one in expected)
                loads += 1
    finally:
        stop.set()
        writer.join()
    assert loads, "without a load the test shows nothing"


def interrupted(*args: object, **kwargs: object) -> str:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_a_killed_save_leaves_nothing_that_looks_complete(tmp_path):
    """After SIGKILL in the middle of writing there is no target, and a temporary name beside it."""
    script = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from checkpoints import upscaled
model, _ = upscaled("clip")
real = type(model.config).save_pretrained
def killed(self, folder, **kwargs):
    real(self, folder, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
type(model.config).save_pretrained = killed
model.save_pretrained(sys.argv[2])
"""
    target = tmp_path / "out" / "model"
    assert start_code(script, str(TESTS), str(target)).wait() == -9
    assert not target.exists()
    left = os.listdir(tmp_path / "out")
    assert left
    assert all(name.startswith(".model.") and name.endswith(".part") for name in left)


def test_paths_that_cannot_be_written_are_refused(tmp_path):
    model, _ = upscaled("clip")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        save(model, file)
    with pytest.raises(CheckpointError, match="nothing can be written to"):
        save(model, file / "model")
    with pytest.raises(CheckpointError, match="nothing can be written to"):
        save(model, "/proc/smile/model")


def test_only_upscaled_models_are_saved(tmp_path):
    with pytest.raises(CheckpointError, match="was not made by upscale"):
        save(mlp(), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_companions_are_files_that_are_no_weights(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    names = ["tokenizer.json", "vocab.txt", "config.json", "model.safetensors", "model.safetensors.index.json", "a.py"]
    for name in names:
        (source / name).write_text("source")
    (target / "vocab.txt").write_text("target")
    copy_companions(source, target)
    assert {file.name: file.read_text() for file in target.iterdir()} == {
        "tokenizer.json": "source", "vocab.txt": "target",
    }  # fmt: skip
    assert [name for name in (*names, "pytorch_model.bin") if not is_companion(name)] == [
        "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
    ]  # fmt: skip


def test_files_beside_the_pretrained_weights_are_carried_along(tmp_path):
    base = tied_llama()
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("tokens")
    base = type(base).from_pretrained(tmp_path / "base")
    save(upscale(base, experts_of(base, 2), gate_k=2, k=4), tmp_path / "model")
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "tokens"


def test_a_folder_with_files_may_be_a_checkpoint(tmp_path):
    assert not is_checkpoint(tmp_path / "nowhere")
    assert not is_checkpoint(tmp_path)
    (tmp_path / "file").write_text("")
    assert is_checkpoint(tmp_path)
    assert not is_checkpoint(tmp_path / "file")


def test_what_is_no_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        load(tmp_path / "nowhere")


def test_the_metadata_survives(tmp_path):
    for architecture in ("clip", "mlp"):
        model, _ = upscaled(architecture, routing_scope="input")
        save(model, tmp_path / architecture)
        pretrained = mlp() if architecture == "mlp" else None
        assert metadata_of(load(tmp_path / architecture, pretrained)) == metadata_of(model)
