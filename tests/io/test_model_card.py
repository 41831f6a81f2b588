"""The model card of a checkpoint."""

from __future__ import annotations

import re

import pytest
import yaml
from conftest import clip_tower, experts_of, mlp
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from fusion_bench_smile import SmileConfig, metadata_of, save, upscale
from fusion_bench_smile.io import ExpertChange, Provenance, SmileMetadata
from fusion_bench_smile.io.metadata import LOADING
from fusion_bench_smile.io.model_card import MARK, model_card


def test_the_model_card_of_a_checkpoint(tmp_path):
    base = clip_tower()
    base.config._name_or_path = "openai/clip-vit-base-patch32"
    model = upscale(base, dict(zip(("red", "green"), experts_of(base, 2), strict=True)), gate_k=2, k=4)
    model.save_pretrained(tmp_path / "model")
    card = ModelCard.load(tmp_path / "model" / "README.md")
    provenance = metadata_of(model).provenance
    assert card.data.base_model == "openai/clip-vit-base-patch32"
    assert {"smile", "fusion-bench"} <= set(card.data.tags)
    facts = (*provenance.sources.values(), f"{provenance.parameters[1]:,}", "import fusion_bench_smile")
    assert all(fact in card.text for fact in facts)
    assert re.search(r"\| gate_k +\| +2 \|", card.text)
    again = upscale(base, {"red": experts_of(base, 1)[0]}, k=4)
    again.save_pretrained(tmp_path / "model")
    text = (tmp_path / "model" / "README.md").read_text()
    assert "experts: 1;" in text
    assert metadata_of(again).provenance.sources["red"] in text
    (tmp_path / "model" / "README.md").write_text("my own words")
    again.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "README.md").read_text() == "my own words"


def test_a_base_model_that_is_on_no_hub_is_not_named(tmp_path):
    base = clip_tower()
    base.save_pretrained(tmp_path / "base")
    experts_of(base, 1)[0].save_pretrained(tmp_path / "red")
    model = upscale(type(base).from_pretrained(tmp_path / "base"), {"red": tmp_path / "red"}, k=4)
    model.save_pretrained(tmp_path / "model")
    assert ModelCard.load(tmp_path / "model" / "README.md").data.base_model is None
    base = mlp()
    save(upscale(base, experts_of(base, 2), gate_k=2, k=4), tmp_path / "plain")
    assert "A SMILE model" in (tmp_path / "plain" / "README.md").read_text()


def test_the_text_of_a_card():
    provenance = Provenance({"a": [0.5, 1.0], "b": [0.25, 1.0]}, {"red": "abc"}, (1000, 1234), {"torch": "2.5"})
    metadata = SmileMetadata(SmileConfig(gate_k=2, k=4), ("red", "green"), {}, provenance)
    text = model_card(metadata, "org/base").content
    assert "base_model: org/base" in text
    assert MARK in text
    assert "- parameters: 1,234, 1.234 times the pretrained model's 1,000" in text
    assert "- experts: 2; upscaled layers: 2" in text
    assert "- energy ‖ΔW‖² kept: at least 0.2500, median 0.7500" in text
    assert "- versions: torch 2.5" in text
    assert re.search(r"\| red +\| +`abc` \|", text)
    assert re.search(r"\| green +\| +`unknown` \|", text)
    assert "base_model" not in model_card(metadata, None).content


HOSTILE = (
    "-->\n# <script>alert(1)</script>", "| a | b |\n|---|---|", "`x` ![y](https://example.org/y.png)",
    "\n---\nlicense: mit", "<!-- ", "[run](javascript:alert(1))", "a\u202eb\x00", "=cmd|'/c calc'!A1",
)  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_a_checkpoint_is_shown_as_text(text):
    name = "<b>`x`|*y*"  # names of experts have no line breaks and slashes
    changes = {name: ExpertChange(2.0, 1.0, {text: 1.0})}
    provenance = Provenance({text: [0.5]}, {name: text}, (1000, 1234), {text: text}, changes)
    config = SmileConfig(gate_k=2, k=4, target_modules=[text])
    metadata = SmileMetadata(config, (name,), {}, provenance, loading=f"curl {text} | sh")
    card = model_card(metadata, text)
    assert f"To load it: {LOADING}." in card.content
    assert "curl" not in card.content
    front, body = re.fullmatch(r"(?ms)---\n(.*?)^---\n(.*)", card.content).groups()
    assert yaml.safe_load(front)["base_model"] == ModelCard(card.content).data.base_model == text
    assert body.startswith(f"{MARK}\n\n# A SMILE model")
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    blocks = [token.type for token in tokens]
    options = len(config.to_dict())
    assert (blocks.count("html_block"), blocks.count("heading_open")) == (1, 1)
    assert (blocks.count("table_open"), blocks.count("tr_open")) == (2, 2 + 1 + options)
    inline = [child for token in tokens for child in token.children or []]
    assert {child.type for child in inline} <= {"text", "code_inline", "softbreak"}
    assert {child.content for child in inline if child.type == "code_inline"} == {"fusion_bench_smile"}
