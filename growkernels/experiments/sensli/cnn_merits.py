"""One merit pass over the training images: what every norm would choose, and what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from growkernels.experiments.sensli.authors_merits import ExtendedNetwork
from growkernels.experiments.sensli.cnn_settings import NORM, TAU, Rule
from growkernels.growth import LayerInsertion
from growkernels.growth.merit_norms import NORMS

KINDS = ("conv2d_relu",)
Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class MeritPass:
    """Merits of all positions (in order from the input), and the decision taken on them.

    Plain numbers, so that it can be stored as it is. ``merits[norm]`` [positions] and
    ``base[norm]`` are squared norms; ``ratio[norm]`` is the largest merit over the mean one of the
    existing convolutions. ``inserted`` is the index of the position, or None for declined.
    ``seconds`` and ``flops`` are those of the whole pass, ``authors_seconds`` those of the same
    pass as the authors' code organises it and ``authors_gap`` the largest relative difference
    between its merits and ours (both only where it was run too).
    """

    epoch: int
    rule: str
    positions: list[str]
    merits: dict[str, list[float]]
    base: dict[str, float]
    ratio: dict[str, float]
    snr: list[float]
    inserted: int | None
    reason: str
    seconds: float
    flops: float
    authors_seconds: float | None = None
    authors_gap: float | None = None

    def choice(self, norm: str) -> int:
        """The position that has the largest merit in this norm."""
        values = self.merits[norm]
        return max(range(len(values)), key=values.__getitem__)

    def spread(self, norm: str) -> float:
        """Largest merit over the smallest: how clearly the norm separates positions."""
        values = self.merits[norm]
        return max(values) / min(values) if min(values) > 0 else float("inf")


def position_label(path: str) -> str:
    """The position behind a convolution in words, from its module path in a ``vgg``."""
    stage, _, layer = path.partition(".")
    return f"stage {int(stage) + 1}, layer {int(layer) + 1}"


def attempt_insertion(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    rule: Rule,
    epoch: int,
    compare_authors: bool = False,
) -> MeritPass:
    """Record one pass over ``batches`` (of equal size), decide by ``rule``, and insert.

    Nothing is inserted where the rule declines or a merit is NaN (training diverged); the reason
    is in the result. With ``compare_authors`` their merit pass runs on the same network and data.
    """
    device = next(model.parameters()).device
    inserter = LayerInsertion(model, kinds=KINDS)
    try:
        start = now(device)
        for images, labels in batches():
            model.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(images), labels)
            with inserter.recording():
                loss.backward()
        model.zero_grad(set_to_none=True)
        inserter.norm = NORM
        decisive = inserter.merits()
        seconds = now(device) - start
        by_norm = {NORM: decisive}
        for norm in NORMS:
            inserter.norm = norm
            by_norm[norm] = inserter.merits()
        paths = list(decisive.names)
        theirs = _authors_pass(model, paths, batches) if compare_authors else None
        flops = _flops(model, paths, batches)
        try:
            if rule == "min":
                decisive.best()  # refuses NaN
                position: str | None = paths[int(decisive.values.argmin())]
                reason = f"{position!r} has the smallest merit."
            else:
                position = inserter.select(decisive, rule, TAU)
                reason = inserter.reason
            if position is not None:
                new = inserter.insert(position, optimizer)
                new.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        except ValueError as error:
            position, reason = None, str(error)
    finally:
        inserter.close()
    frobenius = by_norm["frobenius"].values
    return MeritPass(
        epoch=epoch,
        rule=rule,
        positions=[position_label(path) for path in paths],
        merits={norm: merits.values.tolist() for norm, merits in by_norm.items()},
        base={norm: merits.base for norm, merits in by_norm.items()},
        ratio={n: float(m.values.max()) / m.base for n, m in by_norm.items()},
        snr=[] if decisive.snr is None else decisive.snr.tolist(),
        inserted=None if position is None else paths.index(position),
        reason=reason,
        seconds=seconds,
        flops=flops,
        authors_seconds=None if theirs is None else theirs[0],
        authors_gap=(
            None
            if theirs is None
            else float(((theirs[1] - frobenius).abs() / frobenius.abs()).max())
        ),
    )


def training_flops(model: nn.Module, images: Tensor) -> float:
    """Forward and backward of one image, counted on ``images`` [N, 3, H, W]."""
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    model.zero_grad(set_to_none=True)
    return float(counter.get_total_flops()) / len(images)


def now(device: torch.device) -> float:
    """Seconds of a steady clock, after what was queued on a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _flops(model: nn.Module, paths: Sequence[str], batches: Batches) -> float:
    """Of one recorded pass over all batches, counted on a few images of the first."""
    few, images = None, 0
    for batch, _ in batches():
        few = batch[:2] if few is None else few
        images += len(batch)
    assert few is not None
    inserter = LayerInsertion(model, paths)
    with FlopCounterMode(display=False) as counter, inserter.recording():
        model(few).sum().backward()
    inserter.close()
    model.zero_grad(set_to_none=True)
    return float(counter.get_total_flops()) / len(few) * images


def _authors_pass(model: nn.Module, paths: Sequence[str], batches: Batches) -> tuple[float, Tensor]:
    """Seconds of the authors' way and its merits (Frobenius), [positions] float64."""
    device = next(model.parameters()).device
    start = now(device)
    widths = {}
    for path in paths:
        layer = model.get_submodule(path)
        assert isinstance(layer, nn.Conv2d)
        widths[path] = layer.out_channels
    extended = ExtendedNetwork(model, widths, "conv2d_relu")
    values = extended.merits(batches(), F.cross_entropy)
    return now(device) - start, torch.tensor(values, dtype=torch.float64)
