"""The study of the language benchmark: which tasks prompts name, and the table."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

from smile_zoo import smollm2
from studies import smollm2 as study


def test_shares_of_named_tasks() -> None:
    weights = {
        "a": torch.tensor([[0.9, 0.1, 0.0], [0.3, 0.7, 0.0], [0.0, 0.4, 0.6], [1.0, 0.0, 0.0]]),
        "b": torch.tensor([[0.6, 0.4, 0.0], [0.0, 1.0, 0.0]]),
        "c": torch.tensor([[0.0, 0.0, 1.0]]),
    }
    assert study.named_shares(weights) == pytest.approx({"first": 100 * (0.5 + 0.5 + 1) / 3, "first two": 275 / 3})


def test_retention_is_that_of_the_averages() -> None:
    rows = {
        "individual": study.Row(pd.Series({"a": 80.0, "b": 40.0}), 2),
        "one": study.Row(pd.Series({"a": 60.0, "b": 45.0}), 1.25),
    }
    table = study._table(rows)
    assert table.loc["one", ["average", "retention"]].tolist() == [52.5, 87.5]
    assert table["bytes"].tolist() == ["2.000×", "1.250×"]


def test_measured_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Two:
        def __init__(self, kind: str) -> None:
            self.rows = {
                name: lambda name=name: asked.append(name) or study.Row(pd.Series({"a": 1.0}), 1)
                for name in ("x/y", "z")
            }

    monkeypatch.setattr(study, "Benchmark", Two)
    for _ in range(2):
        assert list(study.measure(tmp_path, "full")) == ["x/y", "z"]
    assert asked == ["x/y", "z"]


def test_prompts_keep_their_order() -> None:
    try:
        tokenizer = smollm2.load_tokenizer()
    except Exception as error:
        pytest.skip(f"the model is not installed: {error}")
    batches = list(study.prompt_batches("glosses", "test", 70))
    assert [len(batch["input_ids"]) for batch in batches] == [50, 20]
    prompts = list(smollm2.load_examples("glosses", "test")["prompt"])[:70]
    found = [text for batch in batches for text in tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)]
    assert [text.strip() for text in found] == [prompt.strip() for prompt in prompts]
