"""Dependencies point one way: the hot path knows torch alone, and nothing knows the adapter."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "fusion_bench_smile"


def imports(file: Path) -> set[str]:
    found: set[str] = set()
    package = ["fusion_bench_smile", *file.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return found


ALLOWED = {
    "errors.py": set(),
    "factors.py": {"torch"},
    "layers.py": {"torch"},
    "prototypes.py": {"torch"},
    "budget.py": {"fusion_bench_smile.errors"},
    "scopes.py": {"torch", *(f"fusion_bench_smile.{name}" for name in ("layers", "prototypes"))},
    "own.py": {"torch", "fusion_bench_smile.scopes"},
    "storage.py": {"torch", "fusion_bench_smile.layers"},
    "routing.py": {"torch", "fusion_bench_smile.layers"},
    "config.py": {
        "torch",
        *(f"fusion_bench_smile.{name}" for name in ("budget", "errors", "layers", "own", "scopes")),
    },
    "workers.py": {"torch"},
    "plan.py": {"torch", *(f"fusion_bench_smile.{name}" for name in ("budget", "errors", "config", "kin", "workers"))},
}


def test_the_hot_path_imports_torch_alone():
    for name, allowed in ALLOWED.items():
        for module in imports(PACKAGE / name):
            standard = module.split(".")[0] in sys.stdlib_module_names
            assert standard or any(module == a or module.startswith(f"{a}.") for a in allowed), (
                f"{name} imports {module}"
            )


def test_only_the_adapter_and_the_benchmark_know_the_framework():
    knowing = {
        str(f.relative_to(PACKAGE))
        for f in PACKAGE.rglob("*.py")
        if any(i.split(".")[0] == "fusion_bench" for i in imports(f))
    }
    assert knowing == {
        "algorithm.py",
        "evaluation.py",
        "glue.py",
        "individual.py",
        "modelpool.py",
        "program.py",
        "sweep.py",
        "taskpool.py",
        "text_classification.py",
        "analysis/methods.py",
        "embedded/__init__.py",
        "embedded/beyond/rivals.py",
        "embedded/choose.py",
    }


def test_nothing_imports_the_adapter():
    for file in PACKAGE.rglob("*.py"):
        if file.name != "__init__.py":
            assert not any(i.startswith("fusion_bench_smile.algorithm") for i in imports(file)), file


def test_the_framework_smile_is_no_ancestor():
    for file in PACKAGE.rglob("*.py"):
        assert not any("smile_upscaling" in i or "smile_moe" in i for i in imports(file)), file


def test_importing_the_package_does_not_import_the_framework():
    code = "import sys, fusion_bench_smile; assert not {'fusion_bench', 'lightning', 'hydra'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
