"""The command ``smile-upscale``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import clip_inputs, clip_tower, experts_of, output
from transformers import CLIPVisionModel

from fusion_bench_smile import metadata_of, upscale
from fusion_bench_smile.construction.command import main


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    base = clip_tower()
    models = {"base": base, **dict(zip(("a", "b"), experts_of(base, 2), strict=True))}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in models}


def test_the_command_writes_the_model_of_upscale(folders: dict[str, Path], tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    before = {path: path.read_bytes() for folder in folders.values() for path in folder.iterdir()}
    main([*(str(folders[name]) for name in ("base", "a")), f"second={folders['b']}", "-o", str(out),
          "--gate-k", "null", "--k", "4", "--storage", "int8", "--exclude-modules", "[fc2]"])  # fmt: skip
    model = CLIPVisionModel.from_pretrained(out).eval()
    base, *experts = (CLIPVisionModel.from_pretrained(folders[name]).eval() for name in ("base", "a", "b"))
    options = {"gate_k": None, "k": 4, "storage": "int8", "exclude_modules": ["fc2"]}
    expected = upscale(base, dict(zip(("a", "second"), experts, strict=True)), **options)
    inputs = clip_inputs()
    assert torch.equal(output(model, inputs), output(expected, inputs))
    assert metadata_of(model).experts == ("a", "second")
    assert f"from_pretrained('{out}')" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in before}


def test_the_plan_reads_no_weights(folders: dict[str, Path], capsys, monkeypatch) -> None:
    monkeypatch.setattr("fusion_bench_smile.io.safetensors_source.SafetensorsSource.read", None)
    main([str(folders["base"]), str(folders["a"]), str(folders["b"]), "--plan", "--k", "4", "--gate-k", "2"])
    table = capsys.readouterr().out
    assert "plan of smile-upscale" in table
    assert "parameters added, at most" in table


def test_values_are_written_as_on_the_frameworks_command_line(folders: dict[str, Path], tmp_path: Path) -> None:
    main([str(folders["base"]), str(folders["a"]), str(folders["b"]), "--output", str(tmp_path / "out"),
          "--target-modules", "*fc1", "--k", "-1", "--density", "2e-1", "--gate-k", "2"])  # fmt: skip
    model = CLIPVisionModel.from_pretrained(tmp_path / "out")
    assert all(name.endswith("fc1") for name in metadata_of(model).layouts)
    assert metadata_of(model).config.density == 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["base", "a"], "--output is missing"),
        (["base", "a", "-o", "b"], "b exists: name another folder, or remove it"),
        (["base", "a", "x=a", "a", "-o", "out"], "two experts are called 'a': give them names, as in first="),
        (["base", "a", "-o", "out", "--k", "four"], "k='four' is not an integer"),
        (["base", "a", "-o", "out", "--density", "0.02"], "density=0.02 keeps a share of dense deltas"),
        (["base", "./missing", "-o", "out"], "./missing does not exist"),
        (["./missing", "a", "-o", "out"], "./missing does not exist"),
        (["base/config.json", "a", "-o", "out"], "is a file: give the folder of the pretrained model"),
        (["base", "a", "--plan", "--byte-ratio", "1.5", "--gate-k", "1", "--k", "4"], "needs the whole model"),
        (["base", "a", "-o", "out", "--target-modules", "[fc1"], "matches no"),
        (["broken", "a", "-o", "out"], "broken has no config of a transformers model"),
        (["no-such/model", "a", "-o", "out"], "can't be downloaded from the hub"),
        (["base", "a", "-o", "out", "--byte-ratio", "1.5", "--gate-k", "1", "--k", "4"], "needs the whole model"),
    ],
)  # fmt: skip
def test_an_error_is_one_line(
    folders: dict[str, Path], tmp_path: Path, monkeypatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert message in str(error.value)
    assert str(error.value).startswith("error: ")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
