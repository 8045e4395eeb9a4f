"""The code of docs/states.md runs as it stands there."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import Any

from ranks import on_ranks

PAGE = Path(__file__).parents[2] / "docs" / "states.md"


def run_page(folder: str, rank: int) -> dict[str, Any]:
    os.chdir(folder)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    return {"blocks": len(blocks)}


def test_every_block_of_the_page_runs(tmp_path: Path) -> None:
    checks = {"page": partial(run_page, str(tmp_path))}
    assert on_ranks(checks, 1, tmp_path) == {"page": [{"blocks": 5}]}
