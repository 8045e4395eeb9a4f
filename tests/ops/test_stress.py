"""Ops from many threads at once, after a fork, and in workers of a DataLoader: the same bits."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import growkernels as gk


def calls() -> dict[str, Callable[[], Tensor]]:
    """One call of every family, large enough that several threads would share it."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, basis, coeff = randn(4, 16, 24, 24), randn(8, 16, 3, 3), randn(8, 8)
    rows, weights, vectors = randn(600, 48), randn(600, 64), randn(64, 48)
    matrices = randn(40, 12, 12)
    return {
        "basis_conv2d": lambda: gk.basis_conv2d(x, basis, coeff, padding=1),
        "splitting_hvp": lambda: gk.splitting_hvp(rows, weights, vectors),
        "virtual_grads": lambda: gk.virtual_grads([rows], [rows.flip(0)], "linear_relu")[0],
        "virtual_grad_norms": lambda: gk.virtual_grad_norms([x], [x.flip(0)], "conv2d_relu"),
        "symmetric_eigs": lambda: torch.ops.growkernels.symmetric_eigs(matrices)[1],
    }


NAMES = tuple(calls())


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", NAMES)
def test_eight_python_threads_get_the_same_bits(name: str) -> None:
    call = calls()[name]
    expected = call()
    differ: list[str] = []
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        for _ in range(5):
            try:
                if not torch.equal(call(), expected):
                    differ.append("other bits")
            except Exception as error:  # a thread's exception would be printed and lost
                differ.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert differ == []


def test_one_two_and_eight_threads_of_torch_repeat_themselves() -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            for name, call in calls().items():
                first = call()
                assert all(torch.equal(call(), first) for _ in range(3)), (name, threads)
    finally:
        torch.set_num_threads(before)


def test_a_forked_process_computes_the_same() -> None:
    """Of one thread: OpenMP's pool does not survive a fork, torch's own products included."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        table = calls()
        expected = {name: call() for name, call in table.items()}
        child = os.fork()
        if child == 0:
            same = all(torch.equal(call(), expected[name]) for name, call in table.items())
            os._exit(0 if same else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(before)


class Results(Dataset[Any]):
    """The ops' results, computed by whoever asks."""

    def __len__(self) -> int:
        return len(NAMES)

    def __getitem__(self, index: int) -> Tensor:
        return calls()[NAMES[index]]()


@pytest.mark.filterwarnings("ignore:This process")
def test_workers_of_a_data_loader_compute_the_same() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the workers do
    try:
        expected = [call() for call in calls().values()]
    finally:
        torch.set_num_threads(before)
    loader = DataLoader(Results(), batch_size=None, num_workers=2)
    for result, alone in zip(loader, expected, strict=True):
        assert torch.equal(result, alone)
