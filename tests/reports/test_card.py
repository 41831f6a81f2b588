"""Results of a run in the model card of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import clip_tower, experts_of
from huggingface_hub import ModelCard
from sample_reports import report

from fusion_bench_smile import CheckpointError, upscale
from fusion_bench_smile.io import verify_checkpoint
from fusion_bench_smile.reports import ReportError
from fusion_bench_smile.reports.card import complete_card, main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = clip_tower()
    upscale(base, dict(zip("ab", experts_of(base, 2), strict=True)), gate_k=4, k=8).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_card_has_what_the_hub_shows(folder: Path, tmp_path: Path) -> None:
    file = report(models=["a", "b"], retention=97.25, bytes=600, pretrained_bytes=400).write(tmp_path)
    before = ModelCard.load(folder / "README.md").text
    arguments = ["--license", "apache-2.0", "--base-model", "org/clip", "--task", "image-classification"]
    for _ in range(2):  # a second time nothing is added
        main([str(folder), "--report", str(file), *arguments])
    card = ModelCard.load(folder / "README.md")
    assert card.text.startswith(before.rstrip())
    assert (card.data.license, card.data.base_model, card.data.model_name) == ("apache-2.0", "org/clip", "model")
    results = [(r.dataset_name, r.metric_type, r.metric_value, r.task_type) for r in card.data.eval_results]
    assert results == [("a", "accuracy", 80.0, "image-classification"), ("b", "accuracy", 60.0, "image-classification")]
    assert card.text.count("## Results") == 1
    assert "Retention: 97.2 % of the individual models. 1.500× the parameters and 1.500× the bytes" in card.text
    assert "| average |          |    70.0 |" in card.text
    assert verify_checkpoint(folder) > 0
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "smile_digests.json",
    }  # fmt: skip


def test_what_is_not_given_stays(folder: Path) -> None:
    before = (folder / "README.md").read_text()
    complete_card(folder, license="mit")
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.base_model, card.data.eval_results) == ("mit", None, None)
    assert card.text == ModelCard(before).text


def test_sections_that_a_person_wrote_stay(folder: Path) -> None:
    file = folder / "README.md"
    file.write_text(f"{file.read_text()}\n## Results\n\nMine.\n")
    complete_card(folder, report())
    file.write_text(f"{file.read_text()}\n\n## Limits\n\nSome.\n")
    complete_card(folder, report(average=71.0))
    text = ModelCard.load(file).text
    assert "## Results\n\nMine." in text
    assert text.rstrip().endswith("## Limits\n\nSome.")
    assert (text.count("| average |"), "71.0" in text, "70.0" in text) == (1, True, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ["a", "c"]}, "of other experts than the checkpoint"),
        ({"method": {"gate_k": 4, "k": 16}}, "k=16 in the report, 8 in the checkpoint"),
        ({"method": {"routing_scope": "input"}}, "routing_scope=input in the report, token in the checkpoint"),
        ({"method": {"param_ratio": 1.2}}, "param_ratio=1.2 in the report, None in the checkpoint"),
        ({"method": {"exclude_modules": ["fc1"]}}, r"exclude_modules=\('fc1',\) in the report, \(\) in the checkpoint"),
        ({"method": {"calibration": 64}}, "calibration=True in the report, False in the checkpoint"),
        ({"method": {"top_k": "many"}}, "the report is of another model: top_k"),
        ({"status": "failed", "error": "no memory"}, "the run failed: no memory"),
    ],
    ids=str,
)
def test_a_report_of_another_model_is_refused(folder: Path, changes: dict[str, object], message: str) -> None:
    before = (folder / "README.md").read_text()
    with pytest.raises(ReportError, match=message):
        complete_card(folder, report(**changes))
    assert (folder / "README.md").read_text() == before


def test_a_folder_without_checkpoint_or_card_is_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="error: "):
        main([str(tmp_path / "nothing")])
    (folder / "README.md").unlink()
    with pytest.raises(CheckpointError, match="save the model again for a new card"):
        complete_card(folder, license="mit")
    with pytest.raises(SystemExit, match="error: no report"):
        main([str(folder), "--report", str(tmp_path / "none.json")])
