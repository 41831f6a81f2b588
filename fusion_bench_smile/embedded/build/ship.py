"""Put what was built into the package's data folder: float16 weights, low-rank adapters, images as parquet."""

from __future__ import annotations

import io
import json
import shutil
from copy import deepcopy
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPProcessor, PreTrainedModel

from ...factors import truncated_svd
from .images import Images

SHIPPED = {"train": 150, "validation": 300, "test": 600}
ADAPTER_SETTINGS = ("peft_type", "r", "lora_alpha", "target_modules", "modules_to_save", "bias", "inference_mode")
# of the adapters
RANKS = {"gentle": 16, "strong": 16}
NORMS = ["pre_layrnorm", "post_layernorm", "layer_norm1", "layer_norm2"]


def ship_clip(model: CLIPModel, processor: CLIPProcessor, folder: Path) -> None:
    """The whole pretrained model in float16, with its tokenizer and image processor."""
    shutil.rmtree(folder, ignore_errors=True)
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    model.float()


@torch.no_grad()
def extract_adapter(
    pretrained: PreTrainedModel, tuned: PreTrainedModel, rank: int, linear: list[str], norms: list[str]
) -> PeftModel:
    """A full fine-tune as a LoRA adapter: each linear delta truncated to `rank`, biases and norms as they are.

    Everything else goes back to the pretrained model's.
    """
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=linear, modules_to_save=norms, bias="all")
    model = get_peft_model(deepcopy(pretrained), config)
    for name in linear:
        layer = model.base_model.model.get_submodule(name)
        delta = tuned.get_submodule(name).weight - pretrained.get_submodule(name).weight
        factors = truncated_svd(delta, rank)
        root = factors.s.sqrt()  # split evenly: both halves keep a range that float16 resolves well
        layer.lora_A["default"].weight.zero_()[: factors.rank] = root[:, None] * factors.down
        layer.lora_B["default"].weight.zero_()[:, : factors.rank] = factors.up / root
        if layer.base_layer.bias is not None:
            layer.base_layer.bias.copy_(tuned.get_submodule(name).bias)
    for name, module in tuned.named_modules():
        if name.split(".")[-1] in norms:
            wrapped = model.base_model.model.get_submodule(name)
            wrapped.modules_to_save["default"].load_state_dict(module.state_dict())
    return model


def ship_adapter(adapter: PeftModel, folder: Path) -> None:
    """Save an adapter with float16 tensors."""
    shutil.rmtree(folder, ignore_errors=True)
    adapter.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's template says nothing
    settings = json.loads((folder / "adapter_config.json").read_text())
    # older releases of PEFT refuse the settings that newer ones have added
    kept = {key: settings[key] for key in ADAPTER_SETTINGS}
    kept["target_modules"] = sorted(kept["target_modules"])
    (folder / "adapter_config.json").write_text(json.dumps(kept, indent=1) + "\n")
    file = folder / "adapter_model.safetensors"
    save_file({key: value.half().contiguous() for key, value in load_file(file).items()}, file, {"format": "pt"})


def ship_images(images: Images, task: str, folder: Path) -> None:
    """Each split as parquet, as the datasets library stores it: ``image`` (WebP, lossless) and ``label``."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in SHIPPED.items():
        pixels, labels = images[split]
        encoded = []
        for array in pixels[:count]:
            buffer = io.BytesIO()
            Image.fromarray(array).save(buffer, format="WEBP", lossless=True, method=6)
            encoded.append({"bytes": buffer.getvalue(), "path": None})
        struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table({"image": pa.array(encoded, type=struct), "label": pa.array(labels[:count])})
        features = (
            '{"info": {"features": {"image": {"_type": "Image"}, "label": {"dtype": "int64", "_type": "Value"}}}}'
        )
        pq.write_table(table.replace_schema_metadata({"huggingface": features}), folder / f"{task}-{split}.parquet")
