"""The search-path plugins of the library and of the zoo, for the framework's command line."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import fusion_bench.constants.paths  # noqa: F401  # marks the application as the framework's
import pytest
from command_line import REPOSITORY, fusion_bench_without
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

import smile_zoo

LIBRARY, ZOO = REPOSITORY / "config", Path(smile_zoo.__file__).parent / "config"
PLUGINS = {"hydra_plugins.fusion_bench_smile_searchpath", "hydra_plugins.smile_zoo_searchpath"}
PROVIDERS = ["fusion-bench", "fusion-bench-smile", "fusion-bench-smile-zoo"]
MESSAGE = " comes with the zoo: pip install 'fusion-bench-smile[demo]'"


def search_path(*arguments: str) -> ConfigSearchPathImpl:
    """The search path that the plugins make of an empty one, for a command line."""
    path = ConfigSearchPathImpl()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fusion_bench", *arguments])
        for plugin in Plugins.instance().discover(SearchPathPlugin):
            if plugin.__module__ in PLUGINS:
                plugin().manipulate_search_path(path)
    return path


def choices(config: Path) -> list[str]:
    """The arguments that select each configuration of a folder."""
    return [
        f"{group}={file.relative_to(config / group.lstrip('+')).with_suffix('')}"
        for group in ("modelpool", "taskpool", "+experiment", "+smile_row")
        for file in sorted((config / group.lstrip("+")).rglob("*.yaml"))
    ]


def test_the_framework_finds_the_configurations_of_library_and_zoo():
    entries = {entry.provider: Path(entry.path.removeprefix("file://")) for entry in search_path().get_path()}
    assert sorted(entries) == PROVIDERS
    assert (entries["fusion-bench"] / "fabric_model_fusion.yaml").exists()
    assert entries["fusion-bench-smile"].resolve() == LIBRARY
    assert entries["fusion-bench-smile-zoo"].resolve() == ZOO


def test_other_applications_keep_their_search_path(monkeypatch):
    monkeypatch.delitem(sys.modules, "fusion_bench.constants.paths")
    assert search_path("modelpool=SmileEmbedded/gentle").get_path() == []


def test_no_configuration_is_in_library_and_zoo():
    assert not set(choices(LIBRARY)) & set(choices(ZOO))


def test_with_the_zoo_every_configuration_is_accepted():
    for argument in choices(LIBRARY) + choices(ZOO):
        assert len(search_path(argument).get_path()) == 3


def test_without_the_zoo_its_configurations_are_refused_and_no_others(monkeypatch):
    monkeypatch.setitem(sys.modules, "smile_zoo", None)
    for argument in choices(ZOO):
        with pytest.raises(SystemExit, match="comes with the zoo") as ended:
            search_path("method=smile_upscaling", argument)
        assert ended.value.code == argument + MESSAGE
    for argument in choices(LIBRARY):
        search_path(argument)


SWEEPS = ["modelpool=small,SmileText/lora", "++taskpool=SmileEmbedded/test", "+experiment=smile_run,smile_text/full"]


@pytest.mark.parametrize("argument", SWEEPS)
def test_without_the_zoo_sweeps_over_its_configurations_are_refused(argument, monkeypatch):
    monkeypatch.setitem(sys.modules, "smile_zoo", None)
    with pytest.raises(SystemExit, match="comes with the zoo"):
        search_path("-m", argument)


def test_the_resolvers_name_folders():
    clip, folder, longer = OmegaConf.to_container(
        OmegaConf.create(["${smile_embedded:clip}", "${smile_folder:'+a=b/c'}", f"${{smile_folder:{'x' * 300}}}"]),
        resolve=True,
    )
    assert (Path(clip) / "config.json").exists()
    assert folder == "a=b-c"
    assert len(longer) < 200


@pytest.mark.cli
@pytest.mark.parametrize("mode", [[], ["-m"]], ids=["run", "sweep"])
def test_without_the_zoo_the_command_ends_in_one_line(mode, tmp_path):
    arguments = ["+experiment=smile_embedded/gentle", "+smile_row=smile"]
    zoo = ["smile_zoo", "hydra_plugins.smile_zoo_searchpath"]
    completed = fusion_bench_without(zoo, *mode, *arguments, cwd=tmp_path)
    assert completed.returncode == 1
    assert completed.stderr.splitlines() == [arguments[0] + MESSAGE]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method=smile_upscaling", "method.gate_q=4"], "unknown option method.gate_q (did you mean 'gate_k'?)"),
        (["method=task_arithmetic", "method.scaling_facto=0.3"], "(did you mean 'scaling_factor'?)"),
        (["-m", "+smile_row=smile,ties_merging", "method.treshold=20"], "(did you mean 'threshold'?)"),
        (["+smile_row=adamerging_task_wise", "method.max_step=1"], "(did you mean 'max_steps'?)"),
        (["+experiment=smile_grid", "+smile_row=smile", "method.top=1"], "(did you mean 'top_k'?)"),
    ],
)
def test_misspelled_options_of_every_row_are_named(arguments, message):
    with pytest.raises(SystemExit, match=r"^unknown option") as error:
        search_path(*arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "+smile_row=smile,ties_merging", "method.threshold=20", "method.gate_k=4,8"],
        ["method=adamerging/clip", "method.lr=1e-3"],
        ["method=my_own", "method.anything=1"],
        ["method=smile_upscaling/smile_upscaling", "method.gate_k=4"],
        ["+method.new=1", "method=task_arithmetic"],
    ],
)
def test_options_that_some_method_has_pass(arguments):
    assert search_path(*arguments).get_path()


def test_a_launcher_that_is_not_installed_names_the_extra():
    if importlib.util.find_spec("hydra_plugins.hydra_ray_launcher") is not None:
        pytest.skip("the Ray launcher is installed")
    for choice in ("hydra/launcher=ray", "hydra/launcher=smile_ray"):
        with pytest.raises(SystemExit, match=rf"{choice} is not installed: pip install .fusion-bench-smile\[ray\]"):
            search_path("-m", choice)
    assert search_path("-m", "hydra/launcher=joblib").get_path()
