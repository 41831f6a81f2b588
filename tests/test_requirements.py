"""The metadata of both distributions agree with each other, with .ci/oldest.txt and with the APIs that are used."""

from __future__ import annotations

import configparser
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

import fusion_bench_smile
import smile_zoo

REPOSITORY = Path(__file__).resolve().parent.parent


def lower_bounds() -> dict[str, Version]:
    """The oldest release of each requirement of the library."""
    metadata = configparser.ConfigParser()
    metadata.read(REPOSITORY / "setup.cfg")
    requirements = map(Requirement, metadata["options"]["install_requires"].strip().splitlines())
    bounds = {r.name: [s.version for s in r.specifier if s.operator == ">="] for r in requirements}
    return {name: Version(versions[0]) for name, versions in bounds.items()}


def pins(file: str) -> dict[str, Version]:
    """The releases that a constraints file pins."""
    lines = (REPOSITORY / file).read_text().splitlines()
    parts = [line.split("==") for line in lines if not line.startswith("#")]
    return {name: Version(version) for name, version in parts}


def test_library_and_zoo_have_the_same_version():
    assert smile_zoo.__version__ == fusion_bench_smile.__version__


def test_the_oldest_releases_are_those_of_the_metadata():
    bounds = lower_bounds()
    assert {name: bounds[name] for name in pins(".ci/oldest.txt")} == pins(".ci/oldest.txt")


def test_the_tested_releases_are_allowed():
    bounds = lower_bounds()
    assert all(version >= bounds[name] for name, version in pins("constraints.txt").items() if name in bounds)


# the newest API of torch that the library uses, and its first release
NEWEST = {"torch": (torch.nn.Module, "set_submodule", Version("2.5"))}


@pytest.mark.parametrize("package", NEWEST)
def test_the_oldest_release_has_the_newest_api_that_is_used(package):
    """``.ci/oldest-torch`` runs the tests on the oldest torch; this test holds the reason for its floor."""
    owner, name, first_release = NEWEST[package]
    assert hasattr(owner, name)
    assert lower_bounds()[package] == first_release
    sources = (REPOSITORY / "fusion_bench_smile").rglob("*.py")
    assert any(name in file.read_text() for file in sources), f"{name} is not used: the floor of {package} can be lower"
