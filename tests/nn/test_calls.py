"""The choice of experts belongs to one call: to no thread, cache, encoder output or part of another one."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from conftest import clip_inputs, clip_tower, experts_of, output, t5, tied_llama
from packaging.version import Version
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    DynamicCache,
    RwkvConfig,
    RwkvForCausalLM,
)

from fusion_bench_smile import ConfigError, PlanError, as_expert, choose_experts, record_choices, upscale, use_experts
from fusion_bench_smile.nn import router_of


def decoder(**options: object) -> nn.Module:
    torch.manual_seed(0)
    base = tied_llama()
    return upscale(base, experts_of(base, scale=0.3), k=8, gate_k=4, routing_scope="input", **options).double().eval()


def encoder_decoder() -> nn.Module:
    torch.manual_seed(0)
    base = t5()
    return upscale(base, experts_of(base, scale=0.3), k=8, gate_k=4, routing_scope="input").double().eval()


def prompts(count: int, length: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(1, 40, (count, length), generator=torch.Generator().manual_seed(seed))


class Interrupted(nn.Module):
    """Raises KeyboardInterrupt in its place in a model, while `armed`."""

    armed = False

    def forward(self, x: Tensor) -> Tensor:
        if self.armed:
            raise KeyboardInterrupt
        return x


def test_after_an_interrupt_the_next_call_is_right() -> None:
    model, images = tower(), clip_inputs()
    expected = output(model, images)
    module = next(m for m in model.modules() if hasattr(m, "post_layernorm"))
    inner, interrupted = module.post_layernorm, Interrupted()
    module.post_layernorm = nn.Sequential(interrupted, inner)
    interrupted.armed = True
    with pytest.raises(KeyboardInterrupt):
        output(model, {"pixel_values": 3 * images["pixel_values"].flip(0)})
    interrupted.armed = False
    assert torch.equal(output(model, images), expected)
    with pytest.raises(RuntimeError, match="call the model itself"):
        module.encoder.layers[0].mlp.fc1(torch.randn(2, 3, 32))


def tower(**options: object) -> nn.Module:
    torch.manual_seed(0)
    base = clip_tower()
    return upscale(base, experts_of(base), routing_scope="input", **{"k": 8, "gate_k": 4, **options})


@torch.no_grad()
def test_interleaved_conversations_keep_their_choices() -> None:
    model = decoder()
    texts = [prompts(1, 8, seed) for seed in range(4)]
    alone = []
    for text in texts:
        first = model(input_ids=text[:, :5], use_cache=True)
        steps = [model(input_ids=text[:, i : i + 1], past_key_values=first.past_key_values).logits for i in (5, 6, 7)]
        alone.append(torch.cat(steps, dim=1))
    caches = [
        model(input_ids=text[:, :5], past_key_values=DynamicCache(), use_cache=True).past_key_values for text in texts
    ]
    steps = [
        [
            model(input_ids=text[:, i : i + 1], past_key_values=cache).logits
            for text, cache in zip(texts, caches, strict=True)
        ]
        for i in (5, 6, 7)
    ]
    for number, expected in enumerate(alone):
        torch.testing.assert_close(torch.cat([step[number] for step in steps], dim=1), expected)


@torch.no_grad()
def test_a_copied_cache_continues_the_same_inputs() -> None:
    model, text = decoder(), prompts(2, 8)
    cache = model(input_ids=text[:, :5], use_cache=True).past_key_values
    copied = copy.deepcopy(cache)
    model(input_ids=prompts(3, 4, seed=5))
    first, second = (model(input_ids=text[:, 5:], past_key_values=c).logits for c in (cache, copied))
    assert torch.equal(first, second)


@torch.no_grad()
def test_a_cache_of_another_model_is_refused() -> None:
    model, text = decoder(), prompts(2, 8)
    for other in (tied_llama().double(), decoder()):
        cache = other(input_ids=text[:, :5], use_cache=True).past_key_values
        with pytest.raises(RuntimeError, match="past_key_values holds tokens whose experts this model has not chosen"):
            model(input_ids=text[:, 5:], past_key_values=cache)


@torch.no_grad()
def test_kept_encoder_outputs_keep_their_choice() -> None:
    model = encoder_decoder()
    batches = [{"input_ids": prompts(2, 7, seed)} for seed in range(3)]
    decoded = [{"decoder_input_ids": prompts(2, 3, seed + 9)} for seed in range(3)]
    expected = [model(**inputs, **targets).logits for inputs, targets in zip(batches, decoded, strict=True)]
    kept = [model.get_encoder()(**inputs) for inputs in batches]
    for order in ((0, 1, 2), (2, 0, 1)):
        for i in order:
            torch.testing.assert_close(model(encoder_outputs=kept[i], **decoded[i]).logits, expected[i])
    with pytest.raises(RuntimeError, match="encoder_outputs are not those"):
        model(encoder_outputs=(kept[0][0].clone(),), **decoded[0])


@torch.no_grad()
def test_padding_of_the_encoder_does_not_count_in_the_decoder() -> None:
    ids, mask = prompts(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[1, 3:] = 0
    target = prompts(2, 7, seed=3)  # as many tokens as the input: its mask must not be taken for theirs
    model = encoder_decoder()
    together = model(input_ids=ids, attention_mask=mask, decoder_input_ids=target).logits
    alone = model(input_ids=ids[1:, :3], decoder_input_ids=target[1:]).logits
    torch.testing.assert_close(together[1:], alone)


@torch.no_grad()
def test_parts_called_alone_are_refused_unless_the_experts_are_given() -> None:
    model, text = decoder(), prompts(2)
    expected = model(input_ids=text).logits
    with pytest.raises(RuntimeError, match="a part of the model that does not see whole inputs was called"):
        model.lm_head(model.model(input_ids=text).last_hidden_state)
    weights = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    with use_experts(model, weights):
        whole = model(input_ids=text).logits
        torch.testing.assert_close(model.lm_head(model.model(input_ids=text).last_hidden_state), whole)
    assert torch.equal(model(input_ids=text).logits, expected)


def test_the_chosen_experts_can_be_given() -> None:
    model, text = decoder(), prompts(4)
    weights = choose_experts(model, input_ids=text)
    assert weights.shape == (4, 3)
    with torch.no_grad(), record_choices(model) as calls:
        expected = model(input_ids=text).logits
        with use_experts(model, weights):
            torch.testing.assert_close(model(input_ids=text).logits, expected)
    assert torch.equal(calls[0].choice, weights)
    with pytest.raises(ConfigError, match="it must be"), use_experts(model, torch.ones(4, 2)):
        pass
    with pytest.raises(ConfigError, match="routing_scope"):
        choose_experts(tied_llama(), input_ids=text)


@torch.no_grad()
def test_two_models_call_each_other() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = tower(), tower(k=4)

        def forward(self, pixel_values: Tensor) -> Tensor:
            return self.first(self.second(pixel_values).pooler_output.sum() * 0 + pixel_values).pooler_output

    both, images = Both().eval(), clip_inputs()
    torch.testing.assert_close(both(**images), both.first(**images).pooler_output)


def test_the_loss_of_a_causal_model() -> None:
    model, text = decoder(), prompts(3)
    with torch.no_grad():
        result = model(input_ids=text, labels=text)
        torch.testing.assert_close(result.logits[:, :-1], model(input_ids=text).logits[:, :-1])
    assert result.loss.isfinite()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_is_refused(reentrant: bool) -> None:
    model, text = decoder(exclude_modules=["lm_head"]).train(), prompts(2)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with pytest.raises(RuntimeError, match="gradient checkpointing computes layers outside of the call"):
        model(input_ids=text, labels=text, use_cache=False)
    model.gradient_checkpointing_disable()
    model(input_ids=text, labels=text, use_cache=False).loss.backward()


def test_checkpointed_parts_of_other_models_are_refused() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
            return x

    base = Checkpointed()
    model = upscale(base, experts_of(base), k=4, gate_k=2, routing_scope="input")
    result = model(torch.randn(3, 8, requires_grad=True)).sum()
    with pytest.raises(RuntimeError, match="gradient checkpointing"):
        result.backward()


def test_a_model_is_copied_after_a_training_step() -> None:
    model, text = decoder(top_k=2).train(), prompts(2)
    model(input_ids=text, labels=text).loss.backward()
    other = copy.deepcopy(model).eval()
    with torch.no_grad():
        assert torch.equal(other(input_ids=text).logits, model.eval()(input_ids=text).logits)


@torch.no_grad()
def test_inputs_in_a_mapping_or_in_positions() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, batch: dict[str, Tensor] | Tensor, *more: Tensor) -> Tensor:
            x = batch["x"] if isinstance(batch, dict) else batch
            return self.second(self.first(x).relu()) + sum(more)

    base = Nested()
    model = upscale(base, experts_of(base), k=4, gate_k=2, routing_scope="input").double()
    x = torch.randn(5, 8, dtype=torch.double)
    alone = torch.cat([model(row[None]) for row in x])
    torch.testing.assert_close(model({"x": x}), alone)
    torch.testing.assert_close(model(x, torch.zeros(5, 1, dtype=torch.double)), alone)
    with pytest.raises(RuntimeError, match="was called without a tensor"):
        model({"x": [1.0]})


def test_two_towers_need_one_scope_for_each() -> None:
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**vision, "vocab_size": 40, "eos_token_id": 39}, projection_dim=8,
        vision_config={**vision, "image_size": 16, "patch_size": 8},
    )  # fmt: skip
    torch.manual_seed(0)
    base = CLIPModel(config).eval()
    experts, options = experts_of(base), {"k": 8, "gate_k": 4, "routing_scope": "input"}
    with pytest.raises(ConfigError, match="CLIPModel takes texts and images, which are different inputs"):
        upscale(base, experts, **options)
    model = upscale(base, experts, target_modules="vision_model.*", **options)
    ids, pixels = prompts(3, 5), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        together = model(input_ids=ids, pixel_values=pixels).logits_per_image
        alone = torch.cat([model(input_ids=ids, pixel_values=image[None]).logits_per_image for image in pixels])
    torch.testing.assert_close(together, alone)


def test_models_whose_weights_change_while_they_run_are_refused() -> None:
    config = RwkvConfig(vocab_size=40, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2)
    base = RwkvForCausalLM(config).eval()
    with pytest.raises(PlanError, match="rescale_every=6"):
        upscale(base, experts_of(base), k=4)


@pytest.mark.parametrize("option", [{"assistant_early_exit": 1}, {"prefill_chunk_size": 2}])
def test_generation_that_does_not_see_the_prompt_is_refused(option: dict[str, int]) -> None:
    with pytest.raises(RuntimeError, match="needs routing_scope=token"):
        decoder().generate(prompts(1), max_new_tokens=2, **option)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("4.50"), reason="generate of transformers 4.48 returns another cache"
)
@torch.no_grad()
def test_a_conversation_goes_on_with_its_cache() -> None:
    model, text = decoder(), prompts(1, 5)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": -1, "return_dict_in_generate": True}
    first = model.generate(text, **options)
    with record_choices(model) as calls:
        more = torch.cat([first.sequences, prompts(1, 2, seed=4)], dim=1)
        model.generate(more, past_key_values=first.past_key_values, **options)
    assert len(calls) == 3
    chosen = choose_experts(model, input_ids=text)
    assert all(torch.equal(state.choice, chosen) for state in calls)


def test_no_state_is_left_on_the_modules() -> None:
    model = tower()
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    output(model, clip_inputs())
    with as_expert(model, "0"):
        output(model, clip_inputs())
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before
    assert all(not isinstance(value, Tensor) for value in vars(router_of(model)).values())


@torch.no_grad()
def test_the_state_of_a_recurrent_model_keeps_the_choice() -> None:
    torch.manual_seed(0)
    config = RwkvConfig(
        vocab_size=40, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2, rescale_every=0
    )  # fmt: skip
    base = RwkvForCausalLM(config).eval()
    model = upscale(base, experts_of(base, scale=0.3), k=8, gate_k=4, routing_scope="input")
    texts = [prompts(1, 8, seed) for seed in range(4)]
    with record_choices(model) as calls:
        states = [model(input_ids=text[:, :5], use_cache=True).state for text in texts]
        for text, state in zip(texts, states, strict=True):
            model(input_ids=text[:, 5:6], state=state)
    assert len({state.choice.argmax().item() for state in calls[:4]}) > 1
    assert all(torch.equal(later.choice, first.choice) for first, later in zip(calls[:4], calls[4:], strict=True))
