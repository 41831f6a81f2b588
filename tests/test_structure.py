"""The structure of the repository: import order, public names, docstrings, function lengths."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from structure import (
    AREAS,
    DOCUMENTED,
    ROOT,
    Import,
    exported_names,
    function_lengths,
    imports,
    percentile,
    public_definitions,
    python_files,
    report,
)

LIBRARY = ROOT / "fusion_bench_smile"
# a folder or module of the library imports those with a smaller number, and itself
ORDER = {
    "_lazy": 0, "_version": 0, "exceptions": 0, "config": 1, "nn": 2, "io": 3, "construction": 4, "serving": 4,
    "reports": 5, "analysis": 6, "leaderboard": 6, "framework": 7,
}  # fmt: skip
FRAMEWORK_PACKAGES = {"fusion_bench", "hydra", "lightning", "omegaconf"}
USERS = {"zoo": ROOT / "zoo", "recipes": ROOT / "zoo", "studies": ROOT}  # area → folder on the import path


def room_of(file: Path) -> str:
    """The folder of the library that a file lies in, or its module in the root."""
    return file.relative_to(LIBRARY).with_suffix("").parts[0]


def library_imports() -> list[Import]:
    """All imports of the library but those of its root, which exports names of all folders."""
    return [each for file in python_files(LIBRARY) if room_of(file) != "__init__" for each in imports(file)]


def imported_room(each: Import) -> str | None:
    """The folder or module of the library that an import is of; None for other packages."""
    if each.top != LIBRARY.name:
        return None
    parts = [*each.module.split("."), *([each.name] if each.name else [])]
    return parts[1]


def test_every_folder_is_in_the_order():
    assert {room_of(file) for file in python_files(LIBRARY)} == {"__init__", *ORDER}


def test_no_folder_imports_one_to_its_right():
    for each in library_imports():
        here, there = room_of(each.file), imported_room(each)
        if there is not None and there != here:
            assert ORDER.get(there, 99) < ORDER[here], str(each)


def test_nn_imports_torch_and_the_class_of_conv1d_alone():
    for each in library_imports():
        if room_of(each.file) == "nn" and each.top not in {*sys.stdlib_module_names, "torch", LIBRARY.name}:
            assert each.module == "transformers.pytorch_utils", str(each)


def test_the_framework_is_imported_in_its_folder_alone():
    allowed = {(LIBRARY / "leaderboard" / "published.py", "omegaconf")}  # it reads tables of published scores
    for each in library_imports():
        if each.top in FRAMEWORK_PACKAGES and (each.file, each.top) not in allowed:
            assert room_of(each.file) == "framework", str(each)


def test_the_framework_smile_is_no_ancestor():
    for each in library_imports():
        if each.top == "fusion_bench":
            name = f"{each.module}.{each.name}"
            assert not any(part in name for part in ("smile_upscaling", "smile_moe", "SmileUpscaling")), str(each)


def test_the_library_imports_neither_zoo_nor_recipes_nor_studies():
    outside = {"smile_zoo", "recipes", "studies", "benchmarks", "tests"}
    for file in python_files(LIBRARY):
        assert not [str(each) for each in imports(file) if each.top in outside]


@pytest.mark.parametrize("area", USERS)
def test_other_areas_use_public_names_of_packages(area):
    """They import from the library, its packages, its options and its errors: never a module inside of a package."""
    files = python_files(ROOT / AREAS[area])
    assert files
    for each in (each for file in files for each in imports(file, USERS[area])):
        if each.top != LIBRARY.name:
            continue
        source = ROOT.joinpath(*each.module.split("."))
        assert source.is_dir() or source in (LIBRARY / "config", LIBRARY / "exceptions"), f"{each} is no package"
        assert not any(part.startswith("_") for part in (*each.module.split("."), each.name or "")), str(each)
        exported = exported_names(source)
        assert each.name is None or exported is None or each.name in exported, f"{each} is not exported"


@pytest.mark.parametrize("area", USERS)
def test_the_zoo_is_used_by_recipes_and_studies_and_studies_by_nobody(area):
    allowed = {
        "zoo": {"smile_zoo"},
        "recipes": {"smile_zoo", "recipes"},
        "studies": {"smile_zoo", "recipes", "studies"},
    }
    for each in (each for file in python_files(ROOT / AREAS[area]) for each in imports(file, USERS[area])):
        if each.top in {"smile_zoo", "recipes", "studies"}:
            assert each.top in allowed[area], str(each)


def run_python(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_importing_the_package_imports_neither_torch_nor_the_framework():
    heavy = ("torch", "transformers", "fusion_bench", "lightning", "hydra", "pandas", "peft", "matplotlib", "pydantic")
    run_python(f"import sys, fusion_bench_smile; sys.exit(', '.join({{*{heavy!r}}} & set(sys.modules)) or 0)")


def test_using_the_package_imports_little_more_than_torch_and_transformers():
    """Modules that transformers imports itself don't count: old releases import pandas."""
    unwanted = ("fusion_bench", "lightning", "hydra", "pandas", "peft", "matplotlib")
    run_python(
        "import sys, transformers.modeling_utils, transformers.quantizers.auto; before = set(sys.modules); "
        "from fusion_bench_smile import upscale; "
        f"sys.exit(', '.join(sorted({{*{unwanted!r}}} & set(sys.modules) - before)) or 0)"
    )


@pytest.mark.parametrize(
    "imports", ["fusion_bench_smile, transformers.modeling_utils", "transformers.modeling_utils, fusion_bench_smile"]
)
def test_the_checkpoint_format_is_registered_in_any_order_of_imports(imports):
    run_python(
        f"import sys, {imports}; from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as mapping; "
        "assert 'smile' in mapping; assert not any('Registration' in repr(finder) for finder in sys.meta_path)"
    )


@pytest.mark.parametrize("area", DOCUMENTED)
def test_every_public_definition_has_a_docstring(area):
    definitions = list(public_definitions(ROOT / AREAS[area]))
    assert len(definitions) > 20
    assert [name for name, has_docstring in definitions if not has_docstring] == []


def test_functions_of_the_library_are_short():
    lengths = function_lengths(LIBRARY)
    assert statistics.median(lengths) <= 7
    assert percentile(lengths, 0.9) <= 20


def test_the_figures_are_printed_for_any_checkout(tmp_path):
    (tmp_path / "fusion_bench_smile" / "io").mkdir(parents=True)
    (tmp_path / "fusion_bench_smile" / "__init__.py").write_text('"""A package."""\n')
    (tmp_path / "fusion_bench_smile" / "one.py").write_text(
        '"""A module."""\n\n\nclass A:\n    def method(self):\n        """A method."""\n\n'
        "    def _private(self):\n        pass\n"
    )
    (tmp_path / "fusion_bench_smile" / "io" / "_hidden.py").write_text("def f():\n    pass\n")
    text = report(tmp_path)
    assert "modules in the root of fusion_bench_smile: 1 (one)" in text
    assert text.splitlines()[-1].split() == ["library", "3", "12", "3", "2", "2", "2", "3", "of", "4", "(75.0%)"]
    assert "zoo " in report(ROOT)
