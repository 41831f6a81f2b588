"""The campaign against the library in a short form, and whether it would notice failures."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fusion_bench_smile import CheckpointError, SmileError, upscale
from fusion_bench_smile.construction import truncated_svd
from studies.reliability import (
    concurrency,
    damage,
    disks,
    kills,
    models,
    names,
    processes,
    readers,
    reports,
    svd,
)
from studies.reliability.__main__ import PARTS, main
from studies.reliability.children import Child
from studies.reliability.outcomes import RIGHT, Outcome, check, combined, judge, other, outcome_of
from studies.reliability.runner import BATCH, MEMORY, Case, Part, Row, Trial, run_part
from studies.reliability.targets import Target, checkpoint_targets, leftovers

SCALE = 0.01


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Processes are forked, and a fork has no other threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("part", PARTS)
def test_the_campaign_in_a_short_form(part):
    rows = run_part(PARTS[part], scale=SCALE)
    assert [row.trial for row in rows] == [*PARTS[part].trials]
    assert [name for row in rows for name in row.others] == []
    assert sum(row.counts["right"] for row in rows) > 0


# -- outcomes


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


OTHERS = {
    "another type": ValueError("wrong"),
    "an interrupt": KeyboardInterrupt(),
    "no message": SmileError(" "),
    "two lines": CheckpointError("one\ntwo"),
    "a separator of lines": CheckpointError("one\u2028two"),
    "a long message": CheckpointError("x" * 100_000),
    "memory": MemoryError(),
    "hidden memory": caused(CheckpointError("wrong"), RuntimeError("DefaultCPUAllocator: can't allocate memory")),
}


@pytest.mark.parametrize("case", OTHERS)
def test_errors_that_are_not_clear(case):
    assert outcome_of(OTHERS[case]).kind == "other"


def test_errors_that_are_clear():
    assert outcome_of(CheckpointError("the file is missing")) == Outcome("clear error", "the file is missing")
    assert outcome_of(OSError("no such file"), (OSError,)).kind == "clear error"


def test_the_worst_outcome_counts():
    clear = Outcome("clear error", "x")
    assert combined([]) == RIGHT
    assert combined([RIGHT, clear]) == clear
    assert combined([clear, other("a"), other("b")]) == other("a")


# -- the runner


def good(_: None, case: Case) -> Iterator[Outcome]:
    (case.folder / "file").write_text("")
    yield check(case.random.random() < 1, "")


def hanging(_: None, case: Case) -> Iterator[Outcome]:
    yield RIGHT
    Child(lambda send: time.sleep(100))
    time.sleep(100)


def greedy(_: None, case: Case) -> Iterator[Outcome]:
    yield judge(lambda: bytearray(2 * MEMORY), lambda _: RIGHT)


def raising(_: None, case: Case) -> Iterator[Outcome]:
    raise CheckpointError("outside of judge")
    yield RIGHT


def numbers(_: None, case: Case) -> Iterator[Outcome]:
    yield other(str(case.random.random()))


def toy(*attempts: object, seconds: float = 30.0, times: int = 2) -> Part:
    return Part("toy", lambda folder: None, {f.__name__: Trial(f, times, seconds) for f in attempts})


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_attempt_that_ends_its_process_is_other_and_the_next_ones_are_made(jobs):
    def ending(_: None, case: Case) -> Iterator[Outcome]:
        os._exit(0)

    rows = run_part(toy(good, ending, raising, greedy), jobs=jobs)
    assert [(row.trial, *row.counts.values()) for row in rows] == [
        ("good", 2, 0, 0), ("ending", 0, 0, 2), ("raising", 0, 0, 2), ("greedy", 0, 0, 2),
    ]  # fmt: skip
    assert rows[1].others == [f"toy/ending/{n}: the process exited with 0" for n in range(2)]
    assert "memory was asked for" in rows[3].others[0]


def test_an_attempt_that_hangs_is_other():
    (row,) = run_part(toy(hanging, seconds=0.1, times=1))
    assert row.counts == {"right": 1, "clear error": 0, "other": 1}
    assert row.others == ["toy/hanging/0: it took too long"]


def test_attempts_are_repeated_by_seed_and_name():
    part = toy(numbers, times=BATCH + 2)
    (row,) = run_part(part)
    assert len(set(row.others)) == BATCH + 2
    name = f"toy/numbers/{BATCH}"
    (single,) = run_part(part, chosen=lambda each: each == name)
    assert single.others == [row.others[BATCH]]
    (seeded,) = run_part(part, seed=1, scale=0.01)
    assert seeded.others != row.others[:1]


def test_a_child_is_ended_with_what_it_has_started():
    def work(send):
        grandchild = Child(lambda send: time.sleep(100))
        send(grandchild.pid)
        time.sleep(100)

    child = Child(work, leads_group=True)
    pid = next(child.values())
    assert child.end() == -9
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and Path(f"/proc/{pid}").exists():  # until init has reaped it
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.01)
    assert not Path(f"/proc/{pid}").exists()


# -- failures that the parts find


def careless(folder: Path, version: int) -> None:
    """Write two files one after the other, and leave a temporary one for a moment."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("a", "b"):
        (folder / f".{name}").write_text(str(version) * 1000)
        time.sleep(0.03)
        os.replace(folder / f".{name}", folder / name)


def read_careless(folder: Path) -> dict[str, str]:
    files = [file for name in "ab" if (file := folder / name).exists()]
    return {"folder": "".join(file.read_text() for file in files)} if files else {}


CARELESS = Target(careless, read_careless, [{"folder": str(version) * 2000} for version in range(3)])


def cases(tmp_path: Path, count: int) -> Iterator[Case]:
    for number in range(count):
        (folder := tmp_path / str(number)).mkdir()
        yield Case(number, random.Random(number), folder)


def test_kills_find_a_mixture_and_leftovers(tmp_path):
    prepared = {"toy": kills.Killable(CARELESS, 0.2)}
    for case in cases(tmp_path, 200):  # on a loaded machine, many are killed before they write
        found = kills.attempt(prepared, case, "toy")
        if any("none of the versions" in outcome.detail for outcome in found if outcome.kind == "other"):
            return
    raise AssertionError("no mixture was found")


def test_readers_find_a_mixture(tmp_path):
    session = readers.Session("toy", lambda folder: read_careless(folder)["folder"])
    found = [o for case in cases(tmp_path, 5) for o in readers.attempt({"toy": CARELESS}, case, session)]
    assert other("another model") in found


def test_full_disks_find_what_is_lost(tmp_path):
    prepared = {"toy": disks.Limited(CARELESS, 1000)}
    found = [outcome for case in cases(tmp_path, 5) for outcome in disks.attempt(prepared, case, "toy")]
    assert {outcome.kind for outcome in found} == {"other"}


def test_concurrency_finds_failing_writers(tmp_path):
    alone = Target(lambda folder, version: folder.mkdir(parents=True), lambda folder: {}, [{}])
    found = [outcome for case in cases(tmp_path, 2) for outcome in concurrency.attempt({"toy": alone}, case, "toy")]
    assert {outcome.kind for outcome in found} == {"other"}


def test_temporary_entries_and_absent_parts_are_other(tmp_path):
    assert leftovers(tmp_path) == RIGHT
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".model.x.part").mkdir()
    assert leftovers(tmp_path).kind == "other"
    assert CARELESS.examine(tmp_path / "nowhere", (0,)).kind == "other"
    assert CARELESS.examine(tmp_path / "nowhere", (0,), may_be_absent=True) == RIGHT


def test_mixed_shards_are_another_model(tmp_path):
    target = checkpoint_targets(tmp_path)["save, shards"]
    for version in (0, 1):
        target.write(tmp_path / str(version), version)
    assert target.examine(tmp_path / "0", (0, 1)) == RIGHT
    shard = sorted((tmp_path / "1").glob("*.safetensors"))[2]
    (tmp_path / "0" / shard.name).write_bytes(shard.read_bytes())
    assert target.examine(tmp_path / "0", (0, 1)).kind == "other"


def test_models_with_other_tensors_differ_and_names_are_the_users():
    base = models.perceptron()
    first, second = models.experts_of(base).values()
    model, changed = (upscale(base, {"first": first, "second": second}, **models.RANKS) for _ in range(2))
    assert models.same_tensors(model, changed)
    changed[0].up.data[0, 0] += 1e-3
    assert not models.same_tensors(model, changed)
    renamed = upscale(base, {"third": first, "second": second}, **models.RANKS)
    assert models.same_tensors(renamed, model)
    assert models.identity(renamed) != models.identity(model)  # as `verify` must find
    assert not models.same_tensors(upscale(base, {"first": second, "second": first}, **models.RANKS), model)


def test_names_find_what_is_written_or_deleted_outside(tmp_path):
    def outside(prepared, generator, folder, name):
        (folder.parent / "new").mkdir()
        yield folder / "adapters" / name

    def deleting(prepared, generator, folder, name):
        (folder.parent.parent / names.VICTIM / "adapter_model.safetensors").unlink()
        return iter(())

    for case, enter in zip(cases(tmp_path, 2), (outside, deleting), strict=True):
        assert [outcome.kind for outcome in names.attempt(None, case, enter)] == ["other"]


def test_factors_that_are_not_the_leading_ones_are_other():
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5]))
    factors = truncated_svd(matrix, 2)
    assert svd.examine(matrix, 2, factors) == RIGHT
    later = truncated_svd(torch.diag(torch.tensor([0.0, 2.0, 1.0, 0.0])), 2)
    assert svd.examine(matrix, 2, later).kind == "other"


def test_processes_must_agree():
    right, error = ("right", "", "model"), ("clear error", "of another process", "")
    assert processes.judge_results([right, right]) == RIGHT
    assert processes.judge_results([error, error]).kind == "clear error"
    for results in ([right, ("right", "", "model 2")], [right, error], [right, None]):
        assert processes.judge_results(results).kind == "other"


def test_formulas_and_broken_rows_are_other():
    text = "method,a\r\ngood run,1\r\nodd,-1.5\r\n"
    assert reports.check_csv(text) == RIGHT
    for changed in (text.replace("odd", "=1+1"), text.replace("good", "bad"), text.replace("odd", "odd,")):
        assert reports.check_csv(changed).kind == "other"
    assert reports.check_rows("| a | b |\n|---|---|\n| 1\\| | 2 |\n") == RIGHT
    assert reports.check_rows("| a | b |\n|---|---|\n| 1| | 2 |\n").kind == "other"


def test_damage_depends_on_the_random_numbers_alone():
    values = {"a": {"b": [1, 2.5, "x"], "c": None}, "d": {"e": True}}
    texts = [damage.damaged_json(random.Random(seed), values, root=("a",)) for seed in range(200)]
    assert texts == [damage.damaged_json(random.Random(seed), values, root=("a",)) for seed in range(200)]
    assert len(set(texts)) > 100
    assert all(text.rstrip().endswith(b'"d": {\n  "e": true\n }\n}') for text in texts)
    for seed in range(50):
        changed = damage.flipped(random.Random(seed), b"0123456789", start=3, end=6)
        assert (changed[:3], changed[6:]) == (b"012", b"6789")


# -- the command


def test_the_command_writes_a_page_and_fails_for_other_outcomes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("studies.reliability.__main__.PARTS", {"toy": toy(good, numbers, times=1)})
    with pytest.raises(SystemExit, match="1"):
        main(["--output", str(tmp_path / "page.md"), "--jobs", "1"])
    page = (tmp_path / "page.md").read_text()
    assert "toy/numbers/0: 0." in page
    assert "toy/numbers/0: 0." in capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    assert rows[0] == ["part", "attempts", "tried", "right", "clear error", "other"]
    assert rows[2:] == [
        ["toy", "good", "1", "1", "0", "0"], ["toy", "numbers", "1", "0", "0", "1"], ["**all**", "", "2", "1", "0", "1"]
    ]  # fmt: skip
    main(["toy/good/0", "--jobs", "1"])
    with pytest.raises(SystemExit, match="2"):
        main(["soap"])
    assert "no part 'soap'" in capsys.readouterr().err


def test_clear_errors_are_counted():
    row = Row("part", "trial")
    for detail in ("a", "a", "b"):
        row.add("part/trial/0", Outcome("clear error", detail))
    assert (row.tried, row.errors) == (3, {"a": 2, "b": 1})
