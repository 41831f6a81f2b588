"""The real command line in processes of its own: what works, and the single line that bad input ends with."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from command_line import REPOSITORY, Workplace, fails_with, fusion_bench, image_pools, on_one_and_two_processes
from conftest import clip_tower, perturbed, t5
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from fusion_bench_smile import load, upscale

pytestmark = pytest.mark.cli


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


def other_clip(**changes: int) -> CLIPVisionModel:
    settings = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 28, "patch_size": 7,
    }  # fmt: skip
    return CLIPVisionModel(CLIPVisionConfig(**{**settings, **changes}))


def test_upscale_save_and_load_again(workplace):
    target = workplace.root / "out" / "smile"
    completed = workplace.run(f"merged_model_save_path={target}", f"method.model_path={workplace.root / 'own'}")
    assert completed.returncode == 0, completed.stderr[-3000:]
    a, b = load(target), load(workplace.root / "own")
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    again = workplace.root / "again"
    loaded = workplace.run(f"method.model_path={workplace.root / 'own'}", f"merged_model_save_path={again}")
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    assert "loading the upscaled model" in loaded.stdout
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), load(again).parameters(), strict=True))


def test_a_saved_model_is_the_model_of_a_pool(workplace):
    completed = workplace.run(f"merged_model_save_path={workplace.root / 'saved'}")
    assert completed.returncode == 0, completed.stderr[-3000:]
    pool = ["modelpool=SmileCheckpoint/clip", "modelpool.path=saved", "method=dummy", "merged_model_save_path=again"]
    completed = fusion_bench(*pool, cwd=workplace.root)
    assert completed.returncode == 0, completed.stderr[-3000:]
    saved, again = (load(workplace.root / name) for name in ("saved", "again"))
    assert all(torch.equal(x, y) for x, y in zip(saved.parameters(), again.parameters(), strict=True))
    assert "path" in fusion_bench("modelpool=SmileCheckpoint/clip", "method=dummy", cwd=workplace.root).stderr
    gone = fusion_bench(*pool[:1], "modelpool.path=gone", *pool[2:], cwd=workplace.root)
    fails_with(gone, "gone is not a folder; a SMILE checkpoint is one")


def test_a_pool_that_would_pickle_saves_a_checkpoint(tmp_path):
    """The framework's sequence-to-sequence pool; and then that checkpoint is the model of a pool."""
    base, entries = t5(), ["tokenizer: null", "_recursive_: false", "models:"]
    for number, name in enumerate(("_pretrained_", "red", "green")):
        (perturbed(base, seed=number) if number else base).save_pretrained(tmp_path / name)
        loader = "_target_: transformers.AutoModelForSeq2SeqLM.from_pretrained"
        entries.append(f"  {name}: {{{loader}, pretrained_model_name_or_path: {tmp_path / name}}}")
    (tmp_path / "conf" / "modelpool").mkdir(parents=True)
    pool = "\n".join(["_target_: fusion_bench.modelpool.Seq2SeqLMPool", *entries])
    (tmp_path / "conf" / "modelpool" / "small.yaml").write_text(pool)
    common = ["--config-dir", str(tmp_path / "conf"), "method=smile_upscaling", "method.k=4", "method.gate_k=2"]
    completed = fusion_bench(*common, "modelpool=small", "merged_model_save_path=saved", cwd=tmp_path)
    assert completed.returncode == 0, completed.stderr[-3000:]
    expected = upscale(base, {n: perturbed(base, seed=s) for s, n in ((1, "red"), (2, "green"))}, k=4, gate_k=2)
    saved = load(tmp_path / "saved")
    assert all(torch.equal(x, y) for x, y in zip(saved.parameters(), expected.parameters(), strict=True))
    again = ["modelpool=SmileCheckpoint/seq2seq_lm", "modelpool.path=saved", "method=dummy", "taskpool=dummy"]
    completed = fusion_bench(*again, cwd=tmp_path)
    assert completed.returncode == 0, completed.stderr[-3000:]


def test_the_frameworks_own_options_are_accepted(workplace):
    completed = workplace.run(
        "method.device=cpu", "method.upscaling_accelerator=cpu", "method.full_matrices=true", "method.top_k=2",
        "method.routing_use_diff=false", "method.average_experts=true", "method.model_path=null",
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr[-3000:]


OPTIONS = {
    "method.gatek=3": "unknown option method.gatek (did you mean 'gate_k'?)",
    "+method.gatek=3": "unknown option 'gatek' (did you mean 'gate_k'?)",
    "+method.routing_score=dual": "the option routing_score was removed: ",
    "method.allocation=energy": "the option method.allocation was removed: ",
    "method.routing_scope=two_pass": "routing_scope=two_pass is now routing_scope=input",
    "method.k=0": "k=0: an expert needs a rank of at least 1",
    "method.gate_k=0": "gate_k=0: the router needs a rank of at least 1",
    "method.k=33": "k=33 is more than any layer allows; the largest possible is 32",
    "method.top_k=0": "top_k=0: at least 1 expert must serve each token",
    "method.top_k=3": "top_k=3 is more than the 2 experts there are",
    "merged_model_save_path=/proc/smile/model": "nothing can be written to /proc/smile",
    "method.model_path=/proc/smile/model": "nothing can be written to /proc/smile",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_bad_options(workplace, option):
    fails_with(
        workplace.run(option, "merged_model_save_path=out" if "merged" not in option else "seed=1"), OPTIONS[option]
    )
    assert not (workplace.root / "out").exists()


def test_a_misspelled_pool(workplace):
    completed = workplace.run("modelpool=smal")
    assert completed.returncode != 0
    assert "Could not find 'modelpool/smal'" in completed.stderr


def nan_expert(workplace: Workplace) -> None:
    model = perturbed(clip_tower())
    model.vision_model.encoder.layers[1].mlp.fc1.weight.data[0, 0] = float("nan")
    workplace.add("bad", model)


def corrupt_expert(workplace: Workplace) -> None:
    file = workplace.add("bad", clip_tower()) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])


def missing_tensor(workplace: Workplace) -> None:
    file = workplace.add("bad", clip_tower()) / "model.safetensors"
    tensors = load_file(file)
    tensors["vision_model.post_layernorm.weight"][0] = float("inf")
    save_file(tensors, file, {"format": "pt"})


def missing_folder(workplace: Workplace) -> None:
    workplace.models["bad"] = str(workplace.root / "nowhere")


def no_pretrained(workplace: Workplace) -> None:
    del workplace.models["_pretrained_"]


def no_experts(workplace: Workplace) -> None:
    workplace.models = {"_pretrained_": workplace.models["_pretrained_"]}


MODELS = {
    "wider": (lambda w: w.add("bad", other_clip(hidden_size=40)), "expert 'bad': vision_model.embeddings"),
    "deeper": (lambda w: w.add("bad", other_clip(num_hidden_layers=3)), "16 additional tensors (first: vision_model"),
    "shallower": (lambda w: w.add("bad", other_clip(num_hidden_layers=1)), "16 tensors missing (first: vision_model"),
    "other patches": (
        lambda w: w.add("bad", other_clip(patch_size=14)),
        "patch_embedding.weight has the shape (32, 3, 14, 14)",
    ),
    "NaN": (nan_expert, "expert 'bad' holds NaN in vision_model.encoder.layers.1.mlp.fc1.weight"),
    "infinity": (missing_tensor, "expert 'bad' holds infinity in vision_model.post_layernorm.weight"),
    "corrupt file": (corrupt_expert, "it is incomplete or corrupt"),
    "missing folder": (missing_folder, "nowhere does not exist; correct its path"),
    "no pretrained": (no_pretrained, "the model pool has no '_pretrained_' model; it has: red, green"),
    "no experts": (no_experts, "no experts: give at least one fine-tuned model beside the pretrained one"),
}


@pytest.mark.parametrize("case", MODELS)
def test_bad_models(workplace, case):
    spoil, message = MODELS[case]
    spoil(workplace)
    fails_with(workplace.run("merged_model_save_path=out"), message)
    assert not (workplace.root / "out").exists()


def test_a_saved_model_that_is_not_whole_is_refused(workplace):
    broken = workplace.root / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    fails_with(
        workplace.run(f"method.model_path={broken}"), "has no SMILE section: this is a checkpoint of another model"
    )
    assert os.listdir(broken) == ["config.json"]


@pytest.mark.parametrize("where", ["checkout", "config folder", "elsewhere"])
def test_the_configuration_is_found_from_anywhere(where, tmp_path):
    if where == "config folder":
        (tmp_path / "config").mkdir()
    cwd = REPOSITORY if where == "checkout" else tmp_path
    completed = fusion_bench("method=smile_upscaling", "--cfg", "job", "--package", "method", cwd=cwd)
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert "_target_: fusion_bench_smile.SmileUpscalingAlgorithm" in completed.stdout


def built_wheel(project: Path, folder: Path) -> Path:
    """A wheel of a clean copy: setuptools would add files of earlier builds in the checkout."""
    ignored = shutil.ignore_patterns(".*", "build", "dist", "demo", "outputs", "zoo", "*.egg-info", "__pycache__")
    copy = shutil.copytree(project, folder / "copy", symlinks=True, ignore=ignored)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*build, str(copy)], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_a_wheel_holds_everything_but_data(tmp_path):
    wheel = built_wheel(REPOSITORY, tmp_path)
    assert wheel.stat().st_size < 2**20
    names = zipfile.ZipFile(wheel).namelist()
    configs = [f.relative_to(REPOSITORY / "config") for f in (REPOSITORY / "config").rglob("*.yaml")]
    assert all(f"fusion_bench_smile_config/{name}" in names for name in configs)
    assert "fusion_bench_smile/py.typed" in names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {
        "fusion_bench_smile",
        "fusion_bench_smile_config",
        "hydra_plugins",
    }
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    completed = fusion_bench(
        "method=smile_upscaling", "--info", "searchpath", cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert str(tmp_path / "site" / "fusion_bench_smile_config") in completed.stdout


def test_the_wheel_of_the_zoo_holds_data_and_no_recipes(tmp_path):
    names = zipfile.ZipFile(built_wheel(REPOSITORY / "zoo", tmp_path)).namelist()
    for part in ("images/data", "tiny_t5/data", "text/data", "config"):
        folder = REPOSITORY / "zoo" / "smile_zoo" / part
        files = [str(file.relative_to(REPOSITORY / "zoo")) for file in folder.rglob("*") if file.is_file()]
        assert files
        assert set(files) <= set(names)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"smile_zoo", "hydra_plugins"}


def test_other_hydra_applications_are_left_alone(tmp_path):
    script = tmp_path / "app.py"
    script.write_text(
        "import hydra\n"
        "@hydra.main(config_path=None, version_base=None)\n"
        "def main(cfg):\n"
        "    import sys\n"
        "    assert 'fusion_bench' not in sys.modules and 'torch' not in sys.modules\n"
        "main()\n"
    )
    command = [sys.executable, str(script), "--info", "searchpath"]
    completed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr
    assert "fusion-bench-smile" not in completed.stdout


BEYOND_THE_PAPER = [
    "method.routing_scope=input", "method.top_k=2", "method.calibration=8", "method.byte_ratio=1.2",
    "method.storage=int4",
]  # fmt: skip


@pytest.mark.parametrize("options", [[], BEYOND_THE_PAPER], ids=["the paper's", "beyond the paper"])
def test_two_processes_report_and_save_like_one(options, tmp_path):
    """Two CPU processes (gloo): each evaluates a part, the report is of all samples, one checkpoint is written."""
    pools = image_pools(tmp_path, {"digits": 60, "flags": 15})
    common = [*pools, "method=smile_upscaling", "method.gate_k=4", "method.k=8", *options, "print_config=false"]
    one, two = on_one_and_two_processes(*common, "merged_model_save_path=saved", folder=tmp_path)
    assert one["model_info"] == two["model_info"]
    for task in ("digits", "flags"):
        assert one[task]["accuracy"] == pytest.approx(two[task]["accuracy"], abs=1e-6)
    a, b = (load(tmp_path / name / "saved") for name in ("one", "two"))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not [name for name in os.listdir(tmp_path / "two") if name.endswith((".part", ".old"))]


def test_a_dry_run_says_what_would_be_done_and_stops(tmp_path):
    completed = Workplace(tmp_path).run("method.dry_run=true", "taskpool=dummy")
    assert completed.returncode == 0, completed.stderr[-2000:]
    assert "linear layers to upscale" in completed.stdout
    assert "parameter ratio, at most" in completed.stdout
    assert "time to factor" in completed.stdout
    assert "Traceback" not in completed.stdout
    assert "report" not in completed.stdout.split("time to factor")[1]


def test_a_dry_run_says_what_a_budget_buys(tmp_path):
    budget = ["method.dry_run=true", "method.gate_k=2", "method.k=8", "taskpool=dummy"]
    completed = Workplace(tmp_path).run(*budget, "method.byte_ratio=2.0")
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert re.search(r"ranks\W+known when the experts are factored", completed.stdout)
    assert "bytes added by byte_ratio" in completed.stdout
    fails_with(Workplace(tmp_path).run(*budget, "method.param_ratio=1.01"), "lower gate_k, or raise param_ratio")


def test_a_sweep_factors_nothing_twice(tmp_path):
    workplace = Workplace(tmp_path)
    completed = workplace.run(
        "hydra.mode=MULTIRUN",
        "taskpool=dummy",
        "method.k=2,4,8",
        f"method.factor_cache={tmp_path}/store",
        "fabric.devices=1",
    )
    assert completed.returncode == 0, completed.stderr[-2000:]
    assert completed.stdout.count("factor cache: 24 hits, 0 misses") == 2, completed.stdout[-3000:]
