"""The noise-free two-spiral classification task of the SensLI paper (arXiv 2311.15995)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Points and labels, divided into a training and a test part.

    Shapes: ``train_points`` [n_train, 2], ``train_labels`` [n_train], the same for test. Points are
    floating point, labels int64 (0 for the spiral with sign -1, 1 for the one with sign +1).
    """

    train_points: Tensor
    train_labels: Tensor
    test_points: Tensor
    test_labels: Tensor


def spirals(
    per_class: int = 300,
    inner_radius: float = 0.5,
    circles: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Two interleaved spirals without noise.

    Class sign s in {-1, +1} and i = 0 ... per_class-1: angle 2*pi*circles*i/per_class, radius
    inner_radius + circles*i/per_class, point s * radius * (cos angle, sin angle). A smaller
    ``inner_radius`` brings the two arms closer together and makes the task harder.

    Returns points [2*per_class, 2] of ``dtype`` and labels [2*per_class] int64, class 0 first.
    Raises ValueError when ``per_class`` < 1.
    """
    if per_class < 1:
        raise ValueError(f"per_class is {per_class}; a spiral needs at least one point, give >= 1.")
    turn = circles * torch.arange(per_class, dtype=torch.float64, device="cpu") / per_class
    angle = 2.0 * math.pi * turn
    radius = inner_radius + turn
    arm = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=1)
    labels = torch.arange(2, device="cpu").repeat_interleave(per_class)
    return torch.cat((-arm, arm)).to(dtype), labels


def split(
    points: Tensor, labels: Tensor, generator: torch.Generator, train_fraction: float = 0.75
) -> Split:
    """Shuffle with ``generator`` (a CPU generator) and cut into training and test points.

    The paper's code cuts 600 points into 450 and 150, not balanced by class; its order depends on
    a directory listing, here only on the generator.
    Raises ValueError when one of the two parts would be empty.
    """
    count = len(labels)
    train_count = round(train_fraction * count)
    if not 0 < train_count < count:
        raise ValueError(
            f"train_fraction {train_fraction} of {count} points leaves an empty part; "
            "choose a fraction that keeps at least one point on each side."
        )
    order = torch.randperm(count, generator=generator, device="cpu")
    train, test = order[:train_count], order[train_count:]
    return Split(points[train], labels[train], points[test], labels[test])
