"""The framework's model pools on the local hub: composed, built, evaluated, reloaded; some on two processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import fusion_bench
from hub.once import run_once
from hub.repositories import Cache
from safetensors.torch import load_file

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
}
POOLS = [(sweep, pool) for sweep, (pools, _) in SWEEPS.items() for pool in pools]


def run_sweep(sweep: str, hub: Cache, *arguments: str) -> Path:
    """The folder of a sweep over model pools, which one worker runs: a folder for each pool."""
    pools, others = SWEEPS[sweep]

    def run(folder: Path) -> None:
        write_task(hub.home / "tasks")
        completed = fusion_bench(
            "-m", "+experiment=smile_run", "method=smile_upscaling", f"modelpool={','.join(pools)}", *others,
            "method.gate_k=4", "method.k=8", "method.model_path=${hydra:runtime.output_dir}/model",
            "hydra.sweep.subdir='${hydra:runtime.choices.modelpool}'", "fabric.accelerator=cpu", *arguments, cwd=folder,
        )  # fmt: skip
        (folder / "output.txt").write_text(completed.stdout + completed.stderr)
        Path(f"/tmp/dbg-{sweep}.txt").write_text(completed.stdout + completed.stderr)

    return run_once(hub.home / "-".join([sweep, *(a.partition("=")[2] for a in arguments)]), run)


def write_task(folder: Path) -> None:
    """A task for lm-eval: which letter follows."""
    folder.mkdir(exist_ok=True)
    rows = [{"question": chr(97 + (5 * n) % 26) * 3, "label": n % 3} for n in range(8)]
    (folder / "letters.json").write_text("\n".join(map(json.dumps, rows)))
    (folder / "letters.yaml").write_text(TASK.format(data=folder / "letters.json"))


@pytest.mark.parametrize(("sweep", "pool"), POOLS, ids=[pool for _, pool in POOLS])
def test_pool(sweep, pool, hub, tmp_path, record_property):
    folder = run_sweep(sweep, hub) / "outputs" / "runs" / pool
    report = RunReport.read(folder / REPORT_FILE)
    record_property("composed", pool)
    assert report.status == "complete", report.error
    record_property("built", len(report.models))
    assert report.tasks
    record_property("evaluated", report.average)
    model = load(folder / "model")
    save(model, tmp_path)
    saved, again = (load_tensors(path) for path in (folder / "model", tmp_path))
    assert saved.keys() == again.keys()
    assert [name for name in saved if not is_equal(saved[name], again[name])] == []
    record_property("reloaded", True)


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def is_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether dtypes and values are equal; one weight of each checkpoint is stored flat."""
    return one.dtype == other.dtype and one.flatten().equal(other.flatten())
