"""Save, reload in a fresh process, and refuse what is not whole."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, experts_of, mlp, mlp_inputs, output, tied_llama
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fusion_bench_smile import CheckpointError, SmileLinear, load, save, upscale

OPTIONS = [
    {"gate_k": 2, "k": 4},
    {"gate_k": 6, "k": 4, "top_k": 2, "average_experts": True},
    {"gate_k": 2, "k": -1, "routing_use_diff": False},
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


def upscaled(architecture: str, **options: object) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    make_model, make_inputs = ARCHITECTURES[architecture]
    base = make_model()
    return upscale(base, experts_of(base), **{"gate_k": 2, "k": 4, **options}), make_inputs()


@pytest.mark.parametrize("architecture", ["clip", "t5"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_plain_from_pretrained_gives_the_same_bits(architecture, options, tmp_path):
    model, inputs = upscaled(architecture, **options)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1, "one shard shows nothing"
    again = type(model).from_pretrained(tmp_path / "model").eval()
    assert torch.equal(output(again, inputs), output(model, inputs))
    assert torch.equal(output(load(tmp_path / "model").eval(), inputs), output(model, inputs))
    again.save_pretrained(tmp_path / "again")  # a loaded model can be saved as well
    third = load(tmp_path / "again").eval()
    assert torch.equal(output(third, inputs), output(model, inputs))
    assert again.half().dtype == torch.float16
    assert type(model).from_pretrained(tmp_path / "model", torch_dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_fresh_process_that_only_imports_the_package(tmp_path):
    model, inputs = upscaled("clip")
    save(model, tmp_path / "model")
    torch.save(inputs, tmp_path / "inputs.pt")
    arguments = ["CLIPVisionModel", str(tmp_path / "model"), str(tmp_path / "inputs.pt"), str(tmp_path / "out.pt")]
    subprocess.run([sys.executable, "-c", FRESH, *arguments], check=True, cwd=tmp_path, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "out.pt"), output(model, inputs))


def test_any_module_is_saved_and_loaded_into_its_pretrained_model(tmp_path):
    base = mlp()
    model = upscale(base, experts_of(base), gate_k=2, k=4)
    save(model, tmp_path / "mlp")
    inputs = mlp_inputs()
    assert torch.equal(output(load(tmp_path / "mlp", base).eval(), inputs), output(model, inputs))
    assert not any(isinstance(m, SmileLinear) for m in base.modules())
    with pytest.raises(CheckpointError, match="give the pretrained model"):
        load(tmp_path / "mlp")


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


def damaged(kind: str, folder: Path) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    tensors = load_file(weights)
    routed = next(name for name in tensors if name.endswith(".up"))
    plain = next(name for name in tensors if "layer_norm1" in name)
    values = json.loads(config.read_text())
    if kind == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "garbage weights":
        weights.write_bytes(b"not a safetensors file")
    elif kind == "no weights":
        weights.unlink()
    elif kind == "no config":
        config.unlink()
    elif kind == "broken config":
        config.write_text(config.read_text()[:50])
    elif kind == "missing expert tensor":
        save_file({k: v for k, v in tensors.items() if k != routed}, weights, {"format": "pt"})
    elif kind == "missing plain tensor":
        save_file({k: v for k, v in tensors.items() if k != plain}, weights, {"format": "pt"})
    elif kind == "wrong shape":
        save_file({**tensors, routed: tensors[routed][:, :-1].contiguous()}, weights, {"format": "pt"})
    elif kind in ("newer format", "older format"):
        values["quantization_config"]["format_version"] = 99 if kind == "newer format" else 1
        config.write_text(json.dumps(values))
    elif kind == "another model":
        del values["quantization_config"]
        config.write_text(json.dumps(values))


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
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_not_whole_is_refused(kind, tmp_path):
    model, _ = upscaled("clip")
    save(model, tmp_path / "model")
    damaged(kind, tmp_path / "model")
    with pytest.raises(CheckpointError, match=DAMAGE[kind]):
        load(tmp_path / "model")


@pytest.mark.parametrize("kind", ["missing expert tensor", "missing plain tensor", "newer format", "truncated weights"])
def test_plain_from_pretrained_never_fills_in_random_weights(kind, tmp_path):
    model, _ = upscaled("clip")
    save(model, tmp_path / "model")
    damaged(kind, tmp_path / "model")
    with pytest.raises((CheckpointError, SafetensorError)):
        type(model).from_pretrained(tmp_path / "model")


def test_an_existing_result_is_replaced_by_a_whole_one_or_not_at_all(tmp_path, monkeypatch):
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


def interrupted(*args: object, **kwargs: object) -> str:
    raise KeyboardInterrupt


def test_a_killed_save_leaves_nothing_that_looks_whole(tmp_path):
    """SIGKILL in the middle of writing: the target does not exist, what lies beside it has a temporary name."""
    script = """
import os, signal, sys, torch
sys.path.insert(0, sys.argv[1])
from test_checkpoint import upscaled
import transformers.modeling_utils as m
model, _ = upscaled("clip")
real = type(model.config).save_pretrained
def killed(self, folder, **kwargs):
    real(self, folder, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
type(model.config).save_pretrained = killed
model.save_pretrained(sys.argv[2])
"""
    target = tmp_path / "out" / "model"
    done = subprocess.run([sys.executable, "-c", script, str(Path(__file__).parent), str(target)], capture_output=True)
    assert done.returncode == -9
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
