"""Names on the hub: files that are missing in the cache are downloaded, and nothing else is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import clip_inputs, clip_tower, experts_of, output
from hub_server import cache_model, hub
from peft import LoraConfig, get_peft_model

from fusion_bench_smile import PlanError, upscale
from fusion_bench_smile.io import existing_path, local_path

OPTIONS = {"k": 4, "gate_k": 2}
SCRIPT = """
import json, sys
from fusion_bench_smile.exceptions import SmileError
from fusion_bench_smile.io import hub_folder
for name in sys.argv[1:]:
    try:
        print(json.dumps(sorted(file.name for file in hub_folder(name).iterdir())))
    except SmileError as error:
        print(json.dumps(str(error)))
"""


def save_models(folder: Path) -> dict[str, Path]:
    """A model in one and in several files, an older one, adapters in both formats, and a folder without weights."""
    folders = {f"org/{name}": folder / name for name in ("one", "shards", "old", "lora", "old_lora", "nothing")}
    model = clip_tower()
    model.save_pretrained(folders["org/one"])
    torch.save(model.state_dict(), folders["org/one"] / "pytorch_model.bin")
    model.save_pretrained(folders["org/shards"], max_shard_size="20KB")
    model.config.save_pretrained(folders["org/old"])
    torch.save(model.state_dict(), folders["org/old"] / "pytorch_model.bin")
    peft = get_peft_model(clip_tower(), LoraConfig(r=2, target_modules=["q_proj"]))
    peft.save_pretrained(folders["org/lora"])
    peft.save_pretrained(folders["org/old_lora"], safe_serialization=False)
    model.config.save_pretrained(folders["org/nothing"])
    return folders


def test_what_is_needed_is_downloaded_once(tmp_path):
    folders = save_models(tmp_path / "models")
    paths = [str(path) for path in sys.path]
    names = [*folders, "org/one", "org/absent"]
    with hub(folders) as (address, downloaded):
        settings = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(paths)}
        environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_HUB_CACHE")} | settings
        command = [sys.executable, "-c", SCRIPT, *names]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    one, shards, old, lora, old_lora, nothing, again, absent = map(json.loads, done.stdout.splitlines())
    assert one == again == ["model.safetensors"]
    assert "model.safetensors.index.json" in shards
    assert len(shards) > 2
    assert old == ["pytorch_model.bin"]
    assert lora == ["adapter_config.json", "adapter_model.safetensors"]
    assert old_lora == ["adapter_config.json", "adapter_model.bin"]
    assert nothing == "org/nothing on the hub has no weight files that can be read one by one; load the model first"
    assert absent.startswith("org/absent is no folder, and can't be downloaded from the hub: 404")
    assert "\n" not in absent
    assert len(downloaded) == len(set(downloaded)) == len(shards) + 6


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_experts_are_named_as_in_from_pretrained(tmp_path, cache):
    base = clip_tower()
    experts = experts_of(base, 2)
    for number, expert in enumerate(experts):
        expert.save_pretrained(tmp_path / str(number))
        cache_model(tmp_path / str(number), cache, f"org/{number}")
    model, x = upscale(base, {"a": "org/0", "b": "org/1"}, **OPTIONS), clip_inputs()
    assert torch.equal(output(model, x), output(upscale(base, experts, **OPTIONS), x))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./nowhere", "the folder ./nowhere does not exist; correct its path"),
        ("~/no-such-folder", "the folder ~/no-such-folder does not exist"),
        ("a/b/c", "'a/b/c' is neither a folder nor the name of a model on the hub; correct its path"),
        (Path("org/name"), "the folder org/name does not exist"),
        ("org/name", "org/name is no folder, its adapter_config.json is not in the cache, and the hub does not answer"),
    ],
    ids=str,
)
def test_what_is_no_folder_and_no_model_is_refused_in_one_line(cache, path, message):
    with pytest.raises(PlanError) as error:
        upscale(clip_tower(), {"dtd": path}, **OPTIONS)
    assert str(error.value).startswith(f"expert 'dtd': {message}")
    assert "\n" not in str(error.value)


def test_folders_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert existing_path("org/name") == local_path("org/name") == Path("org/name")
    assert existing_path("org/other") is None
