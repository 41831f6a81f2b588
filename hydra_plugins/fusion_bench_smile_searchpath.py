"""Lets `fusion_bench method=smile_upscaling …` find this package's configuration, from any directory."""

import difflib
import hashlib
import re
import sys
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parent.parent
OURS = ROOT / "fusion_bench_smile_config"
LONGEST_NAME = 150
CHOOSES_OURS = {"method=smile_upscaling", "+experiment=smile_grid", "+experiment=smile_optuna", "+smile_row=smile"}

# ${smile_embedded:clip} in a configuration is that folder of the embedded benchmark, wherever it is installed
OmegaConf.register_new_resolver(
    "smile_embedded", lambda part: str(ROOT / "fusion_bench_smile" / "embedded" / "data" / part), replace=True
)


def _folder_name(overrides: str) -> str:
    """A job's overrides as the name of one folder, within what file systems allow."""
    name = re.sub(r"[^\w.,=+-]", "-", overrides.replace("+", "")) or "default"
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}-{hashlib.md5(name.encode()).hexdigest()[:8]}"


OmegaConf.register_new_resolver("smile_folder", _folder_name, replace=True)


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
        _refuse_unknown_options(sys.argv[1:])


def _folder(path: str) -> Path:
    return Path(path.removeprefix("file://")).resolve()


def _refuse_unknown_options(arguments: list[str]) -> None:
    """Name the nearest option for a misspelled one: Hydra would say no more than that the key is not in struct."""
    if not CHOOSES_OURS & set(arguments):
        return
    known = list(OmegaConf.load(OURS / "method" / "smile_upscaling.yaml"))
    for argument in arguments:
        match = re.match(r"method\.([^.=]+)", argument)
        if match and match[1] not in known:
            near = difflib.get_close_matches(match[1], known, n=1, cutoff=0.5)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise SystemExit(f"unknown option method.{match[1]}{hint}; valid options: {', '.join(known[1:])}")
