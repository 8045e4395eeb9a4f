"""The archive of sources holds all that a build reads, and nothing that one made."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    folder = tmp_path_factory.mktemp("sources")
    arguments = ["egg_info", "--egg-base", str(folder), "sdist", "--formats=tar", "-d", str(folder)]
    subprocess.run([sys.executable, "setup.py", "--quiet", *arguments], cwd=ROOT, check=True)
    (archive,) = folder.glob("*.tar")
    with tarfile.open(archive) as opened:
        return {name.partition("/")[2] for name in opened.getnames()}


def test_it_holds_what_the_build_reads(members: set[str]) -> None:
    build = ["setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md"]
    build += ["tools/build_backend.py", "tools/toolchain.py"]
    build += [str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix]
    assert sorted(set(build) - members) == []


def test_it_holds_the_package(members: set[str]) -> None:
    suffixes = {".py", ".html", ".toml", ".typed", ".md"}
    files = (p for p in (ROOT / "growkernels").rglob("*") if p.suffix in suffixes)
    assert sorted({str(p.relative_to(ROOT)) for p in files} - members) == []


def test_it_holds_nothing_that_was_built(members: set[str]) -> None:
    built = [n for n in members if n.endswith((".so", ".pyc", ".o")) or "libgrowkernels" in n]
    assert built == []
