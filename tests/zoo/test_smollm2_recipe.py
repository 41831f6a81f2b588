"""The recipe of the language benchmark: its answers, splits and loss are as documented."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from recipes.smollm2.finetune import IGNORED, FineTuning, answer_loss, finetune, linear_layers
from recipes.smollm2.tasks import SIZES, arithmetic, build_task, lemmas
from smile_zoo.smollm2 import SPLITS


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def test_worked_steps_are_right():
    for _, prompt, answer in list(arithmetic(Path()))[:50]:
        first, second = answer.split(", ")
        for step in (first, second):
            left, right = step.split(" = ")
            assert sum(int(term) for term in re.findall(r"-?\d+", left.replace(" ", ""))) == int(right)
        assert first.startswith(re.search(r": (\d+ . \d+)", prompt)[1])


def test_base_forms_are_read_from_wordnet(tmp_path):
    folder = tmp_path / "wordnet-base/usr/share/wordnet"
    folder.mkdir(parents=True)
    (folder / "noun.exc").write_text("mice mouse\nfish fish\n")
    (folder / "verb.exc").write_text("went go\nabetted abet\n")
    assert [tuple(example) for example in lemmas(tmp_path)] == [
        ("mouse", "Word: mice\nBase form:", "mouse"),
        ("abet", "Word: abetted\nBase form:", "abet"),
    ]
    with pytest.raises(RuntimeError, match="lemmas, test: the packages hold"):
        build_task("lemmas", tmp_path)


@pytest.mark.parametrize("task", ["arithmetic", "headings"])
def test_no_prompt_is_in_two_splits(task):
    splits = build_task(task, Path())
    assert {split: len(splits[split]) for split in ("validation", "test")} == {"validation": 100, "test": 200}
    assert 300 <= len(splits["train"]) <= SIZES["train"]
    prompts = [prompt for split in SPLITS for prompt, _ in splits[split]]
    assert len(set(prompts)) == len(prompts)
    assert build_task(task, Path()) == splits


def test_the_loss_is_that_of_the_answers(llama):
    tokens = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
    labels = torch.tensor([[IGNORED, IGNORED, 7, 8], [IGNORED, 10, 11, IGNORED]])
    with torch.no_grad():
        logits = llama(input_ids=tokens).logits
        expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        torch.testing.assert_close(answer_loss(llama, tokens, labels), expected, rtol=0.01, atol=0.01)


class Letters:
    """A tokenizer with one token for each byte."""

    pad_token_id = 0

    def __call__(self, text: str) -> Letters:
        self.input_ids = [byte % 64 for byte in text.encode()]
        return self


@pytest.mark.skipif(
    not hasattr(PreTrainedModel, "set_attn_implementation"), reason="the recipe needs a later release of transformers"
)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_fine_tuning_changes_the_blocks_alone(kind, llama, monkeypatch):
    monkeypatch.setitem(finetune.__globals__["FINE_TUNINGS"], kind, FineTuning(lr=1e-2, steps=8, batch_size=2))
    examples = [("a:", "b"), ("c:", "d")]
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    tuned = finetune(llama, Letters(), examples, kind)
    assert all(torch.equal(before[name], tensor) for name, tensor in llama.state_dict().items())
    assert isinstance(tuned, PeftModel) == (kind == "lora")
    merged = tuned.merge_and_unload() if isinstance(tuned, PeftModel) else tuned
    matrices = {f"{name}.weight" for name in linear_layers(llama)}
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor.float(), before[name]) == (name not in matrices), name
    assert len(matrices) == 2 * 7
