"""The recipes: every module imports, and their pure functions do what the recipes rely on."""

from __future__ import annotations

import importlib
import pkgutil
import random

import numpy as np
import pytest
import torch
from conftest import clip_inputs, clip_tower, output, perturbed
from peft import PeftModel
from torch import nn

import recipes
from recipes.common.adapters import ADAPTER_SETTINGS, extract_adapter, save_adapter
from recipes.common.packages import cached
from recipes.images.build import NORMS
from recipes.images.corpus import CROP, GLYPH, GROUPS, PICTURE, Corpus, augment, caption_variants
from recipes.images.fonts import CANVAS, bucket
from recipes.images.pretrain import STEPS, decay_groups, factor
from recipes.images.sources import DEBIAN, KANA_FONTS, LATIN_FONTS
from recipes.images.tasks import PRETRAINING_FONTS, jitter_glyph, warp
from recipes.text.tasks import SIZES, build_task, short, split_of
from recipes.text.wordnet import WordNet
from recipes.tiny_t5.train import corrupt_spans

MODULES = [module.name for module in pkgutil.walk_packages(recipes.__path__, "recipes.")]


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports(name):
    assert importlib.import_module(name).__doc__


def corpus(count: int = 30) -> Corpus:
    rng = np.random.default_rng(0)
    groups = [GROUPS[i % len(GROUPS)] for i in range(count)]
    captions = {"digits": "the digit one", "flags": "the flag of chile", "textures": "a wood texture"}
    return Corpus(
        rng.integers(0, 256, (count, 36, 36, 4)).astype(np.uint8),
        np.array([kind for _, kind, _, _ in groups]),
        [captions.get(name, f"{name} {number % 3}") for number, (name, *_) in enumerate(groups)],
        rng.integers(0, 256, (5, 28, 28, 3)).astype(np.uint8),
    )


def test_augmented_images_depend_on_the_seed_alone():
    index = np.arange(30)
    first, second, other = (augment(corpus(), index, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.shape == (30, 3, 28, 28)
    assert first.dtype == torch.float32
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_captions_become_prompts_of_their_kind():
    sprites = corpus(3)
    for kind, prompts in {PICTURE: 6, GLYPH: 4, CROP: 2}.items():
        one = Corpus(sprites.sprites[:1], np.array([kind]), ["a cat"], sprites.backgrounds)
        variants = list(caption_variants(one))
        assert len(variants) == prompts
        assert all("a cat" in variant for variant in variants)


def test_font_packages_are_in_one_place_each():
    packages = [*DEBIAN, *LATIN_FONTS, *KANA_FONTS]
    assert len(set(packages)) == len(packages)
    assert {bucket(package) < PRETRAINING_FONTS for package in LATIN_FONTS} == {True, False}
    assert bucket("fonts-lato") == bucket("fonts-lato")


def test_glyphs_and_flags_are_transformed_at_random():
    glyph = np.zeros((CANVAS, CANVAS), dtype=np.uint8)
    glyph[30:60, 40:50] = 255
    images = [jitter_glyph(glyph, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert images[0].size == (28, 28)
    assert images[0] == images[1]
    assert images[0] != images[2]
    flag = warp(images[0], np.random.default_rng(0), 112)
    assert (flag.size, flag.mode) == ((112, 112), "RGBA")


def test_the_learning_rate_warms_up_and_decays():
    assert factor(0) < factor(100) < factor(300) == pytest.approx(1, abs=0.01)
    assert factor(STEPS - 1) == pytest.approx(0.002, abs=1e-3)
    decayed, kept = decay_groups(nn.Linear(3, 2), 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert [p.ndim for p in decayed["params"]] == [2]


def test_an_extracted_adapter_of_full_rank_is_the_fine_tuned_model(tmp_path):
    pretrained = clip_tower()
    tuned = perturbed(pretrained)
    kept = pretrained.state_dict()
    # the adapter holds linear layers and norms; all others stay pretrained
    tuned.load_state_dict({name: value for name, value in kept.items() if "embeddings" in name}, strict=False)
    linear = [name for name, module in pretrained.named_modules() if isinstance(module, nn.Linear)]
    save_adapter(extract_adapter(pretrained, tuned, 32, linear, NORMS), tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(pretrained, str(tmp_path / "adapter")).eval()
    inputs = clip_inputs()
    torch.testing.assert_close(output(loaded, inputs), output(tuned, inputs), rtol=0.02, atol=0.02)  # float16
    config = loaded.peft_config["default"]
    assert all(getattr(config, name) is not None for name in ADAPTER_SETTINGS)


def test_results_are_computed_once(tmp_path):
    calls = []
    results = [cached(tmp_path / "result.pkl", lambda: calls.append(1) or {"a": 1}) for _ in range(2)]
    assert results == [{"a": 1}] * 2
    assert calls == [1]


def test_an_origin_is_in_one_split_and_the_splits_have_their_shares():
    splits = [split_of("bible", str(number)) for number in range(4000)]
    assert split_of("bible", "7") == splits[7]
    shares = {split: splits.count(split) / len(splits) for split in SIZES}
    assert shares == {
        "train": pytest.approx(0.6, abs=0.03),
        "validation": pytest.approx(0.15, abs=0.03),
        "test": pytest.approx(0.25, abs=0.03),
    }
    assert short(" a  b c d", 3) == "a b c"


WORDNET = """  1 a comment of the header
00001740 05 n 02 dog 0 domestic_dog(a) 0 001 @ 00002000 n 0000 | a domesticated animal that barks; "the dog barked"
00002000 05 n 01 animal 0 000 | a living being
"""


@pytest.fixture
def wordnet_package(tmp_path):
    folder = tmp_path / "wordnet-base" / "usr" / "share" / "wordnet"
    folder.mkdir(parents=True)
    (folder / "data.noun").write_text(WORDNET)
    return tmp_path


def test_wordnet_is_read(wordnet_package):
    net = WordNet(wordnet_package / "wordnet-base")
    dog, animal = net.synsets("noun")
    assert (dog.kind, dog.words, dog.gloss) == ("animal", ("dog", "domestic dog"), "a domesticated animal that barks")
    ((symbol, target, here, there),) = dog.pointers
    assert (symbol, net.at(target), here, there) == ("@", animal, 0, 0)


def test_a_task_with_too_few_texts_is_refused(wordnet_package):
    with pytest.raises(RuntimeError, match=r"the packages hold \d texts, 2400 are needed"):
        build_task("glosses", wordnet_package)


def test_corrupted_spans_are_the_target():
    words = "in the beginning god created the heaven and the earth"
    prompt, answer = corrupt_spans(words, random.Random(0))
    assert prompt.count("<extra_id_") == answer.count("<extra_id_") == 2
    restored = prompt
    for part in answer.split("<extra_id_")[1:]:
        number, span = part.split("> ")
        restored = restored.replace(f"<extra_id_{number}>", span.strip())
    assert restored == words
