"""The factor cache: hits, damaged entries, full disks, and processes that are killed or share it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import start_code
from conftest import clip_inputs, clip_tower, experts_of, output
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import nn

from fusion_bench_smile import FactorCache, load, upscale, upscale_to_folder
from fusion_bench_smile.construction import Factors, tensor_digest, truncated_svd
from fusion_bench_smile.construction.factor_cache import known_digest
from fusion_bench_smile.io import SafetensorsSource

TESTS = Path(__file__).resolve().parents[1]


def upscaled(cache: FactorCache | None, **options) -> torch.Tensor:
    torch.manual_seed(0)
    model = clip_tower()
    return output(upscale(model, experts_of(model), factor_cache=cache, **options), clip_inputs())


def test_the_second_run_factors_nothing(tmp_path, monkeypatch):
    first = FactorCache(tmp_path)
    expected = upscaled(first, k=4, gate_k=2)
    assert (first.hits, first.misses) == (0, 36)  # 12 layers, 3 experts
    monkeypatch.setattr(torch.linalg, "svd", None)  # every factorization would need it
    second = FactorCache(tmp_path)
    assert torch.equal(upscaled(second, k=4, gate_k=2), expected)
    assert (second.hits, second.misses) == (36, 0)


def test_every_point_of_a_sweep_after_the_first_is_a_hit(tmp_path):
    upscaled(FactorCache(tmp_path), k=1, gate_k=1)
    cache = FactorCache(tmp_path)
    for k in (2, 32):
        for gate_k in (1, 16):
            assert torch.equal(upscaled(cache, k=k, gate_k=gate_k), upscaled(None, k=k, gate_k=gate_k))
    assert cache.misses == 0


def test_a_sweep_reads_the_weights_of_a_file_once_unless_it_changed(tmp_path, monkeypatch):
    def save(values: torch.Tensor) -> None:
        save_file({"weight": values}, tmp_path / "new")
        os.replace(tmp_path / "new", tmp_path / "model.safetensors")

    first, second = torch.randn(2, 4, 6)
    save(first)
    reads = []
    read = SafetensorsSource.read
    monkeypatch.setattr(SafetensorsSource, "read", lambda self, name: reads.append(name) or read(self, name))

    def known() -> str:
        source = SafetensorsSource(tmp_path)
        return known_digest(source.identity("weight"), lambda: source.read("weight"))

    assert [known(), known()] == [tensor_digest(first)] * 2
    assert len(reads) == 1
    save(second)
    assert known() == tensor_digest(second)
    assert known_digest(None, lambda: first) == tensor_digest(first)


def wide_mlp() -> nn.Module:
    """Layers of more than one rank class: 32, 64, and 80 for the second."""
    return nn.Sequential(nn.Linear(90, 100), nn.LayerNorm(100), nn.Linear(100, 80), nn.GELU(), nn.Linear(80, 40))


RANKS = st.tuples(st.integers(1, 80), st.integers(1, 80))
OPTIONS: list[dict] = [
    {},
    {"routing_use_diff": False},
    {"storage": "int8"},
    {"k": -1},
    {"k": -1, "density": 0.1},
    {"param_ratio": 2.0},
]


@settings(max_examples=12, deadline=None)
@given(
    others=st.lists(RANKS, max_size=3), ranks=RANKS, options=st.sampled_from(OPTIONS),
    dtypes=st.tuples(*[st.sampled_from([torch.bfloat16, torch.float32, torch.float64])] * 2),
)  # fmt: skip
def test_the_model_does_not_depend_on_what_the_cache_holds(others, ranks, options, dtypes):
    base = wide_mlp().to(dtypes[0])
    experts = [expert.to(dtypes[1]) for expert in experts_of(base, 2)]

    def state(cache: FactorCache | None, gate_k: int, k: int) -> dict[str, torch.Tensor]:
        gate_k = min(gate_k, k, 8) if "param_ratio" in options else gate_k
        return upscale(base, experts, factor_cache=cache, **{"gate_k": gate_k, "k": k, **options}).state_dict()

    expected = state(None, *ranks)
    with tempfile.TemporaryDirectory() as folder:
        for gate_k, k in others:
            state(FactorCache(folder), gate_k, k)
        for _ in range(2):  # the second one factors nothing
            cache = FactorCache(folder)
            found = state(cache, *ranks)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert cache.misses == 0


@pytest.mark.parametrize("options", [{}, {"average_experts": True}, {"routing_use_diff": False, "k": 32}])
def test_streaming_gives_the_bits_of_upscaling_in_memory(tmp_path, options):
    base = clip_tower()
    base.save_pretrained(tmp_path / "base")
    for number, expert in enumerate(experts_of(base)):
        expert.save_pretrained(tmp_path / str(number))
    experts, options = {str(n): tmp_path / str(n) for n in range(3)}, {"k": 4, "gate_k": 2, **options}
    expected = upscale(base, experts, **options).state_dict()
    cache, others = FactorCache(tmp_path / "cache"), options | {"k": 20, "gate_k": 3}
    upscale_to_folder(tmp_path / "base", experts, tmp_path / "out", factor_cache=cache, **others)
    for factor_cache in (None, cache, FactorCache(tmp_path / "cache")):
        upscale_to_folder(tmp_path / "base", experts, tmp_path / "out", factor_cache=factor_cache, **options)
        state = load(tmp_path / "out").state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_whatever_the_rounding_depends_on_is_part_of_the_key(tmp_path):
    cache, device = FactorCache(tmp_path), torch.device("cpu")
    keys = {cache.key("content", device=device), cache.key("other", device=device), cache.key(device=device)}
    keys.add(cache.key("content", device=torch.device("meta")))
    assert cache.key("content", device=device) in keys
    assert len(keys) == 4
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert cache.key("content", device=device) not in keys
    finally:
        torch.set_num_threads(threads)


def entry(folder: Path, rank: int = 2) -> tuple[Path, Factors]:
    factors = truncated_svd(torch.randn(9, 7), rank)
    FactorCache(folder).put("key", factors)
    return folder / "key.safetensors", factors


def flipped(data: bytes, bit: int) -> bytes:
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def test_a_flipped_bit_anywhere_is_found(tmp_path, caplog):
    file, factors = entry(tmp_path)
    data, cache = file.read_bytes(), FactorCache(tmp_path)
    bits = [8 * byte + byte % 8 for byte in range(len(data))]
    for bit in bits:
        file.write_bytes(flipped(data, bit))
        assert cache.get("key") is None, bit
    assert sum("is damaged" in record.message for record in caplog.records) == len(bits)
    file.write_bytes(data)
    assert equal_factors(cache.get("key"), factors)


def equal_factors(found: Factors | None, expected: Factors) -> bool:
    return found is not None and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


DAMAGES: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "rank": lambda t: t.update(up=t["up"][:, :1].clone(), down=t["down"][:1], s=t["s"][:1]),
    "dtype": lambda t: t.update(up=t["up"].double()),
    "shape": lambda t: t.update(down=t["down"].reshape(7, 2)),
    "names": lambda t: t.update(up=t["down"], down=t["up"]),
    "missing": lambda t: t.pop("s"),
    "additional": lambda t: t.update(other=t["s"].clone()),
    "infinite": lambda t: t["s"].fill_(torch.inf),
    "checksum of another dtype": lambda t: t.update(checksum=torch.zeros(16, dtype=torch.bfloat16)),
    "no checksum": lambda t: t.pop("checksum"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_other_tensors_count_as_missing(tmp_path, damage, caplog):
    file, _ = entry(tmp_path)
    tensors = load_tensors(file.read_bytes())
    DAMAGES[damage](tensors)
    save_file(tensors, file)
    assert FactorCache(tmp_path).get("key") is None
    assert [record.message.partition(" (")[0] for record in caplog.records] == [
        "the factor cache's entry key.safetensors is damaged"
    ]


def test_an_entry_under_another_name_counts_as_missing(tmp_path):
    file, _ = entry(tmp_path)
    file.rename(tmp_path / "other.safetensors")
    assert FactorCache(tmp_path).get("other") is None
    (tmp_path / "folder.safetensors").mkdir()
    assert FactorCache(tmp_path).get("folder") is None


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "swapped"])
def test_a_damaged_entry_is_factored_anew(tmp_path, damage, caplog):
    expected = upscaled(None, k=4, gate_k=2)
    upscaled(FactorCache(tmp_path), k=4, gate_k=2)
    files = sorted(tmp_path.glob("*.safetensors"))[:5]
    contents = [file.read_bytes() for file in files]
    for file, data, other in zip(files, contents, contents[1:] + contents[:1], strict=True):
        file.write_bytes({"cut": data[:-30], "flipped": flipped(data, -66), "emptied": b"", "swapped": other}[damage])
    cache = FactorCache(tmp_path)
    assert torch.equal(upscaled(cache, k=4, gate_k=2), expected)
    assert cache.misses == 5
    assert sum("is damaged" in record.message for record in caplog.records) == 5
    again = FactorCache(tmp_path)
    assert torch.equal(upscaled(again, k=4, gate_k=2), expected)
    assert again.misses == 0


DELETE = """
import os, sys
print("ready", flush=True)
while os.getppid() == int(sys.argv[2]):
    for name in (name for name in os.listdir(sys.argv[1]) if name.endswith(".safetensors")):
        try:
            os.unlink(os.path.join(sys.argv[1], name))
        except OSError:
            pass
"""


def test_entries_that_another_process_deletes_are_missing(tmp_path, caplog):
    expected = upscaled(None, k=4, gate_k=2)
    command = [sys.executable, "-c", DELETE, str(tmp_path), str(os.getpid())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            for _ in range(5):
                assert torch.equal(upscaled(FactorCache(tmp_path), k=4, gate_k=2), expected)
        finally:
            process.kill()
    assert not [record for record in caplog.records if "is damaged" in record.message]


def test_other_weights_dtypes_and_kinds_are_other_entries(tmp_path):
    cache = FactorCache(tmp_path)
    upscaled(cache, k=4, gate_k=2)
    before = cache.misses
    upscaled(cache, k=4, gate_k=2, routing_use_diff=False)
    assert cache.misses == before + 36  # the deltas are hits, the fine-tuned weights are misses
    a = torch.randn(4, 6)
    assert len({tensor_digest(t) for t in (a, a.T.contiguous(), a.double(), a.view(torch.int32), a + 1e-6)}) == 5


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    expected = upscaled(None, k=4, gate_k=2)
    assert torch.equal(upscaled(FactorCache(tmp_path / "file" / "cache"), k=4, gate_k=2), expected)
    assert sum("continuing without it" in record.message for record in caplog.records) == 1


def test_the_cache_deletes_the_least_recently_used_entries_above_its_bound(tmp_path):
    cache = FactorCache(tmp_path, max_bytes=100_000)
    factors = truncated_svd(torch.randn(100, 100), 20)  # about 16 kB
    for number in range(20):
        cache.put(f"key{number}", factors)
        os.utime(tmp_path / f"key{number}.safetensors", (number, number))
        if number == 5:
            cache.get("key0")  # the entry is now the most recently used
    names = {file.stem for file in tmp_path.iterdir()}
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 100_000
    assert {"key0", "key19"} <= names
    assert "key1" not in names


def run(code: str, *arguments: str) -> subprocess.Popen:
    script = "import sys; sys.path[:0] = sys.argv[1:3]\n" + textwrap.dedent(code)
    return start_code(script, str(Path(__file__).parent), str(TESTS), *arguments)


SLOW = """
import time, torch
from test_factor_cache import upscaled, FactorCache
svd = torch.linalg.svd
def slow(*arguments, **options):
    time.sleep(0.2)
    return svd(*arguments, **options)
torch.linalg.svd = slow
upscaled(FactorCache(sys.argv[3]), k=4, gate_k=2)
"""


@pytest.mark.slow
def test_a_killed_run_continues_where_it_stopped(tmp_path):
    process = run(SLOW, str(tmp_path))
    while len(list(tmp_path.glob("*.safetensors"))) < 5:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = len(list(tmp_path.glob("*.safetensors")))
    assert 5 <= done < 36
    cache = FactorCache(tmp_path)
    resumed = upscaled(cache, k=4, gate_k=2)
    assert cache.hits == done
    assert torch.equal(resumed, upscaled(FactorCache(tmp_path / "other"), k=4, gate_k=2))


@pytest.mark.slow
def test_a_full_disk_is_no_error(tmp_path):
    code = """
    import logging, resource, signal; logging.basicConfig()
    from test_factor_cache import upscaled, FactorCache
    # after the imports, which may write files: no file may grow beyond 2 kB, so that writes fail as on a full disk
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    upscaled(FactorCache(sys.argv[3]), k=4, gate_k=2)
    """
    process = run(code, str(tmp_path / "cache"))
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    assert "continuing without it" in errors
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.slow
def test_processes_share_a_cache(tmp_path):
    processes = [run(SLOW.replace("0.2", "0.01"), str(tmp_path)) for _ in range(2)]
    assert [p.communicate()[1] * p.returncode for p in processes] == ["", ""]
    cache = FactorCache(tmp_path)
    upscaled(cache, k=4, gate_k=2)
    assert (cache.hits, cache.misses) == (36, 0)
    assert not list(tmp_path.glob("*.part"))
