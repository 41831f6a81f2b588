"""The configurations that users select by name: they fit together, and with the framework's own."""

from __future__ import annotations

from pathlib import Path

import fusion_bench.constants.paths  # noqa: F401  # as in the framework's command line: our search path is added
import pytest
from command_line import REPOSITORY
from fusion_bench.utils import import_object
from fusion_bench.utils.hydra_utils import get_default_config_path
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from fusion_bench_smile.framework.program import single_task_config
from fusion_bench_smile.leaderboard.published import published_for
from fusion_bench_smile.reports import label_of

CONFIG, ZOO_CONFIG = REPOSITORY / "config", REPOSITORY / "zoo" / "smile_zoo" / "config"
GROUPS = {"smile_embedded": ZOO_CONFIG, "smile_text": ZOO_CONFIG, "smile_clip": CONFIG, "smile_glue": CONFIG}
EXPERIMENTS = [
    f"{group}/{file.stem}"
    for group, config in GROUPS.items()
    for file in sorted((config / "experiment" / group).glob("*.yaml"))
]
ROWS = sorted(file.stem for file in (CONFIG / "smile_row").glob("*.yaml"))
ONLY_CLIP = {"adamerging", "adamerging_task_wise", "fisher", "regmean"}  # as the framework has them
PAIRS = [(e, r) for e in EXPERIMENTS for r in ROWS if r not in ONLY_CLIP or e.startswith(("smile_e", "smile_c"))]


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(get_default_config_path(), version_base=None):
        config = compose("fabric_model_fusion", [*overrides], return_hydra_config=True)
    for node in (config, config.hydra, config.hydra.job):
        OmegaConf.set_readonly(node, False)
        OmegaConf.set_struct(node, False)
    config.hydra.runtime.output_dir = "outputs/somewhere"
    HydraConfig.instance().set_config(config)
    return config


def resolved(config: DictConfig) -> DictConfig:
    del config["hydra"]
    OmegaConf.resolve(config)
    return config


def test_there_are_experiments_and_rows():
    assert {"smile_embedded/gentle", "smile_text/lora", "smile_clip/l14", "smile_glue/lora"} <= set(EXPERIMENTS)
    assert {"individual", "smile", "smile_framework", "adamerging"} <= set(ROWS)


@pytest.mark.parametrize(("experiment", "row"), PAIRS)
def test_every_row_goes_with_every_experiment(experiment, row):
    config = resolved(composed(f"+experiment={experiment}", f"+smile_row={row}"))
    assert config["_target_"] == "fusion_bench_smile.framework.ReportingFusionProgram"
    for part in (config, config.method, config.modelpool, config.taskpool):
        if "_target_" in part:  # methods of the framework's version 0.1 have a name instead
            import_object(part["_target_"])
    label = label_of(OmegaConf.to_container(config.method))
    assert "?" not in label
    assert "_" not in label.replace("gate_k", "")
    experts = [name for name in config.modelpool.models if name != "_pretrained_"]
    assert len(experts) == 8
    for expert in experts:
        single_task_config(config.taskpool, expert)
    assert config.path.log_dir == "outputs/somewhere"


@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if name.startswith(("smile_clip", "smile_glue"))])
def test_published_results_belong_to_the_real_experiments(experiment):
    config = composed(f"+experiment={experiment}")
    pool, title = config.hydra.runtime.choices["modelpool"], config.benchmark
    config = resolved(config)
    tasks = config.taskpool.get("test_datasets")
    found = published_for(pool, tuple(tasks))
    assert found is not None
    assert found.title == title
    if "clip" in experiment:
        of_heads = {config.taskpool[part].pretrained_model_name_or_path for part in ("processor", "clip_model")}
        assert of_heads == {config.modelpool.models["_pretrained_"]}


@pytest.mark.parametrize(
    ("overrides", "folder"),
    [
        (["+experiment=smile_run", "method=task_arithmetic"], "outputs/runs/method=task_arithmetic"),
        (["+experiment=smile_run", "method=dummy", "fabric.devices=2", "path.output_dir=o"], "o/runs/method=dummy"),
        (["+experiment=smile_embedded/gentle", "+smile_row=smile"], "outputs/embedded-gentle/smile_row=smile"),
        (["+experiment=smile_embedded/gentle"], "outputs/embedded-gentle/default"),
        (
            ["+experiment=smile_grid", "method.k=8", "modelpool=SmileText/full"],
            "outputs/grid/method.k=8,modelpool=SmileText-full",
        ),
    ],
)
def test_a_folder_is_named_after_what_a_run_computes(overrides, folder):
    config = composed(*overrides)
    config.hydra.job.override_dirname = override_dirname(config)
    assert Path(config.hydra.run.dir) == Path(folder)
    assert Path(config.hydra.sweep.dir, config.hydra.sweep.subdir) == Path(folder)


def override_dirname(config: DictConfig) -> str:
    """What Hydra fills in when it starts a job."""
    from hydra._internal.config_loader_impl import get_overrides_dirname
    from hydra.core.override_parser.overrides_parser import OverridesParser

    settings = config.hydra.job.config.override_dirname
    return get_overrides_dirname(
        OverridesParser.create().parse_overrides(list(config.hydra.overrides.task)),
        kv_sep=settings.kv_sep,
        item_sep=settings.item_sep,
        exclude_keys=settings.exclude_keys,
    )


def test_long_names_are_shortened_and_stay_apart():
    def name(overrides: str) -> str:
        return OmegaConf.create({"name": f"${{smile_folder:'{overrides}'}}"}).name

    long = ",".join(f"a.b{number}=1" for number in range(60))
    assert len(name(long)) < 200
    assert name(long) != name(f"{long},c=1")
    assert name("+x=a/b c:d") == "x=a-b-c-d"
    assert name("method.k=8,method.gate_k=4") == "method.k=8,method.gate_k=4"


@pytest.mark.parametrize(
    ("launcher", "plugin"),
    [
        ("joblib", "hydra_joblib_launcher"),
        ("submitit_slurm", "hydra_submitit_launcher"),
        ("smile_slurm", "hydra_submitit_launcher"),
        ("smile_ray", "hydra_ray_launcher"),
    ],
)
def test_launchers_can_be_selected(launcher, plugin):
    pytest.importorskip(f"hydra_plugins.{plugin}")
    config = composed("+experiment=smile_grid", f"hydra/launcher={launcher}")
    import_object(config.hydra.launcher["_target_"])
    if launcher == "smile_slurm":
        assert (config.hydra.launcher.gpus_per_node, config.hydra.launcher.tasks_per_node) == (1, 1)
    if launcher == "smile_ray":
        assert config.hydra.launcher.ray.remote.num_gpus == 1
