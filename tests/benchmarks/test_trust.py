"""What keeps benchmarks from being believed too much: noise, clean commits, stale marks, quiet."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from test_benchmark_results import family_result

from benchmarks import __main__ as command
from benchmarks import against, sources
from benchmarks.against import Side, built_tree, compare
from benchmarks.families import family_files, load_family
from benchmarks.interleave import noise_floor
from benchmarks.results import FamilyResult, load
from benchmarks.table import Table


def result_of(family: str, **environment: object) -> FamilyResult:
    toy = family_result(family)
    return replace(toy, environment={**toy.environment, **environment})


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True)


def write(root: Path, name: str, text: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_one_function_against_itself_gives_the_noise() -> None:
    durations = iter([1.0] * 4 + [1.0, 1.1, 1.0, 0.8])
    ratios = noise_floor(lambda: None, lambda call, calls: next(durations), {}, 2)
    assert ratios == pytest.approx([1 / 1.1, 1 / 0.8])
    noise = result_of("toy", noise_floor=[0.9, 1.0, 1.2]).noise()
    assert noise is not None
    assert "1.000× (0.950 to 1.100)" in noise
    assert result_of("toy").noise() is None


def test_noise_and_sources_are_stored(tmp_path: Path) -> None:
    result = result_of("toy", noise_floor=[0.9, 1.0], sources="abc")
    assert load(result.store(tmp_path)) == result


def test_results_of_other_sources_are_marked_in_tables() -> None:
    now = sources.fingerprint("splitting", "cpu")
    fresh = result_of("splitting", sources=now)
    assert not fresh.stale
    assert fresh.machine == "Some CPU, 2 threads"
    table = Table("speed", "splitting", ("case", "shape", "opponent", "speed-up", "machine"))
    for environment in ({"sources": "other"}, {}):
        old = result_of("splitting", time="2026-01-02T03:04:05+00:00", **environment)
        assert old.stale
        assert "(**stale**: sources changed after 2026-01-02)" in table.markdown([old])
    assert not result_of("toy").stale  # no family of this checkout


def test_every_family_says_which_kernels_it_measures() -> None:
    for name, path in family_files().items():
        for kernel in load_family(path).KERNELS:
            assert sources.source_files((kernel,), "cpu") != sources.source_files((), "cpu"), name


def test_a_hash_sees_what_runs_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, "csrc/common/op.h", "1")
    kernel = write(tmp_path, "csrc/splitting/cpu.cpp", "1")
    launch = write(tmp_path, "csrc/splitting/cuda.cu", "1")
    write(tmp_path, "csrc/virtual_grad/cpu.cpp", "1")
    before = {kind: sources.fingerprint("splitting", kind, tmp_path) for kind in ("cpu", "cuda")}
    launch.write_text("2")
    write(tmp_path, "csrc/virtual_grad/cpu.cpp", "2")
    assert sources.fingerprint("splitting", "cpu", tmp_path) == before["cpu"]
    assert sources.fingerprint("splitting", "cuda", tmp_path) != before["cuda"]
    kernel.write_text("2")
    assert sources.fingerprint("splitting", "cpu", tmp_path) != before["cpu"]


def test_only_changes_that_could_be_measured_count(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    for name in ("csrc/a.cpp", "benchmarks/results/a.json", "README.md"):
        write(tmp_path, name, "1")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "all")
    for name in ("benchmarks/results/a.json", "README.md"):
        write(tmp_path, name, "2")
    assert sources.uncommitted(tmp_path) == []
    write(tmp_path, "csrc/a.cpp", "2")
    assert sources.uncommitted(tmp_path) == ["csrc/a.cpp"]


def test_nothing_is_stored_from_files_that_no_commit_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "uncommitted", lambda: ["csrc/a.cpp", "setup.py"])
    assert command.main(["splitting"]) == 2
    assert "2 files differ from the commit, csrc/a.cpp first" in capsys.readouterr().err


def test_a_busy_machine_is_refused_unless_told_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[Sequence[str]] = []
    monkeypatch.setattr(command, "busy_cores", lambda: 1.2)
    monkeypatch.setattr(command.pytest, "main", lambda flags: ran.append(flags) or 0)
    assert command.main(["splitting", "--quick"]) == 2
    assert "1.2 of" in capsys.readouterr().err
    assert not ran
    assert command.main(["splitting", "--quick", "--busy"]) == 0
    monkeypatch.setattr(command, "busy_cores", lambda: 0.1)
    assert command.main(["splitting", "--quick"]) == 0
    assert len(ran) == 2


FAMILIES = """
from types import SimpleNamespace as Family
from benchmarks.case import OURS

def family_files(): return {"toy": "toy"}
def load_family(path): return path
def prepare(device): return Family(calls={OURS: lambda: sum(range(%d))})
def cases_on(kind, family): return [Family(name=name, prepare=prepare) for name in %r]
"""


def tree(root: Path, size: int, cases: Sequence[str]) -> Path:
    write(root, "benchmarks/__init__.py", "")
    write(root, "benchmarks/case.py", "OURS = 'ours'")
    write(root, "benchmarks/families.py", FAMILIES % (size, list(cases)))
    return root


def test_two_trees_are_timed_in_turn(tmp_path: Path) -> None:
    other = Side(tree(tmp_path / "other", 40_000, ["sum"]), "cpu")
    ours = Side(tree(tmp_path / "ours", 10_000, ["sum", "new"]), "cpu")
    try:
        heading, line, new = compare(other, ours, ["toy"], quick=True)
    finally:
        other.close()
        ours.close()
    assert "above 1 this one is faster" in heading
    # Four times the work: which is slower is certain, by how much is not.
    assert float(line.removeprefix("toy: sum: ").split()[0]) > 1.5
    assert new == "toy: new: only here"


def test_a_side_that_dies_is_said(tmp_path: Path) -> None:
    side = Side(tree(tmp_path, 1, ["sum"]), "cpu")
    with pytest.raises(RuntimeError, match="ended with status"):
        side.ask("prepare", "toy", "no such case")


@pytest.mark.parametrize("works", [True, False])
def test_a_commit_is_built_apart_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, works: bool
) -> None:
    git(tmp_path, "init", "-q")
    script = "open('built', 'w')" if works else "raise SystemExit('no compiler')"
    write(tmp_path, "setup.py", script)
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "first")
    write(tmp_path, "setup.py", "raise SystemExit('not this one')")
    monkeypatch.setattr(against, "_ROOT", tmp_path)
    if works:
        with built_tree("HEAD") as built:
            assert (built / "built").exists()
    else:
        failure = pytest.raises(RuntimeError, match="HEAD cannot be built: no compiler")
        with failure, built_tree("HEAD"):
            pass
    listed = subprocess.run(
        ["git", "-C", str(tmp_path), "worktree", "list"], capture_output=True, text=True, check=True
    )
    assert len(listed.stdout.splitlines()) == 1
    with pytest.raises(ValueError, match="there is no commit 'nonsense'"), built_tree("nonsense"):
        pass


def test_a_commit_that_is_none_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["splitting", "--busy", "--against", "nonsense"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
