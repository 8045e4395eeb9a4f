"""What tests on a GPU share: a GPU that still works, proof that nothing waits for it, CUDA graphs.

Skipping without a GPU and memory that is NaN until written come from `tests/conftest.py`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree


@pytest.fixture(autouse=True)
def working_gpu() -> Iterator[None]:
    """Waits for what the test has launched, and ends the process where the GPU is lost to it.

    After an illegal access every call of CUDA fails in that process. pytest-xdist replaces such a
    worker by a new one, which goes on with the tests that are left.
    """
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        reason = f"this process has lost the GPU ({str(error).splitlines()[0]})"
        if "PYTEST_XDIST_WORKER" in os.environ:
            print(reason, flush=True)
            os._exit(1)
        pytest.exit(f"{reason}; install pytest-xdist and use -n 1 to go on", returncode=1)


@pytest.fixture
def full_precision() -> Iterator[None]:
    """Without TF32, which torch allows convolutions unasked."""
    libraries = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [library.allow_tf32 for library in libraries]
    for library in libraries:
        library.allow_tf32 = False
    yield
    for library, allowed in zip(libraries, before, strict=True):
        library.allow_tf32 = allowed


@pytest.fixture
def no_host_sync() -> Callable[[], AbstractContextManager[None]]:
    """`with no_host_sync():` raises RuntimeError where torch makes the host wait for the GPU.

    Torch sees its own waits only (`.item()`, copies to pageable memory, `nonzero`); kernels that
    synchronise by themselves are caught by capturing them, see `replayed`.
    """

    @contextlib.contextmanager
    def forbidden() -> Iterator[None]:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    return forbidden


@pytest.fixture
def replayed() -> Callable[[Callable[[], Any]], Any]:
    """`replayed(call)` captures `call` in a CUDA graph and returns what a replay computes.

    `call` takes no arguments and returns tensors in any nesting. It runs twice before the capture,
    on the capturing stream, so that compilation and handle creation are over. The tensors it
    returned while it was captured, in which nothing is computed, are filled with NaN (integers:
    with their largest value) before the replay; copies of them are returned after it.
    """

    def capture(call: Callable[[], Any]) -> Any:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = call()
        pytree.tree_map_only(torch.Tensor, _poison, results)
        graph.replay()
        torch.cuda.synchronize()
        return pytree.tree_map_only(torch.Tensor, torch.clone, results)

    return capture


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    dtype = tensor.dtype
    worst = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
    return tensor.fill_(worst)
