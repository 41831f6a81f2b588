"""Figures on the structure of a checkout: sizes, function lengths, docstrings. Imports the standard library alone.

    python tests/structure.py [FOLDER]

Without a folder the checkout of this file is described. Areas that a checkout does not have are left out.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
AREAS = {
    "library": "fusion_bench_smile", "zoo": "zoo/smile_zoo", "recipes": "zoo/recipes", "studies": "studies",
    "tests": "tests",
}  # fmt: skip
DOCUMENTED = ("library", "zoo")
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Import(NamedTuple):
    """One imported module, or one name that is imported from a module.

    Attributes:
        file: The file that imports it.
        module: The module in full, also for relative imports.
        name: The name; None for ``import module``.
    """

    file: Path
    module: str
    name: str | None

    @property
    def top(self) -> str:
        """The first part of the module's name."""
        return self.module.split(".")[0]

    def __str__(self) -> str:
        return f"{self.file}: {self.module}" + (f" ({self.name})" if self.name else "")


def python_files(folder: Path) -> list[Path]:
    """The Python files of a folder, sorted; none if it does not exist."""
    return sorted(folder.rglob("*.py"))


@cache
def syntax_tree(file: Path) -> ast.Module:
    """The syntax tree of a Python file."""
    return ast.parse(file.read_text(encoding="utf-8"))


def count_lines(folder: Path) -> int:
    """The number of lines of all Python files of a folder."""
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in python_files(folder))


def modules_in_root(package: Path) -> list[str]:
    """The names of the modules that lie directly in a package, without ``__init__``."""
    return [file.stem for file in sorted(package.glob("*.py")) if file.stem != "__init__"]


def function_lengths(folder: Path) -> list[int]:
    """The number of lines of every function and method, from ``def`` to its end, in ascending order."""
    nodes = (node for file in python_files(folder) for node in ast.walk(syntax_tree(file)))
    return sorted((node.end_lineno or node.lineno) - node.lineno + 1 for node in nodes if isinstance(node, Function))


def imports(file: Path, root: Path = ROOT) -> Iterator[Import]:
    """All imports of a Python file, at any depth.

    Args:
        file: The file.
        root: The folder on the import path that holds the top package of the file, for relative imports.
    """
    package = file.relative_to(root).parent.parts
    for node in ast.walk(syntax_tree(file)):
        if isinstance(node, ast.Import):
            yield from (Import(file, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            yield from (Import(file, module, alias.name) for alias in node.names)


def public_definitions(package: Path) -> Iterator[tuple[str, bool]]:
    """Qualified name, and whether there is a docstring, of every public module, class, function and method.

    A name is public if no part of it begins with an underscore. Definitions inside of functions are not public.
    """
    for file in python_files(package):
        parts = file.relative_to(package.parent).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not any(part.startswith("_") for part in parts):
            yield from _definitions(syntax_tree(file), ".".join(parts))


def _definitions(node: ast.Module | ast.ClassDef | Function, name: str) -> Iterator[tuple[str, bool]]:
    yield name, ast.get_docstring(node) is not None
    if isinstance(node, Function):
        return
    for child in _children(node):
        if isinstance(child, ast.ClassDef | Function) and not child.name.startswith("_"):
            yield from _definitions(child, f"{name}.{child.name}")


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """The statements of a body, also those inside of ``if`` and ``try``."""
    for child in ast.iter_child_nodes(node):
        yield child
        if isinstance(child, ast.If | ast.Try | ast.ExceptHandler):
            yield from _children(child)


def exported_names(package: Path) -> set[str] | None:
    """The names in ``__all__`` of a package or module; None if it has none."""
    file = package / "__init__.py" if package.is_dir() else package.with_suffix(".py")
    for node in syntax_tree(file).body:
        if isinstance(node, ast.Assign) and any(getattr(t, "id", None) == "__all__" for t in node.targets):
            return {str(name) for name in ast.literal_eval(node.value)}
    return None


def percentile(values: list[int], share: float) -> int:
    """The value below which a share of the ascending values lies."""
    return values[min(len(values) - 1, int(share * len(values)))]


def report(root: Path) -> str:
    """The figures of a checkout as text."""
    package = root / AREAS["library"]
    names = modules_in_root(package)
    lines = [f"modules in the root of {package.name}: {len(names)} ({', '.join(names)})", ""]
    lines.append(
        f"{'area':<8} {'files':>6} {'lines':>7} {'functions':>10} {'median':>7} {'p90':>4} {'max':>4}  docstrings"
    )
    for area, folder in ((area, root / path) for area, path in AREAS.items()):
        lengths = function_lengths(folder)
        if not lengths:
            continue
        documented = [has_docstring for _, has_docstring in public_definitions(folder)]
        share = f"{sum(documented)} of {len(documented)} ({sum(documented) / len(documented):.1%})"
        lines.append(
            f"{area:<8} {len(python_files(folder)):>6} {count_lines(folder):>7} {len(lengths):>10} "
            f"{statistics.median(lengths):>7g} {percentile(lengths, 0.9):>4} {lengths[-1]:>4}  "
            f"{share if area in DOCUMENTED else '–'}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(report(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT))
