"""Full fine-tunes as low-rank adapters, the form in which the zoo distributes them."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from fusion_bench_smile.construction import truncated_svd

# releases of PEFT refuse settings of later releases; these are known to all that the library supports
ADAPTER_SETTINGS = ("peft_type", "r", "lora_alpha", "target_modules", "modules_to_save", "bias", "inference_mode")


@torch.no_grad()
def extract_adapter(
    pretrained: PreTrainedModel, tuned: PreTrainedModel, rank: int, linear: list[str], norms: list[str]
) -> PeftModel:
    """Approximate a full fine-tune by a LoRA adapter: the truncated SVD of every linear delta, all biases, all norms.

    Args:
        pretrained: base model of the adapter; it is copied.
        tuned: the fine-tuned model.
        rank: of the adapter.
        linear: names of the linear layers.
        norms: last parts of the names of normalisation layers, which are stored as a whole.

    Returns:
        The adapter on a copy of `pretrained`; all other parameters are those of `pretrained`.
    """
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=linear, modules_to_save=norms, bias="all")
    model: Any = get_peft_model(deepcopy(pretrained), config)
    for name in linear:
        layer = model.base_model.model.get_submodule(name)
        delta = tuned.get_parameter(f"{name}.weight") - pretrained.get_parameter(f"{name}.weight")
        factors = truncated_svd(delta, rank)
        root = factors.s.sqrt()  # split evenly: both factors keep a range that float16 resolves well
        layer.lora_A["default"].weight.zero_()[: factors.rank] = root[:, None] * factors.down
        layer.lora_B["default"].weight.zero_()[:, : factors.rank] = factors.up / root
        if layer.base_layer.bias is not None:
            layer.base_layer.bias.copy_(tuned.get_parameter(f"{name}.bias"))
    for name, module in tuned.named_modules():
        if name.split(".")[-1] in norms:
            wrapper = model.base_model.model.get_submodule(name)
            wrapper.modules_to_save["default"].load_state_dict(module.state_dict())
    return model


def save_adapter(adapter: PeftModel, folder: Path) -> None:
    """Save an adapter with float16 tensors and the settings `ADAPTER_SETTINGS`; an existing folder is replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    adapter.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty template
    settings = json.loads((folder / "adapter_config.json").read_text())
    kept = {key: settings[key] for key in ADAPTER_SETTINGS}
    kept["target_modules"] = sorted(kept["target_modules"])
    (folder / "adapter_config.json").write_text(json.dumps(kept, indent=1) + "\n")
    file = folder / "adapter_model.safetensors"
    save_file({key: value.half().contiguous() for key, value in load_file(file).items()}, file, {"format": "pt"})
