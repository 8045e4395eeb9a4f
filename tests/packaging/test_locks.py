"""locks/ pins what pyproject.toml and the Makefile ask for, by hashes and without addresses."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXPERIMENTS = PROJECT["project"]["optional-dependencies"]["experiments"]


def group(name: str) -> list[str]:
    asked: list[str] = []
    for entry in PROJECT["dependency-groups"][name]:
        asked += [entry] if isinstance(entry, str) else group(entry["include-group"])
    return asked


def of_makefile(name: str) -> str:
    found = re.search(rf"^{name} \?= (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("venv", [of_makefile("TORCH"), *EXPERIMENTS, *group("dev")]),
        ("venv-cuda", [of_makefile("TORCH_CUDA"), *EXPERIMENTS, *group("cuda")]),
        ("triton", group("triton")),
        ("pip", ["pip>=25.1"]),
    ],
)
def test_a_lock_pins_what_is_asked_for(name: str, asked: list[str]) -> None:
    text = (ROOT / "locks" / f"{name}.txt").read_text()
    assert "://" not in text
    pinned: dict[str, list[str]] = {}
    for entry in re.split(r"\n(?=\S)", text.strip()):
        package, version = re.match(r"([\w.-]+)==(\S+)", entry).groups()  # type: ignore[union-attr]
        pinned.setdefault(canonicalize_name(package), []).append(version)
        assert "--hash=sha256:" in entry, entry
    for requirement in map(Requirement, asked):
        versions = pinned[canonicalize_name(requirement.name)]
        assert any(requirement.specifier.contains(version) for version in versions), requirement
