"""The factor store: what it finds again, and what it does with damage, full disks, and being killed."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from conftest import clip_inputs, clip_tower, experts_of, output
from safetensors.torch import save_file

from fusion_bench_smile import FactorStore, upscale
from fusion_bench_smile.factors import truncated_svd
from fusion_bench_smile.sources import FilesSource
from fusion_bench_smile.store import digest, known_digest


def upscaled(store: FactorStore | None, **options) -> torch.Tensor:
    torch.manual_seed(0)
    model = clip_tower()
    return output(upscale(model, experts_of(model), store=store, **options), clip_inputs())


def test_the_second_time_nothing_is_factored(tmp_path, monkeypatch):
    first = FactorStore(tmp_path)
    expected = upscaled(first, k=4, gate_k=2)
    assert (first.hits, first.misses) == (0, 36)  # 12 layers, 3 experts
    monkeypatch.setattr("fusion_bench_smile.parts.truncated_svd", None)
    second = FactorStore(tmp_path)
    assert torch.equal(upscaled(second, k=4, gate_k=2), expected)
    assert (second.hits, second.misses) == (36, 0)


def test_every_point_of_a_sweep_is_found_after_the_first(tmp_path):
    upscaled(FactorStore(tmp_path), k=1, gate_k=1)
    store = FactorStore(tmp_path)
    for k in (2, 8, 32):
        for gate_k in (1, 4, 16):
            torch.testing.assert_close(upscaled(store, k=k, gate_k=gate_k), upscaled(None, k=k, gate_k=gate_k))
    assert store.misses == 0


def test_a_sweep_reads_the_weights_of_a_file_once_unless_it_changed(tmp_path, monkeypatch):
    def save(values: torch.Tensor) -> None:
        save_file({"weight": values}, tmp_path / "new")
        os.replace(tmp_path / "new", tmp_path / "model.safetensors")

    first, second = torch.randn(2, 4, 6)
    save(first)
    reads = []
    read = FilesSource.read
    monkeypatch.setattr(FilesSource, "read", lambda self, name: reads.append(name) or read(self, name))

    def known() -> str:
        source = FilesSource(tmp_path)
        return known_digest(source.identity("weight"), lambda: source.read("weight"))

    assert [known(), known()] == [digest(first)] * 2
    assert len(reads) == 1
    save(second)
    assert known() == digest(second)
    assert known_digest(None, lambda: first) == digest(first)


def test_a_larger_rank_replaces_an_entry_and_a_complete_one_serves_all(tmp_path):
    store, matrix = FactorStore(tmp_path), torch.randn(100, 100)
    store.put("key", truncated_svd(matrix, 8), 8)
    assert store.get("key", 9) is None
    store.put("key", truncated_svd(matrix, 20), 20)
    found = store.get("key", 9)
    assert found is not None
    assert found.rank == 9
    low = torch.randn(100, 3) @ torch.randn(3, 100)
    store.put("low", truncated_svd(low, 8), 8)  # its numerical rank is 3: there is no more to be had
    found = store.get("low", 50)
    assert found is not None
    assert found.rank == 3


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied"])
def test_a_damaged_entry_is_factored_anew(tmp_path, damage, caplog):
    expected = upscaled(FactorStore(tmp_path), k=4, gate_k=2)
    for file in sorted(tmp_path.glob("*.safetensors"))[:5]:
        data = bytearray(file.read_bytes())
        if damage == "flipped":
            data[-9] ^= 64
        file.write_bytes({"cut": data[:-30], "flipped": data, "emptied": b""}[damage])
    store = FactorStore(tmp_path)
    assert torch.equal(upscaled(store, k=4, gate_k=2), expected)
    assert store.misses == 5
    assert sum("is damaged" in record.message for record in caplog.records) == 5
    again = FactorStore(tmp_path)
    assert torch.equal(upscaled(again, k=4, gate_k=2), expected)
    assert again.misses == 0


def test_other_weights_dtypes_and_kinds_are_other_entries(tmp_path):
    store = FactorStore(tmp_path)
    upscaled(store, k=4, gate_k=2)
    before = store.misses
    upscaled(store, k=4, gate_k=2, routing_use_diff=False)
    assert store.misses == before + 36  # the deltas are found, the fine-tuned weights' gates are not
    a = torch.randn(4, 6)
    assert len({digest(t) for t in (a, a.T.contiguous(), a.double(), a.view(torch.int32), a + 1e-6)}) == 5


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    expected = upscaled(None, k=4, gate_k=2)
    torch.testing.assert_close(upscaled(FactorStore(tmp_path / "file" / "store"), k=4, gate_k=2), expected)
    assert sum("going on without" in record.message for record in caplog.records) == 1


def test_the_store_stays_within_its_bound_and_forgets_the_oldest(tmp_path):
    store = FactorStore(tmp_path, max_bytes=100_000)
    factors = truncated_svd(torch.randn(100, 100), 20)  # about 16 kB
    for number in range(20):
        store.put(f"key{number}", factors, 20)
        os.utime(tmp_path / f"key{number}.safetensors", (number, number))
        if number == 5:
            store.get("key0", 3)  # used just now
    names = {file.stem for file in tmp_path.iterdir()}
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 100_000
    assert {"key0", "key19"} <= names
    assert "key1" not in names


def run(code: str, *arguments: str, **kwargs) -> subprocess.Popen:
    script = "import sys; sys.path.insert(0, sys.argv[1])\n" + textwrap.dedent(code)
    command = [sys.executable, "-c", script, str(Path(__file__).parent), *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **kwargs)


SLOW = """
import time, torch
from test_store import upscaled, FactorStore
import fusion_bench_smile.parts as parts
solve = parts.truncated_svd
def slow(*arguments, **options):
    time.sleep(0.2)
    return solve(*arguments, **options)
parts.truncated_svd = slow
upscaled(FactorStore(sys.argv[2]), k=4, gate_k=2)
"""


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    process = run(SLOW, str(tmp_path))
    while len(list(tmp_path.glob("*.safetensors"))) < 5:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = len(list(tmp_path.glob("*.safetensors")))
    assert 5 <= done < 36
    store = FactorStore(tmp_path)
    resumed = upscaled(store, k=4, gate_k=2)
    assert store.hits == done
    assert torch.equal(resumed, upscaled(FactorStore(tmp_path / "other"), k=4, gate_k=2))


def test_a_full_disk_is_no_error(tmp_path):
    def limit() -> None:  # no file may grow beyond 2 kB: what a full disk does to a write
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    code = """
    import logging; logging.basicConfig()
    from test_store import upscaled, FactorStore
    upscaled(FactorStore(sys.argv[2]), k=4, gate_k=2)
    """
    process = run(code, str(tmp_path / "store"), preexec_fn=limit)
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    assert "going on without" in errors
    assert not list((tmp_path / "store").iterdir())


def test_processes_share_a_store(tmp_path):
    processes = [run(SLOW.replace("0.2", "0.01"), str(tmp_path)) for _ in range(2)]
    assert [p.communicate()[1] * p.returncode for p in processes] == ["", ""]
    store = FactorStore(tmp_path)
    upscaled(store, k=4, gate_k=2)
    assert (store.hits, store.misses) == (36, 0)
    assert not list(tmp_path.glob("*.part"))
