"""The model card of a checkpoint: the README.md of its folder."""

import re
import statistics
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from .metadata import LOADING, SmileMetadata

CARD_FILE = "README.md"
MARK = "<!-- written by fusion_bench_smile -->"
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
TEXT_LENGTH = 1000  # characters of an option, of a list of names


def write_model_card(metadata: SmileMetadata, target: Path, folder: Path, base_model: str) -> None:
    """Write the model card into the new `folder`, unless the `target` that it will replace has a card by a person."""
    existing = target / CARD_FILE
    if existing.exists() and MARK not in existing.read_text(errors="replace"):
        return
    on_hub = bool(base_model) and not Path(base_model).exists() and HUB_NAME.fullmatch(base_model) is not None
    model_card(metadata, base_model if on_hub else None).save(folder / CARD_FILE)


def model_card(metadata: SmileMetadata, base_model: str | None) -> ModelCard:
    """The model card of an upscaled model; `base_model` is the pretrained model's name on a hub, if it has one.

    Names, options and versions may come from a file of unknown origin: they are shown as text.
    """
    import pandas as pd  # takes as long to import as torch

    from .tables import escape_markdown, markdown_table

    data = ModelCardData(library_name="transformers", tags=["fusion-bench", "smile", "merge"], base_model=base_model)
    provenance = metadata.provenance
    before, after = provenance.parameters
    shares = [share for layer in provenance.energy.values() for share in layer]
    lines = [
        MARK, "", "# A SMILE model", "",
        "A zero-shot sparse mixture of low-rank experts (SMILE, arXiv 2408.10174): one model with the experts of "
        "several, built with `fusion_bench_smile` from the pretrained model and its fine-tuned variants, without data "
        "or training.", "",
        f"To load it: {LOADING}.", "",
        f"- parameters: {after:,}, {after / max(before, 1):.3f} times the pretrained model's {before:,}",
        f"- experts: {len(metadata.experts)}; upscaled layers: {len(provenance.energy)}",
    ]  # fmt: skip
    if shares:
        lines.append(f"- energy ‖ΔW‖² kept: at least {min(shares):.4f}, median {statistics.median(shares):.4f}")
    if unused := provenance.describe_unused():
        lines.append(f"- not used, outside the upscaled layers: {escape_markdown(unused, TEXT_LENGTH)}")
    versions = ", ".join(f"{name} {number}" for name, number in provenance.versions.items())
    lines.append(f"- versions: {escape_markdown(versions, TEXT_LENGTH)}")
    digests = {name: escape_markdown(provenance.sources.get(name, "unknown")) for name in metadata.experts}
    sources = [(escape_markdown(name), _code(digest)) for name, digest in digests.items()]
    options = [(escape_markdown(n), escape_markdown(v, TEXT_LENGTH)) for n, v in metadata.config.to_dict().items()]
    lines += ["", markdown_table(pd.DataFrame(sources, columns=["expert", "digest of its weights"]))]
    lines += ["", markdown_table(pd.DataFrame(options, columns=["option", "value"])), ""]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n" + "\n".join(lines))


def _code(text: str) -> str:
    """A digest as code; escaped text that is no digest as it is, because code has no escapes."""
    return f"`{text}`" if text.isalnum() else text
