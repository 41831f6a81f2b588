"""Hydra plugin that lets the framework's command line find the configurations of this library, from any directory."""

import difflib
import hashlib
import importlib.util
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

CONFIG = Path(__file__).resolve().parent.parent / "fusion_bench_smile_config"
MAX_FOLDER_NAME = 150  # characters
SMILE_METHOD = {"method=smile_upscaling", "+experiment=smile_grid", "+experiment=smile_optuna", "+smile_row=smile"}
ZOO_CHOICE = re.compile(
    r"\+{0,2}((modelpool|taskpool)=(.*,)?(SmileEmbedded/|SmileText/|SmileGLUE/tiny-t5)"
    r"|experiment=(.*,)?(smile_embedded|smile_text)/)"
)


def _folder_name(overrides: str) -> str:
    """Folder name of a job with these overrides, within the limits of file systems."""
    name = re.sub(r"[^\w.,=+-]", "-", overrides.replace("+", "")) or "default"
    if len(name) <= MAX_FOLDER_NAME:
        return name
    return f"{name[:MAX_FOLDER_NAME]}-{hashlib.md5(name.encode()).hexdigest()[:8]}"


# Workers of a sweep import this module, but call no plugin: the resolver is registered here.
OmegaConf.register_new_resolver("smile_folder", _folder_name, replace=True)


class FusionBenchSmileSearchPath(SearchPathPlugin):
    """Appends the configurations of this library to the search path, if the application is the framework's."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append this library's configurations, and the framework's if a local ``config/`` folder replaced them.

        Other Hydra applications keep their search path. The framework's log gets the filter that ends a run with the
        message of a `SmileError`.

        Raises:
            SystemExit: for a misspelled option of SMILE, or a configuration of the zoo if the zoo is not installed.
        """
        # the framework is imported before it starts Hydra
        paths = sys.modules.get("fusion_bench.constants.paths")
        if paths is None:
            return
        framework = Path(paths.LIBRARY_PATH).parent / "fusion_bench_config"
        present = [_folder(entry.path) for entry in search_path.get_path() if entry.path]
        for provider, folder in (("fusion-bench", framework), ("fusion-bench-smile", CONFIG)):
            if folder.resolve() not in present:
                search_path.append(provider, f"file://{folder}")
        logging.getLogger("fusion_bench.scripts.cli").addFilter(_exit_on_smile_error)
        _check_options(sys.argv[1:])
        _check_zoo(sys.argv[1:])


def _exit_on_smile_error(record: logging.LogRecord) -> bool:
    """Filter of the framework's log. `exit_on_smile_error` is imported with the first record, for a fast start."""
    from fusion_bench_smile.framework import exit_on_smile_error

    return exit_on_smile_error(record)


def _folder(path: str) -> Path:
    return Path(path.removeprefix("file://")).resolve()


def _check_options(arguments: Sequence[str]) -> None:
    """Refuse a misspelled option with the nearest valid one; Hydra only reports that the key is not in struct."""
    if not SMILE_METHOD & set(arguments):
        return
    known = list(OmegaConf.load(CONFIG / "method" / "smile_upscaling.yaml"))
    for argument in arguments:
        match = re.match(r"method\.([^.=]+)", argument)
        if match and match[1] not in known:
            near = difflib.get_close_matches(match[1], known, n=1, cutoff=0.5)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise SystemExit(f"unknown option method.{match[1]}{hint}; valid options: {', '.join(known[1:])}")


def _check_zoo(arguments: Sequence[str]) -> None:
    """Refuse a configuration of the zoo if the zoo is not installed."""
    choices = [argument for argument in arguments if ZOO_CHOICE.match(argument)]
    if choices and importlib.util.find_spec("smile_zoo") is None:
        raise SystemExit(f"{choices[0]} comes with the zoo: pip install 'fusion-bench-smile[demo]'")
