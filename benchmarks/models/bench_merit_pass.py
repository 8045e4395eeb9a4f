"""What merits add to a training step: `LayerInsertion`, hooks included, and the authors' way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.case import OURS, Case, Workload
from benchmarks.models.deit import DEPTH, TOKENS, WIDTH, DeiT, training_step_flops
from benchmarks.opponents import authors_merits
from benchmarks.table import Table
from growkernels.experiments.models.batched import RESIDUAL_SCALE
from growkernels.growth import LayerInsertion

FAMILY = "merit_pass"
KERNELS = ("virtual_grad", "wide_products", "convolution")
TABLE = Table(
    name=FAMILY,
    family=FAMILY,
    columns=(
        "case", "shape", "dtype", "growkernels", "growkernels adds", "peak memory", "opponent",
        "speed-up", "opponent's time", "opponent's memory", "machine",
    ),
)  # fmt: skip

_STEP = "step without merits"
_AUTHORS = "authors' way"
_IMAGES = 32


def _build(opponent: str, device: torch.device) -> Workload:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DeiT().to(device)
        images = torch.randn(_IMAGES, 3, 224, 224).to(device)
        labels = torch.randint(1000, (_IMAGES,)).to(device)

    def trainable() -> tuple[nn.Module, torch.optim.Optimizer]:
        copied = copy.deepcopy(model)
        # So small a rate that the weights stay where the variants' merits agree.
        return copied, torch.optim.AdamW(copied.parameters(), lr=1e-7)

    def backward(network: nn.Module) -> None:
        torch.autograd.backward(functional.cross_entropy(network(images), labels))

    plain, plain_optimizer = trainable()
    authors, authors_optimizer = trainable()
    ours, our_optimizer = trainable()
    positions = {f"blocks.{i}": WIDTH for i in range(DEPTH)}
    kinds = dict.fromkeys(positions, "residual")
    inserter = LayerInsertion(ours, kinds, activation="tanh", scale=RESIDUAL_SCALE)

    def step() -> None:
        plain_optimizer.zero_grad()
        backward(plain)
        plain_optimizer.step()

    def step_with_authors_merits() -> Tensor:
        merits = authors_merits(authors, positions, "residual", images, labels)
        authors_optimizer.zero_grad()
        backward(authors)
        authors_optimizer.step()
        return merits

    def step_with_merits() -> Tensor:
        our_optimizer.zero_grad()
        with inserter.recording():
            backward(ours)
        our_optimizer.step()
        merits = inserter.merits().values
        inserter.reset()
        return merits

    calls = {_STEP: step, _AUTHORS: step_with_authors_merits, OURS: step_with_merits}
    chosen = {name: calls[name] for name in (opponent, OURS)}
    merit_flops = DEPTH * 2.0 * _IMAGES * TOKENS * WIDTH**2
    merit_bytes = DEPTH * 2.0 * _IMAGES * TOKENS * WIDTH * 4
    return Workload(chosen, training_step_flops(_IMAGES) + merit_flops, merit_bytes, 1e-3)


# Two cases, not one: whatever runs after the authors' way finds the process's memory returned to
# the system, and spends more on fetching it anew than merits cost.
CASES = [
    Case(
        name=name,
        shape=f"{_IMAGES} images, {DEPTH} positions × [{_IMAGES * TOKENS}, {WIDTH}]",
        dtype=torch.float32,
        layout="contiguous",
        direction="training step and merits",
        opponents=(opponent,),
        build=partial(_build, opponent),
        baseline=_STEP if opponent == _STEP else None,
    )
    for name, opponent in (("DeiT-S, merits' cost", _STEP), ("DeiT-S, authors' way", _AUTHORS))
]


def bench_merit_pass(case: Case, compare: Callable[[Case], None]) -> None:
    compare(case)
