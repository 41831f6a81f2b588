"""Lets `fusion_bench method=smile_upscaling …` find this package's configuration, from any directory."""

import sys
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

OURS = Path(__file__).resolve().parent.parent / "fusion_bench_smile_config"


class FusionBenchSmileSearchPath(SearchPathPlugin):
    """Appends our folder, and the framework's where a `config/` folder of the current directory has taken its place."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        # the framework is imported before Hydra starts it; any other Hydra application is none of our business
        paths = sys.modules.get("fusion_bench.constants.paths")
        if paths is None:
            return
        framework = Path(paths.LIBRARY_PATH).parent / "fusion_bench_config"
        present = [_folder(entry.path) for entry in search_path.get_path() if entry.path]
        for provider, folder in (("fusion-bench", framework), ("fusion-bench-smile", OURS)):
            if folder.resolve() not in present:
                search_path.append(provider, f"file://{folder}")


def _folder(path: str) -> Path:
    return Path(path.removeprefix("file://")).resolve()
