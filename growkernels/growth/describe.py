"""What can grow in a model, and why the rest cannot: the table a person wants first."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from growkernels.growth.feature_spaces import is_layer
from growkernels.growth.layer_insertion.traced_positions import traced_positions
from growkernels.growth.neuron_scaling.candidates import LAYER_TYPES, why_not_grown
from growkernels.growth.neuron_scaling.widenings import widenings
from growkernels.growth.traced_graph import TracedGraph, traced
from growkernels.nn import BasisConv2d
from growkernels.nn.basis_conv2d import check_replaceable
from growkernels.nn.exchange import obstacle, places_of
from growkernels.nn.linear_from_conv1d import is_transposed_linear
from growkernels.nn.wrappers import check_watchable

ACTIONS = ("insert", "grow", "widen", "basis")


@dataclass(frozen=True)
class Row:
    """One thing that could be done at one module.

    Attributes:
        path: of the module.
        module: the name of its class.
        action: ``"insert"`` something behind it (``LayerInsertion``), ``"grow"`` branches on its
            neurons or ``"widen"`` it (``NeuronScaling``), or make a ``"basis"`` convolution of it
            (``gk.nn.convert``, ``BasisSearch``).
        possible: whether it can be done.
        detail: the kind of what is inserted, the role in which it is widened, the layers that are
            widened with it; or why it is not possible.
    """

    path: str
    module: str
    action: str
    possible: bool
    detail: str


@dataclass(frozen=True)
class Description:
    """What can be done where; printed, it is a table.

    Attributes:
        model: the name of the model's class.
        rows: one for each module and action, in the order in which modules are registered.
        notes: sentences about the pass that showed it.
    """

    model: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def possible(self, action: str) -> dict[str, str]:
        """{path: detail} of the modules where an action is possible.

        Raises:
            ValueError: an unknown action.
        """
        if action not in ACTIONS:
            raise ValueError(f"Unknown action {action!r}; choose one of {', '.join(ACTIONS)}.")
        return {r.path: r.detail for r in self.rows if r.action == action and r.possible}

    def why_not(self, path: str) -> dict[str, str]:
        """{action: reason} for what is not possible at a module."""
        return {r.action: r.detail for r in self.rows if r.path == path and not r.possible}

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def describe(model: nn.Module, sample: Any) -> Description:
    """Which positions, layers and convolutions of a model can grow or be exchanged, and why not
    the others.

    ::

        print(gk.growth.describe(model, x))

    Args:
        model: any module; it stays as it is.
        sample: an input: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
            The model runs on it a few times, in eval mode.

    Raises:
        TypeError: a model that is wrapped, sharded or compiled, or has a part that is.
        ValueError: the model raises an error on the sample, or has lazy parameters.
    """
    check_watchable(model)
    graph = traced(model, sample)
    # A module that runs in several places has a row for each of its paths.
    modules = model.named_modules(remove_duplicate=False)
    names = {path: type(module).__name__ for path, module in modules}
    found: list[Row] = []

    def note(action: str, possible: Mapping[str, str], others: Mapping[str, str]) -> None:
        found.extend(Row(p, names[p], action, True, detail) for p, detail in possible.items())
        found.extend(Row(p, names[p], action, False, reason) for p, reason in others.items())

    positions, left_out = traced_positions(model, sample, graph=graph)
    note("insert", {p.name: p.kind for p in positions}, left_out)
    note("grow", *_growing(model, graph))
    note("widen", *_widening(model, graph))
    note("basis", *_basis(model, graph))
    order = list(names)
    found.sort(key=lambda row: (order.index(row.path), ACTIONS.index(row.action)))
    return Description(type(model).__name__, tuple(found), tuple(_notes(graph)))


def _growing(model: nn.Module, graph: TracedGraph) -> tuple[dict[str, str], dict[str, str]]:
    possible: dict[str, str] = {}
    others: dict[str, str] = {}
    holders: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders[id(parameter)].append(name)
    for path, module in model.named_modules():
        reason = why_not_grown(model, path, module, LAYER_TYPES)
        if reason is None:
            shared = [names for p in module.parameters() if len(names := holders[id(p)]) > 1]
            if shared:
                reason = f"it shares a parameter ({' is '.join(map(repr, shared[0]))})"
        if reason is None:
            possible[path] = "linear" if isinstance(module, nn.Linear) else "conv2d"
        elif reason:
            others[path] = reason
        elif path in graph.layers:
            kind = type(module).__name__
            way = "; see gk.nn.linear_from_conv1d" if is_transposed_linear(module) else ""
            others[path] = f"neurons grow in nn.Linear and nn.Conv2d, not in {kind}{way}"
    return possible, others


def _widening(model: nn.Module, graph: TracedGraph) -> tuple[dict[str, str], dict[str, str]]:
    fitting, unfit = widenings(model, graph)
    possible = {
        path: f"{way.role}, with {' and '.join(way.others)}" for path, way in fitting.items()
    }
    names = {path: type(m).__name__ for path, m in model.named_modules() if is_layer(m)}
    for path in names:
        if path not in possible and path not in unfit:
            reason = graph.why_fixed(path)
            unfit[path] = reason or f"nn.Linear and nn.Conv2d are widened alone, not {names[path]}"
    return possible, unfit


def _basis(model: nn.Module, graph: TracedGraph) -> tuple[dict[str, str], dict[str, str]]:
    possible: dict[str, str] = {}
    others: dict[str, str] = {}
    places = places_of(model)
    for path, module in model.named_modules():
        if not isinstance(module, nn.modules.conv._ConvNd | BasisConv2d):
            continue
        try:
            if not isinstance(module, BasisConv2d):
                check_replaceable(module)
        except (TypeError, ValueError) as error:
            others[path] = _clause(str(error))
            continue
        reason = "it is the model itself" if module is model else obstacle(module, places)
        if reason is None and (user := graph.weight_read_in(path)) is not None:
            reason = f"its weight is also used in {user}"
        if reason is not None:
            others[path] = reason
        else:
            assert isinstance(module, nn.Conv2d | BasisConv2d)
            taps = module.in_channels * math.prod(module.kernel_size)
            below = min(taps, module.out_channels)
            possible[path] = f"fewer than {below} of {module.out_channels} filters"
    return possible, others


def _clause(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:].rstrip(".")


def _notes(graph: TracedGraph) -> Iterator[str]:
    for path, what in graph.trace.data_read_in.items():
        where = f"The forward of {path!r}" if path else "The model's forward"
        yield (
            f"{where} reads numbers from tensors ({what}), so on another input it may go another "
            "way than the one described here."
        )
    if graph.trace.escaped:
        yield (
            "Some of the pass ran in code that cannot be followed, such as scripted functions; "
            "what goes in there is left out."
        )


def _lines(description: Description) -> Iterator[str]:
    """The rows as a table, one line for modules that differ in one number of their paths only."""
    by_path: dict[str, dict[str, Row]] = {}
    for row in description.rows:
        by_path.setdefault(row.path, {})[row.action] = row
    counts = {a: len(description.possible(a)) for a in ACTIONS}
    yield (
        f"{description.model}: {counts['insert']} positions to insert at, {counts['grow']} layers "
        f"whose neurons can grow, {counts['widen']} that can be widened, {counts['basis']} that "
        "can become basis convolutions"
    )
    cells = {path: tuple(_cell(rows.get(a)) for a in ACTIONS) for path, rows in by_path.items()}
    table: list[tuple[str, ...]] = [("module", "class", *ACTIONS)]
    for paths in _alike(by_path, lambda path: (_module(by_path[path]), *cells[path])):
        if any(cells[paths[0]]):
            entries = (entry or "-" for entry in cells[paths[0]])
            table.append((_together(paths), _module(by_path[paths[0]]), *entries))
    if len(table) > 1:
        yield ""
        yield from _aligned(table)
    reasons: list[tuple[str, ...]] = [("module", "class", "not possible", "because")]
    for rows in _alike_rows(description.rows):
        first = rows[0][0]
        actions = ", ".join(row.action for row in rows[0])
        details = [entry[0].detail for entry in rows]
        paths = [entry[0].path for entry in rows]
        reasons.append((_together(paths), first.module, actions, _without_numbers(details)))
    if len(reasons) > 1:
        yield ""
        yield from _aligned(reasons)
    if description.notes:
        yield ""
        yield from description.notes


def _cell(row: Row | None) -> str:
    if row is None or not row.possible:
        return ""
    return row.detail.partition(",")[0] if row.action in ("insert", "widen") else "yes"


def _module(rows: Mapping[str, Row]) -> str:
    return next(iter(rows.values())).module


def _alike(paths: Iterable[str], key: Any) -> list[list[str]]:
    groups: dict[Any, list[str]] = {}
    for path in paths:
        groups.setdefault((_pattern(path), key(path)), []).append(path)
    return list(groups.values())


def _alike_rows(rows: Iterable[Row]) -> list[list[list[Row]]]:
    """What is not possible: for modules that are alike, the rows of each that give one reason."""
    reasons: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if not row.possible:
            reasons.setdefault((row.path, row.detail), []).append(row)
    groups: dict[Any, list[list[Row]]] = {}
    for (path, detail), same in reasons.items():
        actions = tuple(row.action for row in same)
        key = _pattern(path), same[0].module, _pattern(detail), actions
        groups.setdefault(key, []).append(same)
    return list(groups.values())


def _pattern(text: str) -> str:
    return re.sub(r"\d+", "#", text)


def _without_numbers(details: Sequence[str]) -> str:
    """The first of them with a star for each number that is not the same in all."""
    numbers = [re.findall(r"\d+", other) for other in details]
    same = [len(set(column)) == 1 for column in zip(*numbers, strict=True)]
    place = iter(same)
    return re.sub(r"\d+", lambda match: match.group() if next(place) else "*", details[0])


def _together(paths: Sequence[str]) -> str:
    """One name for paths that differ in numbers: ``blocks.0-11.mlp.fc1 (12)``."""
    if len(paths) == 1:
        return paths[0] or "(the model)"
    numbers = [re.findall(r"\d+", path) for path in paths]
    columns = [list(dict.fromkeys(map(int, column))) for column in zip(*numbers, strict=True)]
    place = iter(columns)

    def shown(match: re.Match[str]) -> str:
        values = next(place)
        if len(values) == 1:
            return match.group()
        whole = values == list(range(values[0], values[-1] + 1))
        return f"{values[0]}-{values[-1]}" if whole else "*"

    return f"{re.sub(r'[0-9]+', shown, paths[0])} ({len(paths)})"


def _aligned(table: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        line = "  ".join(entry.ljust(width) for entry, width in zip(row, widths, strict=True))
        yield line.rstrip()
