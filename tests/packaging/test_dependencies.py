"""docs/dependencies.md names the licence of every package that pyproject.toml asks for."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_dependency_has_its_licence_stated() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    asked = text[text.index("[project.optional-dependencies]") : text.index("[tool.setuptools]")]
    asked = re.sub(r"#.*", "", asked)
    needed = {name.lower() for name in re.findall(r'"([A-Za-z0-9_-]+)[^"]*"', asked)} - {
        "test",
        "docs",
    }
    rows = re.findall(
        r"^\| ([a-z0-9, -]+) \|", (ROOT / "docs/dependencies.md").read_text(), re.MULTILINE
    )
    stated = {name.strip() for row in rows for name in row.split(",")} - {"package"}
    assert needed | {"torch"} == stated - {"---"}
