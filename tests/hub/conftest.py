"""The local hub: small models and data sets in the Hugging Face cache of the command lines."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import HUB_CACHE, forking_python
from hub.data_sets import add_glue, add_images
from hub.models import add_models
from hub.once import run_once
from hub.repositories import Cache


@pytest.fixture(scope="session")
def hub() -> Cache:
    """The cache, which the first worker of a test run fills."""
    forking_python()  # its folder holds the cache, and is removed with it
    return Cache(run_once(HUB_CACHE, fill))


def fill(home: Path) -> None:
    """Add all data sets and models."""
    for add in (add_images, add_glue, add_models):
        add(Cache(home))
