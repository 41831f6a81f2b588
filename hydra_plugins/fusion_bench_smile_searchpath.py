"""Hydra plugin that lets the framework's command line find the configurations of this library, from any directory."""

import difflib
import hashlib
import importlib.util
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

CONFIG = Path(__file__).resolve().parent.parent / "fusion_bench_smile_config"
MAX_FOLDER_NAME = 150  # characters
SUBMITIT, RAY = ("hydra_submitit_launcher", "sweep"), ("hydra_ray_launcher", "ray")
# launchers, sweepers and experiments → the plugin that they need, and the extra that installs it
PLUGINS = {
    "joblib": ("hydra_joblib_launcher", "sweep"), "submitit_local": SUBMITIT, "submitit_slurm": SUBMITIT,
    "smile_slurm": SUBMITIT, "ray": RAY, "smile_ray": RAY, "optuna": ("hydra_optuna_sweeper", "sweep"),
    "smile_optuna": ("hydra_optuna_sweeper", "sweep"),
}  # fmt: skip
ZOO_CHOICE = re.compile(
    r"\+{0,2}((modelpool|taskpool)=(.*,)?(SmileEmbedded/|SmileText/|SmileDINOv2/|SmileSmolLM2/|SmileGLUE/tiny-t5)"
    r"|experiment=(.*,)?(smile_embedded|smile_text|smile_dinov2|smile_smollm2)/|smile_row=(.*,)?backbone_)"
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
            SystemExit: for a misspelled option of a method, or a launcher, sweeper or part of the zoo that is not
                installed.
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
        _check_options(sys.argv[1:], framework)
        _check_plugins(sys.argv[1:])
        _check_zoo(sys.argv[1:])


def _exit_on_smile_error(record: logging.LogRecord) -> bool:
    """Filter of the framework's log. `exit_on_smile_error` is imported with the first exception, for a fast start."""
    if not record.exc_info:
        return True
    from fusion_bench_smile.framework import exit_on_smile_error

    return exit_on_smile_error(record)


def _folder(path: str) -> Path:
    return Path(path.removeprefix("file://")).resolve()


def _check_options(arguments: Sequence[str], framework: Path) -> None:
    """Refuse a misspelled option of the methods that a command line chooses, for which Hydra has no suggestion.

    Methods come from ``method=``, ``+smile_row=`` and the experiments of this library, which may be lists of a sweep.
    """
    folders = [CONFIG, framework]
    methods = {name for argument in arguments for name in _methods(argument, folders)}
    known = [_options(name, folders) for name in methods]
    if not known or not all(known):  # a method that is not found is reported by Hydra
        return
    valid = sorted(set().union(*known) - {"_target_", "_recursive_", "name"})
    for argument in arguments:
        match = re.match(r"method\.([^.=]+)", argument)
        if match and match[1] not in valid:
            from fusion_bench_smile.config import REMOVED

            if match[1] in REMOVED and "routing_scope" in valid:
                raise SystemExit(f"the option method.{match[1]} was removed: {REMOVED[match[1]]}")
            near = difflib.get_close_matches(match[1], valid, n=1, cutoff=0.5)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise SystemExit(f"unknown option method.{match[1]}{hint}; valid options: {', '.join(valid)}")


def _methods(argument: str, folders: Sequence[Path]) -> Iterator[str]:
    """The configurations of methods that one argument of the command line chooses."""
    group, _, choice = argument.lstrip("+").partition("=")
    for name in choice.split(",") if group in ("method", "smile_row", "experiment") else ():
        if group == "method":
            yield name
        elif (file := _find(folders, group, name)) is not None:
            yield from _methods_of_file(file, folders)


def _methods_of_file(file: Path, folders: Sequence[Path]) -> Iterator[str]:
    """The configurations of methods in the defaults of a row or an experiment."""
    for default in OmegaConf.select(OmegaConf.load(file), "defaults") or ():
        if isinstance(default, str) and default != "_self_":
            base = file.parent / f"{default}.yaml"
            yield from _methods_of_file(base, folders) if base.exists() else ()
        elif not isinstance(default, str):
            yield from (str(name) for key, name in default.items() if str(key).endswith("/method"))


def _options(name: str, folders: Sequence[Path]) -> set[str]:
    """The options in the configuration of a method; empty if there is none."""
    file = _find(folders, "method", name)
    return set() if file is None else {str(key) for key in OmegaConf.load(file)}


def _find(folders: Sequence[Path], group: str, name: str) -> Path | None:
    files = [folder / group / f"{name}.yaml" for folder in folders]
    return next((file for file in files if file.exists()), None)


def _check_plugins(arguments: Sequence[str]) -> None:
    """Refuse a launcher or sweeper that is not installed with the command that installs it."""
    for argument in arguments:
        choice = re.sub(r"^\+{0,2}(hydra/(launcher|sweeper)|experiment)=", "", argument)
        module, extra = PLUGINS.get(choice, ("", "")) if choice != argument else ("", "")
        if module and importlib.util.find_spec(f"hydra_plugins.{module}") is None:
            raise SystemExit(f"{argument} is not installed: pip install 'fusion-bench-smile[{extra}]'")


def _check_zoo(arguments: Sequence[str]) -> None:
    """Refuse a configuration of the zoo if the zoo is not installed."""
    choices = [argument for argument in arguments if ZOO_CHOICE.match(argument)]
    if choices and importlib.util.find_spec("smile_zoo") is None:
        raise SystemExit(f"{choices[0]} comes with the zoo: pip install 'fusion-bench-smile[demo]'")
