"""Lends the tests of CUDA kernels a compiler for the host."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

EMULATION = str(Path(__file__).resolve().parents[1] / "gpu_emulation")
if EMULATION not in sys.path:
    sys.path.insert(0, EMULATION)

from host_compiler import HostCompiler  # noqa: E402


@pytest.fixture(scope="session")
def host_compiler(tmp_path_factory: pytest.TempPathFactory) -> HostCompiler:
    return HostCompiler(tmp_path_factory.mktemp("cuda_on_host"))
