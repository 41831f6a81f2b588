"""Entries of a pool become the laziest source that gives the same model as loading them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import clip_inputs, clip_tower, experts_of, output, t5, t5_inputs, tied_llama
from fusion_bench.modelpool import BaseModelPool, CausalLMPool, CLIPVisionModelPool, Seq2SeqLMPool
from fusion_bench.utils.lazy_state_dict import LazyStateDict
from hub_server import cache_model
from hydra.utils import instantiate
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model

from fusion_bench_smile import CheckpointError, PlanError, SmileUpscalingAlgorithm, save, upscale
from fusion_bench_smile.framework.model_pools import expert_source, load_model
from fusion_bench_smile.io import SafetensorsSource
from fusion_bench_smile.nn import routed_layers
from smile_zoo.images import load_pretrained

TARGET = "transformers.CLIPVisionModel.from_pretrained"


def llama_inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(1, 40, (3, 7))}


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    base = clip_tower()
    for name, model in zip(("_pretrained_", "red", "green"), [base, *experts_of(base, 2)], strict=True):
        model.save_pretrained(tmp_path / name)
    return {name: str(tmp_path / name) for name in ("_pretrained_", "red", "green")}


def clip_pool(entries: dict) -> CLIPVisionModelPool:
    return CLIPVisionModelPool(OmegaConf.create(entries))


@pytest.mark.parametrize(
    "entry_of",
    [
        lambda path: path,
        lambda path: {"_target_": TARGET, "pretrained_model_name_or_path": path},
        lambda path: {"_target_": TARGET, "pretrained_model_name_or_path": path, "torch_dtype": "float32"},
    ],
    ids=["path", "from_pretrained", "with the same dtype"],
)
def test_folders_are_read_as_files(folders, entry_of):
    pool = clip_pool({name: entry_of(path) for name, path in folders.items()})
    pretrained = load_model(pool, "_pretrained_")
    assert expert_source(pool, "red", pretrained) == Path(folders["red"])
    ours = SmileUpscalingAlgorithm(k=4, gate_k=2).run(pool)
    expected = upscale(pretrained, {n: load_model(pool, n) for n in ("red", "green")}, k=4, gate_k=2)
    x = clip_inputs()
    assert torch.equal(output(ours, x), output(expected, x))


@pytest.mark.parametrize(
    "more", [{"torch_dtype": "float16"}, {"subfolder": "."}, {"variant": None}], ids=lambda more: next(iter(more))
)
def test_what_loading_would_change_is_loaded(folders, more):
    entry = {"_target_": TARGET, "pretrained_model_name_or_path": folders["red"], **more}
    pool = clip_pool({**folders, "red": entry})
    assert callable(expert_source(pool, "red", load_model(pool, "_pretrained_")))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_pool_in_half_precision_is_read_as_files(tmp_path, stored):
    """What loading would round, reading rounds: the same model, and no expert is ever whole in memory."""
    base = tied_llama()
    for name, model in zip(("_pretrained_", "red", "green"), [base, *experts_of(base, 2)], strict=True):
        model.to(stored).save_pretrained(tmp_path / name)
    entries = {name: str(tmp_path / name) for name in ("_pretrained_", "red", "green")}
    pool = CausalLMPool(OmegaConf.create(entries), tokenizer=None, model_kwargs={"torch_dtype": "bfloat16"})
    pretrained = load_model(pool, "_pretrained_")
    assert isinstance(expert_source(pool, "red", pretrained), SafetensorsSource)
    ours = SmileUpscalingAlgorithm(k=4, gate_k=2).run(pool)
    expected = upscale(pretrained, {n: load_model(pool, n) for n in ("red", "green")}, k=4, gate_k=2)
    assert next(ours.parameters()).dtype == torch.bfloat16
    assert expected.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), expected.parameters(), strict=True))


def test_a_module_in_the_pool_is_taken_as_it_is(folders):
    base = clip_tower()
    pool = BaseModelPool({"_pretrained_": base, "red": base})
    assert expert_source(pool, "red", base) is base


def test_the_frameworks_lora_entries_are_read_as_factors(tmp_path):
    base = t5()
    base.save_pretrained(tmp_path / "base")
    for number in range(2):
        peft = get_peft_model(
            t5(), LoraConfig(r=3, lora_alpha=5, target_modules=["q", "v", "wi_0"], task_type="SEQ_2_SEQ_LM")
        )
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.2)
        peft.save_pretrained(tmp_path / str(number))
    loader = "fusion_bench.modelpool.seq2seq_lm.modelpool.load_lora_model"
    entries = {
        "_pretrained_": {
            "_target_": "transformers.AutoModelForSeq2SeqLM.from_pretrained",
            "pretrained_model_name_or_path": str(tmp_path / "base"),
        }
    }
    for number in range(2):
        entries[str(number)] = {
            "_target_": loader,
            "base_model_path": str(tmp_path / "base"),
            "peft_model_path": str(tmp_path / str(number)),
        }
    pool = Seq2SeqLMPool(OmegaConf.create(entries), tokenizer=None)
    pretrained = load_model(pool, "_pretrained_")
    assert expert_source(pool, "0", pretrained) == tmp_path / "0"
    ours = SmileUpscalingAlgorithm(k=4, gate_k=2).run(pool)
    merged = upscale(pretrained, {n: load_model(pool, n) for n in ("0", "1")}, k=4, gate_k=2)
    x = t5_inputs()
    torch.testing.assert_close(output(ours, x), output(merged, x), rtol=1e-4, atol=1e-4)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_adapters_of_clips_inner_module_are_read_as_factors(tmp_path, cache, caplog):
    """The framework's clip-vit-base-patch16_TA8_lora, with names on the hub."""
    base = clip_tower()
    base.save_pretrained(tmp_path / "base")
    loaders = "fusion_bench.models.linearized.vision_model"
    entries: dict[str, dict] = {
        "_pretrained_": {"_target_": f"{loaders}.load_fft_vision_model_hf", "model_name": str(tmp_path / "base")}
    }
    for number in range(2):
        peft = get_peft_model(clip_tower().vision_model, LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.2)
        peft.save_pretrained(tmp_path / str(number), safe_serialization=number == 0)
        snapshot = cache_model(tmp_path / str(number), cache, f"org/lora_{number}")
        entries[str(number)] = {
            "_target_": f"{loaders}.load_lora_vision_model_hf", "base_model_name": str(tmp_path / "base"),
            "peft_name": f"org/lora_{number}", "merge_and_unload": True,
        }  # fmt: skip
    pool = clip_pool(entries)
    pretrained = load_model(pool, "_pretrained_")
    assert expert_source(pool, "1", pretrained) == snapshot
    with caplog.at_level("INFO"):
        ours = SmileUpscalingAlgorithm(k=4, gate_k=2).run(pool)
    assert "2 of 2 experts are read as LoRA factors" in caplog.text
    assert {layer.layout.ranks for layer in routed_layers(ours).values()} == {(3, 3)}
    merged = upscale(pretrained, {n: load_model(pool, n) for n in ("0", "1")}, k=4, gate_k=2)
    x = clip_inputs()
    torch.testing.assert_close(output(ours, x), output(merged, x), rtol=1e-4, atol=1e-4)
    entries["1"]["return_vision_model"] = False  # the adapter has the names of the inner module
    assert callable(expert_source(clip_pool(entries), "1", pretrained))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("./nowhere", "the folder ./nowhere does not exist; correct its path"),
        ("a/b/c", "'a/b/c' is neither a folder nor the name of a model on the hub; correct its path"),
        ("org/absent", "org/absent is no folder, its adapter_config.json is not in the cache, and the hub does not"),
        ({"peft_model_path": "./nowhere", "base_model_path": "org/base"}, "the folder ./nowhere does not exist"),
        (
            {"peft_model_path": "org/lora", "base_model_path": "${oc.env:NOT_SET_ANYWHERE}"},
            "KeyError raised while resolving interpolation",
        ),
        ({"peft_model_path": "???", "base_model_path": "org/base"}, "Missing mandatory value"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_paths_that_lead_nowhere_are_named_in_one_line(folders, cache, entry, message):
    if isinstance(entry, dict):
        entry = {"_target_": "fusion_bench.modelpool.seq2seq_lm.modelpool.load_lora_model", **entry}
    pool = clip_pool({**folders, "red": entry})
    with pytest.raises(PlanError) as error:
        expert_source(pool, "red", load_model(pool, "_pretrained_"))
    assert str(error.value).startswith(f"model 'red' of the pool: {message}")
    assert "\n" not in str(error.value)


def test_names_on_the_hub_beside_a_loaded_model(folders, cache):
    base = clip_tower()
    for name in ("red", "green"):
        cache_model(Path(folders[name]), cache, f"org/{name}")
    ours = SmileUpscalingAlgorithm(k=4, gate_k=2).run({"_pretrained_": base, "red": "org/red", "green": "org/green"})
    expected = upscale(base, {name: folders[name] for name in ("red", "green")}, k=4, gate_k=2)
    assert torch.equal(output(ours, (x := clip_inputs())), output(expected, x))


def test_a_pool_of_older_files_is_read_tensor_by_tensor(folders):
    base = load_model(clip_pool(folders), "_pretrained_")
    expected = upscale(base, {name: folders[name] for name in ("red", "green")}, k=4, gate_k=2)
    for name in ("red", "green"):
        model = load_model(clip_pool(folders), name)
        torch.save(model.state_dict(), Path(folders[name]) / "pytorch_model.bin")
        (Path(folders[name]) / "model.safetensors").unlink()
    assert expert_source(clip_pool(folders), "red", base) == Path(folders["red"])
    ours = SmileUpscalingAlgorithm(k=4, gate_k=2).run(clip_pool(folders))
    assert torch.equal(output(ours, (x := clip_inputs())), output(expected, x))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_pool_with_lazy_loading(tmp_path, dtype):
    """The framework's pool gives lazy state dicts, whose files are read; the pretrained model is loaded."""
    base = tied_llama()
    for name, model in zip(("_pretrained_", "red", "green"), [base, *experts_of(base, 2)], strict=True):
        model.save_pretrained(tmp_path / name)
    entries = {name: str(tmp_path / name) for name in ("_pretrained_", "red", "green")}
    options = {"tokenizer": None, "model_kwargs": {"torch_dtype": dtype} if dtype else {}}
    lazy = CausalLMPool(OmegaConf.create(entries), enable_lazy_loading=True, **options)
    assert isinstance(lazy.load_model("red"), LazyStateDict)
    ours = SmileUpscalingAlgorithm(k=4, gate_k=2).run(lazy)
    expected = SmileUpscalingAlgorithm(k=4, gate_k=2).run(CausalLMPool(OmegaConf.create(entries), **options))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), expected.parameters(), strict=True))
    assert lazy.enable_lazy_loading
    pretrained = load_model(lazy, "_pretrained_")
    given = {"_pretrained_": pretrained, **{name: lazy.load_model(name) for name in ("red", "green")}}
    ours = SmileUpscalingAlgorithm(k=4, gate_k=2).run(given)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), expected.parameters(), strict=True))
    with pytest.raises(PlanError, match="model '_pretrained_' of the pool is a LazyStateDict: give its class"):
        SmileUpscalingAlgorithm(k=4, gate_k=2).run(given | {"_pretrained_": given["red"]})


def test_an_adapter_on_another_base_is_loaded(tmp_path, folders):
    loader = "fusion_bench.modelpool.seq2seq_lm.modelpool.load_lora_model"
    entry = {"_target_": loader, "base_model_path": "elsewhere", "peft_model_path": str(tmp_path)}
    pool = clip_pool({**folders, "red": entry})
    with pytest.raises(PlanError, match="model 'red' of the pool"):
        expert_source(pool, "red", load_model(pool, "_pretrained_"))()  # type: ignore[operator]


def test_the_embedded_experts_are_read_as_factors():
    entry = {"_target_": "smile_zoo.images.load_expert", "task": "digits", "strength": "gentle"}
    pool = clip_pool({"_pretrained_": {"_target_": "smile_zoo.images.load_pretrained"}, "digits": entry})
    pretrained = load_pretrained()
    found = expert_source(pool, "digits", pretrained)
    assert isinstance(found, Path)
    ours = upscale(pretrained, {"digits": found}, k=16, gate_k=8)
    merged = upscale(pretrained, {"digits": load_model(pool, "digits")}, k=16, gate_k=8)
    x = {"pixel_values": torch.randn(4, 3, 28, 28)}
    torch.testing.assert_close(output(ours.eval(), x), output(merged.eval(), x), rtol=1e-4, atol=1e-4)


CONFIG = Path(__file__).resolve().parents[2] / "config" / "modelpool"


@pytest.mark.parametrize(
    ("entry", "make", "inputs"),
    [("clip", clip_tower, clip_inputs), ("seq2seq_lm", t5, t5_inputs), ("causal_lm", tied_llama, llama_inputs)],
)
def test_pools_of_saved_checkpoints(tmp_path, entry, make, inputs):
    base = make()
    model = upscale(base, experts_of(base), gate_k=2, k=4)
    save(model, tmp_path)
    config = OmegaConf.load(CONFIG / "SmileCheckpoint" / f"{entry}.yaml")
    config.path = str(tmp_path)
    loaded = instantiate(config).load_model("_pretrained_")
    assert torch.equal(output(loaded, (x := inputs())), output(model, x))


@pytest.mark.parametrize("entry", ["clip", "seq2seq_lm", "causal_lm"])
def test_pools_of_saved_checkpoints_need_a_folder(entry):
    pool = instantiate(OmegaConf.load(CONFIG / "SmileCheckpoint" / f"{entry}.yaml"))
    with pytest.raises(CheckpointError, match=r"no folder of a SMILE checkpoint is given: .* modelpool\.path=FOLDER"):
        pool.load_model("_pretrained_")


@pytest.mark.parametrize(("entry", "experts"), [("m0_1", 1), ("m0_2", 1), ("m0_3", 1), ("m0_123", 3)])
def test_the_papers_mistral_pools(entry, experts):
    pool = instantiate(OmegaConf.load(CONFIG / "SmileMistral" / f"{entry}.yaml"))
    assert type(pool).__name__ == "CausalLMPool"
    assert len(pool.model_names) == experts
    assert pool.get_model_path("_pretrained_") == "mistralai/Mistral-7B-v0.1"
