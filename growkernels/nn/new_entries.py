"""The entries that a widened parameter got: which they are, and what an optimizer keeps of them.

Adam and its kin divide by the root of a running mean of squared gradients, and correct its start at
0 by the step count of the whole parameter. New entries join at a high count: with a mean of 0 their
first steps would be too large by sqrt((1 - b2^t) / (1 - b2^s)) at their own step s, in update
numbers for betas of 0.9 and 0.999 and a constant gradient 3.2 times the learning rate at the first,
6.5 at the tenth, 1.3 at the thousandth. So they start with the mean over the old entries beside
them (of the same row for a new column, of the same column for a new row): then the same steps are
0.1, 0.65 and 1.0 times the learning rate where the gradients are alike, and smaller or larger as
the new ones are. Momenta start at 0, as those of a new parameter.

Measured on a perceptron 16-16-4 that learns a teacher (AdamW, rate 3e-3, 800 steps, then 16 hidden
neurons more, means over 4 seeds): in the first 100 steps after the growth no new entry moves by
more than 0.07 times the rate in a step, and by up to 4.1 times with means of 0. The worst loss over
five steps was 1.08 of that before the growth in both cases.

The small steps have a price: new columns start with gradients far below those beside them, and an
old mean takes some 1000 updates to be forgotten. In that example the loss 300 steps later was 0.98
of that before, and 0.92 with means of 0. Larger examples, test losses at a rate of 3e-3, the best
of those tried between 1e-3 and 3e-2, copies of random parents, 3 or 4 seeds, mean of the layer | 0:

    network, steps before + after the growth        before   100 steps later   at the end
    perceptron 24-16-16-6, Adam, 1000 + 1000        0.655    0.655 | 0.657     0.650 | 0.625
    the same, AdamW, 800 + 1000                     0.665    0.663 | 0.664     0.650 | 0.622
    conv-bn-relu-conv, Adam, 300 + 700              1.266    1.228 | 1.227     1.018 | 1.010

(labels of a wider random teacher; every seed ended lower with 0; at a rate of 3e-2, too high for
either, the first perceptron's loss 100 steps later was 0.716 | 0.731.) So the mean is the careful
choice, which keeps the first steps within the learning rate, and not the fast one. A tenth of the
mean was no faster than all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

# What the optimizers of torch, and others that keep to their names, divide by or step by.
SCALES = (
    *("exp_avg_sq", "max_exp_avg_sq"),  # Adam, AdamW, NAdam, RAdam; amsgrad
    *("exp_inf",),  # Adamax
    *("square_avg", "acc_delta"),  # RMSprop, Adadelta
    *("sum",),  # Adagrad
    *("step_size",),  # Rprop
)


@dataclass(frozen=True)
class _Story:
    """How a parameter came about: ``births`` is {dimension: when each index along it came}, 0 for
    those that came with ``origin``, the parameter that was widened first.
    """

    origin: object
    births: Mapping[int, Tensor]


_stories: WeakIdKeyDictionary = WeakIdKeyDictionary()
_clock = [0]


@torch.no_grad()
def start_scales(state: Mapping[str, Any], dim: int, old: Tensor, new: Tensor) -> None:
    """Fill what an optimizer's state divides new entries by with the mean over the old ones.

    Args:
        state: of one widened parameter, with tensors of its shape; they are written into.
        dim: along which it was widened.
        old, new: the indices along it of the old entries and of the new ones.
    """
    for key in SCALES:
        value = state.get(key)
        if isinstance(value, Tensor) and value.dim() and len(old):
            mean = value.index_select(dim, old.to(value.device)).mean(dim, keepdim=True)
            shape = list(value.shape)
            shape[dim] = len(new)
            value.index_copy_(dim, new.to(value.device), mean.expand(shape))


def note_widened(before: nn.Parameter, after: nn.Parameter, dim: int, old: Tensor) -> None:
    """Remember that `after` is `before`, whose entries are at ``old`` along ``dim``, and more."""
    _clock[0] += 1
    story = _story(before)
    births = torch.full((after.shape[dim],), _clock[0], device="cpu")
    known = torch.zeros(before.shape[dim], dtype=torch.int64, device="cpu")
    births[old.cpu()] = story.births.get(dim, known)
    _stories[after] = _Story(story.origin, {**story.births, dim: births})


class NewSince:
    """Tells which of a model's entries were not there when this was made.

    Parameters are followed through being widened; those that took the place of others in another
    way (a converted convolution's factors, say) are new ones.
    """

    def __init__(self, model: nn.Module) -> None:
        self._time = _clock[0]
        self._origins = {_story(parameter).origin for parameter in model.parameters()}

    def mask(self, parameter: nn.Parameter) -> Tensor | None:
        """Of the new entries, in the parameter's shape; None: there are none."""
        story = _story(parameter)
        if story.origin not in self._origins:
            return torch.ones_like(parameter, dtype=torch.bool)
        new = None
        for dim, births in story.births.items():
            shape = [1] * parameter.dim()
            shape[dim] = -1
            of_dim = (births > self._time).view(shape)
            new = of_dim if new is None else new | of_dim
        if new is None or not bool(new.any()):
            return None
        return new.expand(parameter.shape).to(parameter.device)


def _story(parameter: nn.Parameter) -> _Story:
    found: _Story | None = _stories.get(parameter)
    if found is None:
        found = _stories[parameter] = _Story(object(), {})
    return found
