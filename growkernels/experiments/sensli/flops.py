"""Floating point operations of training and of the merit pass, from shapes alone.

Matrix products only, two operations per multiply-add, as torch.utils.flop_counter counts.
"""

from __future__ import annotations

from dataclasses import replace

from growkernels.experiments.models.batched import Family
from growkernels.experiments.sensli.settings import Setting, Variant

FEATURES, CLASSES = 2, 2


def products(family: Family, width: int, hidden: int) -> list[tuple[int, int]]:
    """(inputs, outputs) of every matrix in a network of ``hidden`` hidden layers."""
    inner = 1 if family == "feedforward" else 2
    middle = [(width, width)] * (inner * (hidden - 1))
    return [(FEATURES, width), *middle, (width, CLASSES)]


def pass_flops(family: Family, width: int, hidden: int, samples: int) -> int:
    """Forward and backward with all weight gradients; the data get no gradient."""
    sizes = [i * o for i, o in products(family, width, hidden)]
    return 2 * samples * (3 * sum(sizes) - sizes[0])


def training_flops(setting: Setting, variant: Variant) -> int:
    """The full training of one run, without early stops, evaluations and merit passes."""
    total, begin, hidden = 0, 0, variant.start_hidden
    for end in [*(insertion.epoch for insertion in variant.insertions), setting.epochs]:
        epoch = pass_flops(setting.family, setting.width, hidden, setting.train_samples)
        total += (end - begin) * epoch
        begin, hidden = end, hidden + 1
    return total


def whole_flops(setting: Setting, variant: Variant) -> int:
    """Of a training and of the merit passes before its insertions."""
    passes = sum(
        our_merit_flops(replace(setting, hidden=variant.start_hidden + done))
        for done in range(len(variant.insertions))
    )
    return training_flops(setting, variant) + passes


def authors_merit_flops(setting: Setting) -> int:
    """Forward and backward of the fully extended network over the training samples."""
    return pass_flops(setting.family, setting.width, 2 * setting.hidden, setting.train_samples)


def virtual_flops(setting: Setting) -> int:
    """The virtual layers' gradients from recorded h and dL/dh, one product per position."""
    return 2 * setting.train_samples * setting.hidden * setting.width**2


def our_merit_flops(setting: Setting) -> int:
    """An ordinary pass of the unextended network over the data, and the virtual gradients."""
    ordinary = pass_flops(setting.family, setting.width, setting.hidden, setting.train_samples)
    return ordinary + virtual_flops(setting)
