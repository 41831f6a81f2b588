"""The factor cache: hits, damaged entries, full disks, and processes that are killed or share it."""

from __future__ import annotations

import os
import signal
import subprocess
import textwrap
import time
from pathlib import Path

import pytest
import torch
from command_line import start_code
from conftest import clip_inputs, clip_tower, experts_of, output
from safetensors.torch import save_file

from fusion_bench_smile import FactorCache, upscale
from fusion_bench_smile.construction import tensor_digest, truncated_svd
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
    for k in (2, 8, 32):
        for gate_k in (1, 4, 16):
            torch.testing.assert_close(upscaled(cache, k=k, gate_k=gate_k), upscaled(None, k=k, gate_k=gate_k))
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


def test_a_larger_rank_replaces_an_entry_and_a_complete_one_serves_all_ranks(tmp_path):
    cache, matrix = FactorCache(tmp_path), torch.randn(100, 100)
    cache.put("key", truncated_svd(matrix, 8), 8)
    assert cache.get("key", 9) is None
    cache.put("key", truncated_svd(matrix, 20), 20)
    result = cache.get("key", 9)
    assert result is not None
    assert result.rank == 9
    low = torch.randn(100, 3) @ torch.randn(3, 100)
    cache.put("low", truncated_svd(low, 8), 8)  # its numerical rank is 3: the factors are complete
    result = cache.get("low", 50)
    assert result is not None
    assert result.rank == 3


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied"])
def test_a_damaged_entry_is_factored_anew(tmp_path, damage, caplog):
    expected = upscaled(FactorCache(tmp_path), k=4, gate_k=2)
    for file in sorted(tmp_path.glob("*.safetensors"))[:5]:
        data = bytearray(file.read_bytes())
        if damage == "flipped":
            data[-9] ^= 64
        file.write_bytes({"cut": data[:-30], "flipped": data, "emptied": b""}[damage])
    cache = FactorCache(tmp_path)
    assert torch.equal(upscaled(cache, k=4, gate_k=2), expected)
    assert cache.misses == 5
    assert sum("is damaged" in record.message for record in caplog.records) == 5
    again = FactorCache(tmp_path)
    assert torch.equal(upscaled(again, k=4, gate_k=2), expected)
    assert again.misses == 0


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
    torch.testing.assert_close(upscaled(FactorCache(tmp_path / "file" / "cache"), k=4, gate_k=2), expected)
    assert sum("continuing without it" in record.message for record in caplog.records) == 1


def test_the_cache_deletes_the_least_recently_used_entries_above_its_bound(tmp_path):
    cache = FactorCache(tmp_path, max_bytes=100_000)
    factors = truncated_svd(torch.randn(100, 100), 20)  # about 16 kB
    for number in range(20):
        cache.put(f"key{number}", factors, 20)
        os.utime(tmp_path / f"key{number}.safetensors", (number, number))
        if number == 5:
            cache.get("key0", 3)  # the entry is now the most recently used
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
