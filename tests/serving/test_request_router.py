"""The router alone names the expert that the upscaled model would choose."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import clip_tower, experts_of, mlp, output, t5, tied_llama
from text_models import TEXTS, llama, tokenizer, tokens, upscaled
from transformers import (
    CLIPImageProcessor,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from fusion_bench_smile import ConfigError, RequestRouter, calibrate, choose_experts, upscale
from fusion_bench_smile.nn import count_bytes, routed_layers, router_of


@pytest.mark.parametrize("options", [{}, {"storage": "int4"}, {"k": -1, "density": 0.3}], ids=str)
@pytest.mark.parametrize("make", [llama, tied_llama, t5], ids=lambda make: make.__name__)
def test_it_chooses_as_the_upscaled_model(make, options: dict[str, object], tmp_path: Path) -> None:
    model = upscaled(make(), **options)
    expected = choose_experts(model, **tokens(TEXTS))
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    router = RequestRouter.from_pretrained(tmp_path)
    routes = router.route(TEXTS)
    names = [router.experts[index] for index in expected.argmax(dim=-1).tolist()]
    assert [route.expert for route in routes] == names
    shares = torch.tensor([list(route.shares.values()) for route in routes])
    best, index = shares.topk(2, dim=-1)
    weights = torch.zeros_like(shares).scatter(-1, index, best / best.sum(dim=-1, keepdim=True))
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)
    assert all(sum(route.shares.values()) == pytest.approx(1, abs=1e-5) for route in routes)
    assert all(route.confidence == max(route.shares.values()) for route in routes)


def test_images() -> None:
    model = upscaled(clip_tower())
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    images = [np.random.default_rng(seed).integers(0, 255, (28, 28, 3), dtype=np.uint8) for seed in range(4)]
    expected = choose_experts(model, pixel_values=processor(images=images, return_tensors="pt")["pixel_values"])
    router = RequestRouter(model, processor)
    names = [router.experts[index] for index in expected.argmax(dim=-1).tolist()]
    assert [route.expert for route in router.route(images)] == names


@pytest.mark.parametrize("calibrated", [False, True])
def test_it_holds_the_first_pass_alone(calibrated: bool) -> None:
    model = upscaled(llama(layers=6), exclude_modules=["lm_head"])
    if calibrated:
        calibrate(model, {name: [tokens(TEXTS[:3])] for name in router_of(model).experts})
    layers = list(routed_layers(model).values())
    whole, expected = count_bytes(model), choose_experts(model, **tokens(TEXTS))
    router = RequestRouter(model, tokenizer())
    kept = [layer for layer in layers if not layer.weight.is_meta]
    assert len(kept) == 4 * 7  # of four of the six blocks
    assert model.lm_head.weight.is_meta
    assert all(layer.down is None and layer.expert_bias is None for layer in kept)
    assert all((layer.up is not None) == calibrated for layer in kept)
    held = {*model.parameters(), *router_of(model).parameters()}
    assert router.num_bytes == sum(parameter.nbytes for parameter in held if not parameter.is_meta) < 0.7 * whole
    assert [r.expert for r in router.route(TEXTS)] == [router.experts[i] for i in expected.argmax(dim=-1).tolist()]
    with pytest.raises((RuntimeError, NotImplementedError)):
        output(model, tokens(TEXTS))


def test_a_request_alone_and_in_a_batch_and_in_threads() -> None:
    router = RequestRouter(upscaled(llama()), tokenizer())
    together = router.route(TEXTS)
    with ThreadPoolExecutor(4) as pool:
        alone = list(pool.map(lambda text: router.route([text])[0], TEXTS * 5))
    assert [route.expert for route in alone] == [route.expert for route in together] * 5
    for one, other in zip(alone, together * 5, strict=True):
        assert one.confidence == pytest.approx(other.confidence, abs=1e-5)
    assert router.route([]) == []


def test_the_base_model_serves_below_the_threshold_and_unknown_tasks() -> None:
    router = RequestRouter(upscaled(llama()), tokenizer())
    confidences = [route.confidence for route in router.route(TEXTS)]
    router.threshold = sorted(confidences)[2]
    served = [route.expert is not None for route in router.route(TEXTS)]
    assert served == [confidence >= router.threshold for confidence in confidences]
    assert 0 < sum(served) < len(TEXTS)
    model = upscaled(llama(), refuse_unknown=True)
    calibrate(model, {name: [tokens(TEXTS)] for name in router_of(model).experts})
    router_of(model).prototypes.radius.zero_()  # no input is near enough
    assert [route.expert for route in RequestRouter(model, tokenizer()).route(TEXTS)] == [None] * len(TEXTS)


def test_of_a_long_text_the_last_tokens_count() -> None:
    model = upscaled(llama())
    last = RequestRouter(model, tokenizer(), max_tokens=3)
    long = "a b c d e f g h i j k"
    assert last.route([long])[0].shares == pytest.approx(last.route(["i j k"])[0].shares, abs=1e-6)
    last.max_tokens = None
    assert last.route([long])[0].shares != pytest.approx(last.route(["i j k"])[0].shares, abs=1e-6)


def test_conversations() -> None:
    plain, templated = tokenizer(), tokenizer()
    templated.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    messages = [
        {"role": "system", "content": "a b"},
        {"role": "user", "content": [{"text": "c"}, {"type": "image_url"}, {"type": "text", "text": "d"}]},
        {"role": "assistant", "content": None},
    ]  # fmt: skip
    assert RequestRouter(upscaled(llama()), plain).text_of(messages) == "a b\nc\nd\n"
    expected = "<system>a b<user>c\nd<assistant>"
    assert RequestRouter(upscaled(llama()), templated).text_of(messages) == expected


def test_the_given_tokenizer_is_not_changed() -> None:
    given = tokenizer()
    RequestRouter(upscaled(llama()), given, max_tokens=2).route(TEXTS)
    assert given.pad_token is None
    assert given.truncation_side == "right"


def test_refusals(tmp_path: Path) -> None:
    base = llama()
    with pytest.raises(ConfigError, match="needs a model with routing_scope=input"):
        RequestRouter(upscale(base, experts_of(base), gate_k=2, k=4), tokenizer())
    with pytest.raises(ConfigError, match="threshold=2 is no confidence"):
        RequestRouter(upscaled(llama()), tokenizer(), threshold=2)
    upscaled(llama()).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has no tokenizer that can be loaded: save that of the pretrained model"):
        RequestRouter.from_pretrained(tmp_path)
    upscaled(clip_tower()).save_pretrained(tmp_path / "images")
    with pytest.raises(ConfigError, match="has no image processor"):
        RequestRouter.from_pretrained(tmp_path / "images")
    audio = Wav2Vec2Model(
        Wav2Vec2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, conv_dim=(16, 16),
            conv_stride=(5, 4), conv_kernel=(10, 4), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
            num_feat_extract_layers=2,
        )
    )  # fmt: skip
    with pytest.raises(ConfigError, match="Wav2Vec2Model reads input_values"):
        RequestRouter(upscaled(audio), tokenizer())
    with pytest.raises(ConfigError):
        RequestRouter(mlp(), tokenizer())
