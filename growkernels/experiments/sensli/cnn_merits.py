"""One merit pass over the training images: what every norm would choose, and what it cost."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from growkernels.experiments.sensli.authors_merits import ExtendedNetwork
from growkernels.experiments.sensli.cnn_settings import NORM, TAU, Rule
from growkernels.growth import LayerInsertion, Merits
from growkernels.growth.layer_insertion import NORMS
from growkernels.timing import interleaved_seconds, now

KIND = "conv2d_relu"  # of the layers that are inserted
Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class MeritPass:
    """Merits of all positions (in order from the input), and the decision taken on them.

    Plain numbers, so that it can be stored as it is. ``merits[norm]`` [positions] and
    ``base[norm]`` are squared norms; ``ratio[norm]`` is the largest merit over the mean one of the
    existing convolutions. ``inserted`` is the index of the position, or None for declined.
    ``seconds`` and ``flops`` are those of the whole pass.
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
    generator: torch.Generator,
) -> MeritPass:
    """Record one pass over ``batches`` (of equal size), decide by ``rule``, and insert.

    ``generator`` draws the position of the rule "random".
    Nothing is inserted where the rule declines or a merit is NaN (training diverged); the reason
    is in the result.
    """
    device = next(model.parameters()).device
    inserter = LayerInsertion(model, kinds=(KIND,))
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
        flops = _flops(model, paths, batches)
        try:
            if rule == "min":
                decisive.best()  # refuses NaN
                position: str | None = paths[int(decisive.values.argmin())]
                reason = f"{position!r} has the smallest merit."
            elif rule == "random":
                decisive.best()
                drawn = torch.randint(len(paths), (), generator=generator, device="cpu")
                position = paths[int(drawn)]
                reason = f"{position!r} was drawn."
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
    return MeritPass(
        epoch=epoch,
        rule=rule,
        positions=[position_label(path) for path in paths],
        merits={norm: merits.values.tolist() for norm, merits in by_norm.items()},
        base={norm: merits.base for norm, merits in by_norm.items()},
        ratio={n: _ratio(m) for n, m in by_norm.items()},
        snr=[] if decisive.snr is None else decisive.snr.tolist(),
        inserted=None if position is None else paths.index(position),
        reason=reason,
        seconds=seconds,
        flops=flops,
    )


def _ratio(merits: Merits) -> float:
    """Largest merit over the base merit; NaN where training diverged or all gradients are zero."""
    return float(merits.values.max()) / merits.base if merits.base > 0 else float("nan")


def training_flops(model: nn.Module, images: Tensor) -> float:
    """Forward and backward of one image, counted on ``images`` [N, 3, H, W]."""
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    model.zero_grad(set_to_none=True)
    return float(counter.get_total_flops()) / len(images)


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


@dataclass(frozen=True)
class PassTimes:
    """Milliseconds per batch (medians of interleaved repetitions) and agreement of the merits.

    ``ordinary`` is a forward and backward of the network without merits, ``driver`` one recorded
    by LayerInsertion, ``authors`` their extended network with its gradients summed on the host.
    ``gap`` is the largest relative difference between the two ways' merits (Frobenius).
    """

    ordinary: float
    driver: float
    authors: float
    gap: float


def time_passes(model: nn.Module, batches: Batches, repeats: int = 7) -> PassTimes:
    """Time the merit pass of one network both ways on the same batches."""
    device = next(model.parameters()).device
    inserter = LayerInsertion(model, kinds=(KIND,))
    widths = {}
    for position in inserter.positions:
        layer = model.get_submodule(position.name)
        assert isinstance(layer, nn.Conv2d)
        widths[position.name] = layer.out_channels
    extended = ExtendedNetwork(model, widths, KIND)
    given = list(batches())

    def ordinary() -> None:
        for images, labels in given:
            model.zero_grad(set_to_none=True)
            F.cross_entropy(model(images), labels).backward()

    def driver() -> list[float]:
        inserter.reset()
        for images, labels in given:
            model.zero_grad(set_to_none=True)
            with inserter.recording():
                F.cross_entropy(model(images), labels).backward()
        values: list[float] = inserter.merits().values.tolist()
        return values

    def authors() -> list[float]:
        return extended.merits(given, F.cross_entropy)

    pairs = list(zip(driver(), authors(), strict=True))  # warms up, too
    ways: dict[str, Callable[[], object]] = {
        "ordinary": ordinary,
        "driver": driver,
        "authors": authors,
    }
    seconds = interleaved_seconds(ways, repeats, device, warm_up=0)
    inserter.close()
    model.zero_grad(set_to_none=True)
    medians = {
        name: 1e3 * statistics.median(values) / len(given) for name, values in seconds.items()
    }
    gap = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
    return PassTimes(gap=gap, **medians)
