"""Pieces of a reproduction that continue on another machine, rehearsed without a GPU."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from travelling_state import pack, unpack  # noqa: E402


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "state").mkdir(parents=True)
    for name, size in {
        "config.json": 10, "metrics.jsonl": 300, "state/a.pt": 5000, "state/b.pt": 20_000,
        "state/images.pt": 100, ".lock": 0,
    }.items():  # fmt: skip
        (folder / name).write_bytes(os.urandom(size))
    return folder


def test_a_run_travels_in_parts(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert pack(run, out, part=4096) == []
    assert len(list(out.iterdir())) > 6
    assert max(path.stat().st_size for path in out.iterdir()) == 4096
    unpack(out, tmp_path / "there" / "run")
    expected = contents(run)
    del expected[".lock"], expected["state/images.pt"]
    assert contents(tmp_path / "there" / "run") == expected


def test_what_is_too_large_stays_and_is_named_and_old_parts_go(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(run, out, part=4096)
    assert pack(run, out, total=15_000, part=8192) == ["state/b.pt"]
    assert sum(path.stat().st_size for path in out.iterdir()) <= 20_480
    unpack(out, tmp_path / "other")
    assert sorted(contents(tmp_path / "other")) == ["config.json", "metrics.jsonl", "state/a.pt"]


def test_an_incomplete_state_is_refused_and_leaves_nothing(run: Path, tmp_path: Path) -> None:
    out, there = tmp_path / "out", tmp_path / "there"
    with pytest.raises(FileNotFoundError, match="holds no state"):
        unpack(tmp_path, there)
    pack(run, out, part=4096)
    (out / "state.tar.02").unlink()
    with pytest.raises(RuntimeError, match="lacks a part"):
        unpack(out, there)
    assert not there.exists()


MEMBERS: dict[str, dict[str, object]] = {
    "a path above": {"name": "../outside"},
    "an absolute path": {"name": "/tmp/outside"},
    "a link to elsewhere": {"name": "a", "type": tarfile.SYMTYPE, "linkname": "/etc"},
    "a link inside": {"name": "a", "type": tarfile.SYMTYPE, "linkname": "state"},
    "a hard link": {"name": "a", "type": tarfile.LNKTYPE, "linkname": "/etc/passwd"},
    "a device": {"name": "a", "type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5},
    "a pipe": {"name": "a", "type": tarfile.FIFOTYPE},
    "holes": {"name": "a", "type": tarfile.GNUTYPE_SPARSE},
    "a claimed size": {"name": "a", "size": 1 << 40},
}


@pytest.mark.parametrize("kind", [*MEMBERS, "a compressed archive"])
def test_a_hostile_state_is_refused_and_leaves_nothing(tmp_path: Path, kind: str) -> None:
    header = tarfile.TarInfo("config.json")
    header.size = 1
    content = header.tobuf() + b"x".ljust(512, b"\0")
    if kind in MEMBERS:
        member = tarfile.TarInfo("a")
        for key, value in MEMBERS[kind].items():
            setattr(member, key, value)
        content += member.tobuf()
    content += bytes(1024)
    if kind == "a compressed archive":
        packed = io.BytesIO()
        with gzip.GzipFile(fileobj=packed, mode="wb") as file:
            file.write(content)
        content = packed.getvalue()
    source = tmp_path / "source"
    source.mkdir()
    (source / "state.tar.00").write_bytes(content)
    with pytest.raises(RuntimeError, match="holds a damaged state") as caught:
        unpack(source, tmp_path / "there" / "run")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "there").iterdir()) == []
    assert not (tmp_path / "outside").exists()
    assert not (tmp_path / "there" / "outside").exists()


def piece(run: Path, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = str(ROOT / "tools" / "gpu_reproduce.py")
    return subprocess.run(
        [
            *(sys.executable, program, "sensli", "--dry-run", "--run", str(run)),
            *("--out", str(out), "--minutes", "0.35", *arguments),
        ],
        capture_output=True,
        text=True,
    )


@pytest.fixture
def one_core() -> Iterator[None]:
    """One worker process: starting them takes longer than what they do here."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


@pytest.mark.usefixtures("one_core")
def test_the_second_piece_goes_on_where_the_first_stopped(tmp_path: Path) -> None:
    first = piece(tmp_path / "here", tmp_path / "out")
    assert first.returncode == 0, first.stdout + first.stderr
    assert json.loads((tmp_path / "out" / "status.json").read_text())["status"] == "to be continued"
    second = piece(tmp_path / "there", tmp_path / "out2", "--from", str(tmp_path / "out"))
    assert second.returncode == 0, second.stdout + second.stderr
    begun, continued = contents(tmp_path / "here"), contents(tmp_path / "there")
    assert continued["config.json"] == begun["config.json"]
    assert set(begun) <= set(continued)
