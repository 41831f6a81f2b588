"""Small models with the names, architectures and file formats of those on the hub.

The vision models and causal language models have random weights. The T5 models are those of the zoo, whose answers are
words.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
from fusion_bench.tasks.clip_classification import get_num_classes
from hub.byte_tokenizer import VOCABULARY, byte_tokenizer, save_gpt2_tokenizer
from hub.data_sets import GLUE, IMAGE_SETS
from hub.repositories import Cache
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)
from transformers.utils import logging

import smile_zoo.images
from smile_zoo import tiny_t5

MERGEBENCH = ("Llama-3.1-8B", "Llama-3.1-8B-Instruct", "Llama-3.2-3B", "Llama-3.2-3B-Instruct", "gemma-2-2b",
              "gemma-2-2b-it", "gemma-2-9b", "gemma-2-9b-it")  # fmt: skip
MERGEBENCH_TASKS = ("instruction", "math", "coding", "multilingual", "safety")
IMAGE_SIZE = 32


def add_models(cache: Cache) -> None:
    """Add all models."""
    logging.set_verbosity_error()
    for number, add in enumerate((add_clip, add_clip_adapters, add_t5, add_language_models, add_gpt2, add_classifiers)):
        torch.manual_seed(number)
        add(cache)


def add_clip(cache: Cache) -> None:
    """OpenAI's CLIP models, the base ones pickled, and their vision towers fine-tuned on eight tasks."""
    for name, layers in (("base-patch32", 2), ("base-patch16", 2), ("large-patch14", 3)):
        model = _clip(layers)
        folder = cache.add_model(f"openai/clip-vit-{name}")
        _save_pickled(model, folder) if name.startswith("base") else model.save_pretrained(folder)
        _clip_processor().save_pretrained(folder)
        tower = CLIPVisionModel(model.config.vision_config)
        tower.vision_model.load_state_dict(model.vision_model.state_dict())
        for seed, task in enumerate(IMAGE_SETS):
            _fine_tuned(tower, seed).save_pretrained(cache.add_model(f"tanganke/clip-vit-{name}_{task}"))


def add_clip_adapters(cache: Cache) -> None:
    """LoRA adapters of the module inside CLIP's vision tower, whose names lack the tower's ``vision_model``."""
    base = CLIPVisionModel.from_pretrained(cache.model("openai/clip-vit-base-patch16")).vision_model
    for task in IMAGE_SETS:
        adapted = get_peft_model(
            copy.deepcopy(base), LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])
        )
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
        adapted.peft_config["default"].base_model_name_or_path = "openai/clip-vit-base-patch16"
        adapted.save_pretrained(cache.add_model(f"tanganke/clip-vit-base-patch16_{task}_lora-16"))


def add_t5(cache: Cache) -> None:
    """Flan-T5, fine-tuned on GLUE as a whole, and as LoRA adapters of queries and values; one of them is pickled."""
    base = cache.add_model("google/flan-t5-base")
    for file in (tiny_t5.DATA / "t5").iterdir():
        (base / file.name).symlink_to(file)
    for task in GLUE:
        expert = tiny_t5.load_expert(task).half()
        expert.save_pretrained(cache.add_model(f"tanganke/flan-t5-base_glue-{task}"))
        _save_t5_adapter(tiny_t5.expert_folder(task), cache.add_model(f"tanganke/flan-t5-base_glue-{task}_lora-16"))


def _save_t5_adapter(source: Path, folder: Path) -> None:
    """The part of an adapter of the zoo that a published one has."""
    weights = load_file(source / "adapter_model.safetensors")
    weights = {name: value for name, value in weights.items() if name.split(".lora_")[0].endswith((".q", ".v"))}
    config = json.loads((source / "adapter_config.json").read_text())
    config |= {
        "base_model_name_or_path": "google/flan-t5-base", "target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM",
        "modules_to_save": None, "bias": "none",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    pickled = source.name == "stsb"
    if pickled:
        torch.save(weights, folder / "adapter_model.bin")
    else:
        save_file(weights, folder / "adapter_model.safetensors")


def add_language_models(cache: Cache) -> None:
    """Mistral, Llama, Qwen and Gemma in bfloat16. Some experts have added tokens, as MetaMath has."""
    mistral = _causal(MistralForCausalLM, MistralConfig, num_key_value_heads=2, sliding_window=64)
    llama = _causal(LlamaForCausalLM, LlamaConfig)
    qwen = _causal(Qwen2ForCausalLM, Qwen2Config, num_key_value_heads=2, tie_word_embeddings=True)
    for name, model, added_tokens, shards in (
        ("mistralai/Mistral-7B-v0.1", mistral, 0, 2), ("meta-math/MetaMath-Mistral-7B", mistral, 1, -2),
        ("cognitivecomputations/dolphin-2.1-mistral-7b", mistral, 2, 2),
        ("uukuguy/speechless-code-mistral-7b-v1.0", mistral, 2, 1),
        ("meta-llama/Llama-2-7b-hf", llama, 0, 2), ("meta-llama/Llama-2-7b-chat-hf", llama, 0, 1),
        ("WizardLMTeam/WizardMath-7B-V1.0", llama, 1, -2), ("codellama/CodeLlama-7b-hf", llama, 16, 1),
        ("lmsys/vicuna-7b-v1.5", llama, 0, -2),
        ("Qwen/Qwen2.5-1.5B", qwen, 0, 1), ("Qwen/Qwen2.5-Math-1.5B", qwen, 0, 1),
        ("Qwen/Qwen2.5-Coder-1.5B", qwen, 0, 1), ("Qwen/Qwen2.5-1.5B-Instruct", qwen, 0, 1),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", qwen, 0, 1),
    ):  # fmt: skip
        is_base = name in ("mistralai/Mistral-7B-v0.1", "meta-llama/Llama-2-7b-hf", "Qwen/Qwen2.5-1.5B")
        expert = model if is_base else _fine_tuned(model, len(name))
        _add_language_model(cache, name, expert, added_tokens, shards)
    _add_mergebench(cache)


def _add_mergebench(cache: Cache) -> None:
    gemma = {"head_dim": 8, "num_key_value_heads": 2, "sliding_window": 64, "attn_implementation": "eager"}
    for base in MERGEBENCH:
        if base.startswith("Llama"):
            tied = base.startswith("Llama-3.2")
            model = _causal(LlamaForCausalLM, LlamaConfig, num_key_value_heads=2, tie_word_embeddings=tied)
            _add_language_model(cache, f"meta-llama/{base}", model)
        else:
            model = _causal(Gemma2ForCausalLM, Gemma2Config, **gemma)
            _add_language_model(cache, f"google/{base}", model)
        for seed, task in enumerate(MERGEBENCH_TASKS):
            _add_language_model(cache, f"MergeBench/{base}_{task}", _fine_tuned(model, seed))


def _add_language_model(cache: Cache, name: str, model: nn.Module, added_tokens: int = 0, shards: int = 1) -> None:
    """Save a model with a tokenizer, in some safetensors files, or in pickled ones for a negative number of them."""
    folder = cache.add_model(name)
    if added_tokens:
        model = copy.deepcopy(model)
        model.resize_token_embeddings(VOCABULARY + added_tokens, mean_resizing=False)
    if shards < 0:
        _save_pickled(model, folder, -shards)
    else:
        size = sum(parameter.nbytes for parameter in model.parameters())
        model.save_pretrained(folder, max_shard_size=size // shards + 1)
    byte_tokenizer().save_pretrained(folder)


def _causal(model: Callable[..., nn.Module], config: Callable[..., object], **options: object) -> nn.Module:
    common = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 4, "max_position_embeddings": 256, "initializer_range": 0.2, "bos_token_id": 257,
        "eos_token_id": 258, "pad_token_id": 258,
    }  # fmt: skip
    return model(config(**{**common, **options})).bfloat16().eval()


def add_gpt2(cache: Cache) -> None:
    """GPT-2 and its classifiers of seven GLUE tasks; fine-tuning has changed the transformer."""
    options = {"vocab_size": VOCABULARY, "n_positions": 512, "n_embd": 32, "n_layer": 1, "n_head": 2}
    config = GPT2Config(**options, bos_token_id=258, eos_token_id=258, pad_token_id=258, initializer_range=0.2)
    base = GPT2Model(config).eval()
    folder = cache.add_model("gpt2")
    base.save_pretrained(folder)
    save_gpt2_tokenizer(folder)
    for seed, task in enumerate(task for task in GLUE if task != "stsb"):
        config = GPT2Config.from_pretrained(folder, num_labels=3 if task == "mnli" else 2)
        expert = GPT2ForSequenceClassification(config)
        expert.transformer = _fine_tuned(base, seed)
        expert.save_pretrained(cache.add_model(f"tanganke/gpt2_{task}"))


def add_classifiers(cache: Cache) -> None:
    """ConvNeXt, ResNets and DINOv2, which know 1000 classes, and experts of eight tasks with heads of their own."""
    convnext = ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, image_size=IMAGE_SIZE)
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    dinov2 = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2}
    trained = "_sgd_batch-size-64_lr-0.01_steps-4000"
    for name, model, experts in (
        ("facebook/convnext-base-224", ConvNextForImageClassification(convnext), "convnext-base-224_{}" + trained),
        ("microsoft/resnet-18", ResNetForImageClassification(resnet), "resnet-18_{}"),
        ("facebook/dinov2-base-imagenet1k-1-layer", Dinov2ForImageClassification(
            Dinov2Config(**dinov2, patch_size=16, image_size=IMAGE_SIZE)), "dinov2-base_{}"),
    ):  # fmt: skip
        _save_classifier(_with_head(model, 1000), cache.add_model(name))
        for seed, task in enumerate(IMAGE_SETS):
            expert = _with_head(_fine_tuned(model, seed), get_num_classes(task))
            _save_classifier(expert, cache.add_model(f"tanganke/{experts.format(task)}"))


def _with_head(model: nn.Module, classes: int) -> nn.Module:
    """The model itself, with a new head."""
    is_resnet = isinstance(model, ResNetForImageClassification)
    place = "classifier.1" if is_resnet else "classifier"
    head = nn.Linear(model.get_submodule(place).in_features, classes)
    model.set_submodule(place, head)
    model.config.num_labels = classes
    return model


def _save_classifier(model: nn.Module, folder: Path) -> None:
    model.save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=IMAGE_SIZE).save_pretrained(folder)


def _clip(layers: int) -> CLIPModel:
    text = json.loads((Path(smile_zoo.images.DATA) / "clip" / "config.json").read_text())["text_config"]
    tokens = {name: text[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
    common = {"intermediate_size": 64, "num_attention_heads": 4, "projection_dim": 16}
    config = CLIPConfig(
        text_config={**tokens, **common, "hidden_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 77},
        vision_config={**common, "hidden_size": 48, "num_hidden_layers": layers, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )  # fmt: skip
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:  # as initialized, all outputs are alike
                parameter.mul_(4)
    return model


def _clip_processor() -> CLIPProcessor:
    processor = CLIPProcessor.from_pretrained(Path(smile_zoo.images.DATA) / "clip")
    processor.tokenizer.model_max_length = 77
    processor.image_processor.size = {"shortest_edge": IMAGE_SIZE}
    processor.image_processor.crop_size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return processor


@torch.no_grad()
def _fine_tuned(model: nn.Module, seed: int) -> nn.Module:
    """A copy whose matrices differ by a low rank and a little noise; other parameters move too, embeddings do not."""
    generator = torch.Generator().manual_seed(seed)
    expert = copy.deepcopy(model)
    for name, parameter in expert.named_parameters():
        shape = parameter.shape
        change = 0.02 * torch.randn(shape, generator=generator)
        if parameter.dim() == 2 and "embed" not in name:
            low_rank = torch.randn(shape[0], 4, generator=generator) @ torch.randn(4, shape[1], generator=generator)
            change = parameter.float().std() * (0.25 * low_rank + change)
        if "embed" not in name:
            parameter += change.to(parameter.dtype)
    return expert


def _save_pickled(model: nn.Module, folder: Path, shards: int = 1) -> None:
    """Save a model as older repositories have it: ``pytorch_model.bin``, or such files and their index."""
    model.config.save_pretrained(folder)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parts = [list(state)[number::shards] for number in range(shards)]
    files = [_file_name(number, shards) for number in range(shards)]
    for file, names in zip(files, parts, strict=True):
        torch.save({name: state[name] for name in names}, folder / file)
    if shards > 1:
        places = {name: file for file, names in zip(files, parts, strict=True) for name in names}
        index = {"metadata": {"total_size": 0}, "weight_map": places}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def _file_name(number: int, shards: int) -> str:
    return "pytorch_model.bin" if shards == 1 else f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
