"""`import growkernels` loads the ops alone; everything else comes when it is asked for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import growkernels as gk

ROOT = Path(__file__).resolve().parents[2]


def in_a_new_process(program: str) -> str:
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_drivers_wait_until_they_are_asked_for() -> None:
    program = (
        "import sys, json, torch; before = set(sys.modules); import growkernels; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    loaded = json.loads(in_a_new_process(program))
    ours = {".".join(name.split(".")[:2]) for name in loaded if name.startswith("growkernels")}
    assert ours == {"growkernels", "growkernels.ops"}
    # torch.utils.flop_counter brings Triton along where it is installed, and that its own.
    theirs = {name.split(".")[0].lstrip("_") for name in loaded} - sys.stdlib_module_names
    assert {name for name in theirs if not name.startswith("sysconfigdata")} <= {
        "growkernels",
        "torch",
        "triton",
    }


def test_every_public_name_is_there_whichever_is_asked_for_first() -> None:
    program = "\n".join(
        [
            "import importlib, sys, growkernels as gk",
            "for name in gk.__all__:",
            "    for module in [name for name in sys.modules if name.startswith('growkernels.')]:",
            "        if not module.startswith('growkernels.ops'): del sys.modules[module]",
            "    assert getattr(gk, name) is not None and name in dir(gk), name",
            "print('all of them')",
        ]
    )
    assert in_a_new_process(program) == "all of them\n"


def test_a_name_that_is_none_of_ours_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'grwoth'"):
        gk.grwoth  # noqa: B018


def test_the_version_is_stated_once_more_where_packages_state_it() -> None:
    for name, pattern in {
        "pyproject.toml": r'^version = "(.+)"$',
        "CITATION.cff": r"^version: (.+)$",
    }.items():
        found = re.search(pattern, (ROOT / name).read_text(), re.MULTILINE)
        assert found is not None
        assert found[1] == gk.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", gk.__version__)
