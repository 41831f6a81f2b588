"""Architectures of transformers and torchvision's kind: tiny models with random weights, and inputs for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from fusion_bench_smile.nn import plain_type_of

VOCABULARY, TOKENS = 60, 7
TEXT = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = {**TEXT, "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0}
LLAMA = {
    **TEXT, "intermediate_size": 48, "max_position_embeddings": 64, "num_key_value_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
SPEECH = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 2,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Architecture:
    """A tiny model of one architecture."""

    name: str  # of the class in transformers
    options: dict[str, Any]  # of its config
    kind: str = "text"  # of its inputs
    token_layers: tuple[str, ...] = ()  # parts of the names of layers whose tokens can't be attributed to inputs
    generates: bool = False
    exclude: tuple[str, ...] = ()  # the last parts of the names of layers that can't be upscaled
    largest_rank: int = 32

    def __str__(self) -> str:
        return self.name

    def make(self, seed: int = 0) -> nn.Module:
        """The pretrained model, in float64: rounding must not decide between experts."""
        torch.manual_seed(seed)
        model_type = getattr(transformers, self.name)
        return model_type(model_type.config_class(**self.options)).eval().double()

    def inputs(self, count: int, seed: int = 1) -> dict[str, Tensor]:
        """Keyword arguments for `count` inputs."""
        inputs = INPUTS[self.kind](count, torch.Generator().manual_seed(seed))
        return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


def _ids(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(3, VOCABULARY, (count, TOKENS), generator=generator)


def _text(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    ids = _ids(count, generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


INPUTS: dict[str, Callable[[int, torch.Generator], dict[str, Tensor]]] = {
    "text": _text,
    "tokens": lambda n, g: {"input_ids": _ids(n, g)},
    "images": lambda n, g: {"pixel_values": torch.randn(n, 3, 16, 16, generator=g)},
    "videos": lambda n, g: {"pixel_values": torch.randn(n, 2, 3, 16, 16, generator=g)},
    "audio": lambda n, g: {"input_values": torch.randn(n, 400, generator=g)},
    "spectrograms": lambda n, g: {
        "input_features": torch.randn(n, 8, 40, generator=g), "decoder_input_ids": _ids(n, g)[:, :3],
    },
    "pairs": lambda n, g: {**_text(n, g), "decoder_input_ids": _ids(n, g)[:, :4]},
}  # fmt: skip

ARCHITECTURES = [
    Architecture("BertModel", BERT),
    Architecture("RobertaForSequenceClassification", {**BERT, "type_vocab_size": 1}),
    Architecture(
        "DistilBertModel", {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    ),
    Architecture("AlbertModel", {**BERT, "embedding_size": 16}),
    Architecture("ElectraModel", {**BERT, "embedding_size": 16}),
    Architecture(
        "DebertaV2Model", {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets":
        8, "max_relative_positions": 16, "share_att_key": True}, token_layers=("query_proj", "key_proj"),
    ),
    Architecture(
        "XLNetModel", {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        token_layers=("layer_1", "layer_2"),
    ),
    Architecture(
        "GPT2LMHeadModel", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "bos_token_id": 1, "eos_token_id": 2}, generates=True,
    ),
    Architecture("GPTNeoXForCausalLM", {**LLAMA}, generates=True),
    Architecture(
        "OPTForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}, generates=True,
    ),
    Architecture("LlamaForCausalLM", LLAMA, generates=True),
    Architecture("Qwen2ForCausalLM", LLAMA, generates=True),
    Architecture("Qwen3ForCausalLM", {**LLAMA, "head_dim": 8}, generates=True),
    Architecture(
        "Gemma2ForCausalLM", {**LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8, "tie_word_embeddings": True},
        generates=True,
    ),
    Architecture("PhiForCausalLM", LLAMA, generates=True),
    Architecture(
        "FalconForCausalLM", {**TEXT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}, generates=True,
    ),
    Architecture(
        "BloomForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id":
        0, "bos_token_id": 1, "eos_token_id": 2}, generates=True,
    ),
    Architecture(
        "MixtralForCausalLM", {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}, generates=True,
        token_layers=("experts.",),
    ),
    Architecture(
        "Qwen2MoeForCausalLM", {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 32}, generates=True, token_layers=("experts.",),
    ),
    Architecture(
        "MambaForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8,
        "time_step_rank": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}, "tokens", generates=True,
    ),
    Architecture(
        "Mamba2ForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8,
        "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0}, "tokens", generates=True,
    ),
    Architecture(
        "FalconMambaForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2,
        "state_size": 8, "time_step_rank": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}, "tokens",
        generates=True,
    ),
    Architecture(
        "RwkvForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2,
        "attention_hidden_size": 32, "intermediate_size": 48, "rescale_every": 0, "bos_token_id": 1, "eos_token_id":
        2}, "tokens",
    ),
    Architecture(
        "T5ForConditionalGeneration", {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers":
        2, "num_heads": 4, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}, "pairs",
        generates=True,
    ),
    Architecture(
        "BartForConditionalGeneration", {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2,
        "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id":
        2, "decoder_start_token_id": 2, "forced_eos_token_id": None}, "pairs", generates=True,
    ),
    Architecture(
        "WhisperForConditionalGeneration", {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2,
        "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}, "spectrograms",
    ),
    Architecture("ViTModel", VIT, "images"),
    Architecture("Dinov2Model", {**VIT, "mlp_ratio": 2}, "images"),
    Architecture("BeitModel", VIT, "images"),
    Architecture(
        "SwinModel", {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4],
        "window_size": 2}, "images",
    ),
    Architecture(
        "Swinv2Model", {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4],
        "window_size": 2}, "images", token_layers=("bias_mlp",),
    ),
    Architecture("CLIPVisionModelWithProjection", {**VIT, "projection_dim": 16}, "images"),
    Architecture("SiglipVisionModel", VIT, "images", exclude=("head.attention.out_proj",)),
    Architecture(
        "ConvNextModel", {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "patch_size": 2,
        "layer_scale_init_value": 1.0}, "images",
    ),
    Architecture(
        "VideoMAEModel", {**VIT, "num_frames": 2, "tubelet_size": 1}, "videos", exclude=("query", "key", "value"),
    ),
    Architecture("Wav2Vec2Model", SPEECH, "audio"),
    Architecture("WavLMModel", SPEECH, "audio", exclude=("q_proj", "k_proj", "v_proj", "attention.out_proj")),
]  # fmt: skip

ARCHITECTURES = [architecture for architecture in ARCHITECTURES if hasattr(transformers, architecture.name)]


def changed_layers(model: nn.Module, exclude: tuple[str, ...] = ()) -> list[nn.Module]:
    """The linear layers that experts change: those that can be upscaled, and are not tied to an embedding."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    layers = ((name, module) for name, module in model.named_modules() if plain_type_of(module))
    return [
        module
        for name, module in layers
        if not isinstance(module, nn.Conv2d) and id(module.weight) not in embeddings and not name.endswith(exclude)
    ]


def experts_of(base: nn.Module, exclude: tuple[str, ...] = (), count: int = 3, scale: float = 0.3) -> list[nn.Module]:
    """Experts that changed linear layers alone, so that a routed model can equal them."""
    experts = []
    for seed in range(count):
        generator, expert = torch.Generator().manual_seed(seed), copy.deepcopy(base)
        for module in changed_layers(expert, exclude):
            for parameter in module.parameters(recurse=False):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += scale * parameter.data.std().nan_to_num().clamp(min=0.02) * noise
        experts.append(expert)
    return experts


def first_output(output: Any) -> Tensor:
    """The logits or hidden states that a model returns."""
    names = ("logits", "image_embeds", "last_hidden_state")
    return next(output[name] for name in names if name in output)
