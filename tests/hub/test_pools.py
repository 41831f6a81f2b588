"""The framework's model pools on the local hub: composed, built, evaluated, reloaded; some on two processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from command_line import fusion_bench
from hub.data_sets import IMAGE_SETS
from hub.once import run_once
from hub.repositories import Cache
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPVisionModel

from fusion_bench_smile import load, save
from fusion_bench_smile.reports import REPORT_FILE, RunReport

pytestmark = [pytest.mark.cli, pytest.mark.slow]

TASK = """
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [a, b, cd]
doc_to_target: label
metric_list: [{{metric: acc}}]
"""
LM_EVAL = [
    "taskpool=LMEvalHarnessTaskPool/lm_eval",
    "taskpool._target_=hub.task_pool.LMEvalLocalTaskPool",
    "taskpool.tasks=[letters]",
    "taskpool.include_path=${oc.env:HF_HOME}/tasks",
]
CLIP = ["taskpool=SmileCLIP/TA8", "taskpool.dataloader_kwargs.num_workers=0"]
IMAGES = ["taskpool=ImageClassificationTaskPool/convnext-base-224_8-tasks"]
OTHER_TASKS = [f"~taskpool.test_datasets.{task}" for task in IMAGE_SETS if task != "gtsrb"]
MERGEBENCH = [f"Llama-3.{version}" for version in ("1-8B", "1-8B-Instruct", "2-3B", "2-3B-Instruct")]
MERGEBENCH += [f"gemma-2-{size}" for size in ("2b", "2b-it", "9b", "9b-it")]
LANGUAGE_MODELS = [f"SmileMistral/m0_{experts}" for experts in ("1", "2", "3", "123")]
LANGUAGE_MODELS += [f"CausalLMPool/{name}" for name in (
    "simle_mixtral_exp_v4", "Qwen2.5-1.5B_three_models", "Qwen2.5-1.5B_math_and_code", "qwen2_math_1.5B_and_R1",
    "llama-7b_3-models_v1", "vicuna-7b-v1.5", *(f"mergebench/{name}" for name in MERGEBENCH),
)]  # fmt: skip
# sweep → its model pools, and arguments
SWEEPS: dict[str, tuple[list[str], list[str]]] = {
    "clip-b32": (["CLIPVisionModelPool/clip-vit-base-patch32_TA8"], CLIP),
    "clip-b16": (
        [f"CLIPVisionModelPool/clip-vit-base-patch16_TA8{kind}" for kind in ("", "_lora")],
        [*CLIP, "taskpool.base_model=openai/clip-vit-base-patch16"],
    ),
    "clip-l14": (
        ["CLIPVisionModelPool/clip-vit-large-patch14_TA8"],
        [*CLIP, "taskpool.base_model=openai/clip-vit-large-patch14"],
    ),
    "flan-t5": (
        [f"Seq2SeqLMPool/flan-t5-base_glue{kind}" for kind in ("", "_lora16")],
        ["taskpool=SmileGLUE/flan-t5"],
    ),
    "language": (LANGUAGE_MODELS, LM_EVAL),
    "gpt-2": (["gpt-2_glue"], ["taskpool=gpt-2_glue"]),
    "convnext": (["ConvNextForImageClassification/convnext-base-224_8-tasks"], IMAGES),
    "resnet": (
        ["ResNetForImageClassification/transformers/resnet18_gtsrb"],
        [*IMAGES, *OTHER_TASKS, "+modelpool.models.gtsrb=tanganke/resnet-18_gtsrb",
         "taskpool.processor=microsoft/resnet-18"],
    ),
    "dinov2": (
        ["Dinov2ForImageClassification/dinov2-base-imagenet1k-1-layer"],
        [*IMAGES, *OTHER_TASKS, "+modelpool.models.gtsrb=tanganke/dinov2-base_gtsrb",
         "modelpool.models._pretrained_.dataset_name=gtsrb",
         "taskpool.processor=facebook/dinov2-base-imagenet1k-1-layer"],
    ),
}  # fmt: skip
EXPECTED_FAILURES = {
    "convnext": pytest.mark.xfail(strict=True, reason=(
        "the framework needs Python 3.12 for the pool, and its task pool refuses one head for tasks of other classes"
    )),
    **dict.fromkeys(["resnet", "dinov2"], pytest.mark.xfail(
        sys.version_info < (3, 12), strict=True, reason="the framework needs Python 3.12 for the pool"
    )),
}  # fmt: skip
POOLS = [
    pytest.param(sweep, pool, id=pool, marks=EXPECTED_FAILURES.get(sweep, []))
    for sweep, (pools, _) in SWEEPS.items()
    for pool in pools
]
# a process of a job takes longer to start than the job: the other pools run with -m exhaustive
ALWAYS_ON_TWO_PROCESSES = (
    "CLIPVisionModelPool/clip-vit-base-patch16_TA8_lora", "Seq2SeqLMPool/flan-t5-base_glue",
    "CausalLMPool/Qwen2.5-1.5B_three_models",
)  # fmt: skip
ON_TWO_PROCESSES = [
    pytest.param(*each.values, id=each.id, marks=[] if each.id in ALWAYS_ON_TWO_PROCESSES else pytest.mark.exhaustive)
    for each in POOLS
    if each.values[0] not in EXPECTED_FAILURES
]


REPEATED_SAMPLES = ("gpt-2",)  # the framework's task pool repeats samples if processes cannot get equal numbers


def run_sweep(sweep: str, pools: list[str], hub: Cache, *arguments: str) -> Path:
    """The folder with a folder for each model pool, of a sweep that one worker runs."""

    def run(folder: Path) -> None:
        write_task(hub.home / "tasks")
        completed = fusion_bench(
            "-m", "+experiment=smile_run", "method=smile_upscaling", f"modelpool={','.join(pools)}", *SWEEPS[sweep][1],
            "method.gate_k=4", "method.k=8", "method.model_path=${hydra:runtime.output_dir}/model",
            "hydra.sweep.subdir='${hydra:runtime.choices.modelpool}'", "fabric.accelerator=cpu", *arguments, cwd=folder,
        )  # fmt: skip
        (folder / "output.txt").write_text(completed.stdout + completed.stderr)

    name = "-".join([sweep, str(len(pools)), pools[0].replace("/", "-"), str(len(arguments))])
    return run_once(hub.home / name, run) / "outputs" / "runs"


def write_task(folder: Path) -> None:
    """A task for lm-eval: which letter follows."""
    folder.mkdir(exist_ok=True)
    rows = [{"question": chr(97 + (5 * n) % 26) * 3, "label": n % 3} for n in range(8)]
    (folder / "letters.json").write_text("\n".join(map(json.dumps, rows)))
    (folder / "letters.yaml").write_text(TASK.format(data=folder / "letters.json"))


@pytest.mark.parametrize(("sweep", "pool"), POOLS)
def test_pool(sweep, pool, hub, tmp_path, record_property):
    """A sweep composes, builds and evaluates; the saved model is loaded and saved again."""
    if sweep == "language":
        pytest.importorskip("lm_eval")
    folder = run_sweep(sweep, SWEEPS[sweep][0], hub) / pool
    record_property("pool", pool)
    report = completed_report(folder)
    record_property("experts", len(report.models))
    record_property("tasks", len(report.tasks))
    model = load(folder / "model", reference(pool, hub))
    save(model, tmp_path)
    saved, again = load_tensors(folder / "model"), load_tensors(tmp_path)
    assert saved.keys() == again.keys()
    assert [name for name in saved if not is_equal(saved[name], again[name])] == []
    record_property("reloaded", "yes")


@pytest.mark.parametrize(("sweep", "pool"), ON_TWO_PROCESSES)
def test_pool_on_two_processes(sweep, pool, hub, record_property):
    """The model and the scores are those of one process."""
    if sweep == "language":
        pytest.importorskip("lm_eval")
    one = run_sweep(sweep, SWEEPS[sweep][0], hub) / pool
    two = run_sweep(sweep, [pool], hub, "fabric.devices=2", "fabric.strategy=ddp") / pool
    record_property("pool", pool)
    scores = [{name: task.score for name, task in completed_report(each).tasks.items()} for each in (one, two)]
    if sweep in REPEATED_SAMPLES:
        assert scores[0].keys() == scores[1].keys()
    else:
        assert scores[0] == scores[1]
    expected, found = load_tensors(one / "model"), load_tensors(two / "model")
    assert expected.keys() == found.keys()
    assert [name for name in expected if not is_equal(expected[name], found[name])] == []
    record_property("two processes", "the model" if sweep in REPEATED_SAMPLES else "yes")


def completed_report(folder: Path) -> RunReport:
    """The report of a run that was complete, with results of its tasks."""
    output = next(parent for parent in folder.parents if (parent / "output.txt").exists()) / "output.txt"
    assert (folder / REPORT_FILE).exists(), output.read_text()[-3000:]
    report = RunReport.read(folder / REPORT_FILE)
    assert report.status == "complete", f"{report.error}\n{output.read_text()[-3000:]}"
    assert report.tasks
    return report


def reference(pool: str, hub: Cache) -> nn.Module | None:
    """The pretrained model of a pool whose models are no models of transformers, but a module inside one."""
    if not pool.endswith("_TA8_lora"):
        return None
    return CLIPVisionModel.from_pretrained(hub.model("openai/clip-vit-base-patch16")).vision_model


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def is_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether dtypes and values are equal; one weight of each checkpoint is stored flat."""
    return one.dtype == other.dtype and one.flatten().equal(other.flatten())
