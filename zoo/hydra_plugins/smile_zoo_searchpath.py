"""Hydra plugin that lets the framework's command line find the configurations of the zoo."""

import sys
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

PACKAGE = Path(__file__).resolve().parent.parent / "smile_zoo"

# ${smile_embedded:clip} is a folder of the image benchmark. Workers of a sweep import this module, but call no plugin.
OmegaConf.register_new_resolver(
    "smile_embedded", lambda folder: str(PACKAGE / "images" / "data" / folder), replace=True
)


class SmileZooSearchPath(SearchPathPlugin):
    """Appends the configurations of the zoo to the search path, if the application is the framework's."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append ``smile_zoo/config``; other Hydra applications keep their search path."""
        # the framework is imported before it starts Hydra
        if "fusion_bench.constants.paths" in sys.modules:
            search_path.append("fusion-bench-smile-zoo", f"file://{PACKAGE / 'config'}")
