"""Every block of Python in the README and in docs/ runs, and every link leads somewhere."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import growkernels as gk
from growkernels.models.resnet import resnet18

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
# Run by tests/distributed/test_docs.py, tests/growth/test_states_page.py and test_one_scale.py.
ELSEWHERE = {"more_than_one_process.md", "states.md", "wider_layers.md"}


def blocks(page: Path) -> list[str]:
    found = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for block in found]


def nothing() -> dict[str, Any]:
    return {}


def common(model: nn.Module, *shape: int) -> dict[str, Any]:
    """What pages take as given: a model in training, its optimizer, loss and batches."""
    batches = [(torch.randn(*shape), torch.randint(3, (shape[0],))) for _ in range(2)]
    return {
        "gk": gk,
        "torch": torch,
        "nn": nn,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        "loss_fn": F.cross_entropy,
        "batches": batches,
        "x": batches[0][0],
    }


def sensli() -> dict[str, Any]:
    transformers = pytest.importorskip("transformers", reason="the page's second block needs it")
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    names = common(model, 8, 4)
    tiny = {"vocab_size": 11, "n_positions": 8, "n_embd": 8, "n_head": 2}

    def text() -> None:  # for the block that follows
        names["batches"] = [torch.randint(11, (2, 5)) for _ in range(2)]

    def ops() -> None:
        names["inputs"], names["grads"] = ([torch.randn(5, 4)] for _ in range(2))

    names["loader"], names["epochs"] = names["batches"], 21
    names["GPT2LMHeadModel"] = transformers.GPT2LMHeadModel
    names["GPT2Config"] = partial(transformers.GPT2Config, **tiny)
    names["before"] = {1: text, 2: ops}
    return names


def scaling() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    return common(model, 8, 4)


def basis() -> dict[str, Any]:
    names = common(resnet18(num_classes=3, width=32), 4, 3, 8, 8)
    return {**names, "calibration": names["batches"]}


NAMES: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": nothing,
    "sensli.md": sensli,
    "scaling.md": scaling,
    "basis.md": basis,
}


def test_every_page_with_code_is_run() -> None:
    with_code = {page.name for page in PAGES if blocks(page)}
    assert with_code == set(NAMES) | ELSEWHERE


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name in NAMES], ids=lambda p: p.name
)
def test_the_code_runs(page: Path) -> None:
    names = NAMES[page.name]()
    before = names.pop("before", {})
    for number, block in enumerate(blocks(page)):
        before.get(number, nothing)()
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)


def test_commands_name_what_the_makefile_has() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for line in re.findall(r"^make ([a-z0-9 -]+)", page.read_text(), re.MULTILINE):
            assert set(line.split()[:1]) <= targets, (page.name, line)


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_link_leads_somewhere() -> None:
    files = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md"))]
    for page in files:
        # Code is no prose: [m](x) there is something else.
        prose = re.sub(
            r"^```.*?^```|`[^`\n]+`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE
        )
        for target in re.findall(r"\]\(([^)\s]+)\)", prose):
            if target.startswith("https://"):
                continue
            path, _, anchor = target.partition("#")
            linked = page.parent / path if path else page
            assert linked.exists(), f"{page.name} links {target}"
            assert not anchor or anchor in anchors(linked), f"{page.name} links {target}"


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the group docs")
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    page = (tmp_path / "papers" / "sensli.html").read_text()
    assert "<math" in page
    assert "$$" not in page
    assert "LayerInsertion" in (tmp_path / "api" / "growth.html").read_text()
