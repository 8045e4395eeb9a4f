"""Lends the tests of GPU kernels a compiler for the host, and a current GPU."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

EMULATION = str(Path(__file__).resolve().parents[1] / "gpu_emulation")
if EMULATION not in sys.path:
    sys.path.insert(0, EMULATION)

from host_compiler import HostCompiler  # noqa: E402


@pytest.fixture(scope="session")
def host_compiler(tmp_path_factory: pytest.TempPathFactory) -> HostCompiler:
    return HostCompiler(tmp_path_factory.mktemp("cuda_on_host"))


@pytest.fixture
def current_gpu(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The tensors whose GPU `torch.cuda.device_of` has made the current one, the latest last."""
    current: list[torch.Tensor] = []

    @contextlib.contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        current.append(tensor)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    return current
