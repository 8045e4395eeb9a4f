"""Runs cases under pytest-benchmark: interleaved with their opponents, then stored by family."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.case import Case, check_agreement
from benchmarks.ceilings import ceiling_probe
from benchmarks.environment import describe, disturbance
from benchmarks.interleave import RoundRobin, cuda_timer, wall_timer
from benchmarks.peak_memory import measure_in_subprocess
from benchmarks.results import CaseResult, FamilyResult, VariantResult

# (seconds of interleaved rounds per case, fewest rounds, most rounds)
_FULL = (15.0, 7, 41)
_QUICK = (3.0, 3, 7)

_printed: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("growkernels")
    group.addoption("--quick", action="store_true", help="few rounds, nothing is stored")
    group.addoption("--device", default="cpu", help="device to measure on: cpu (default) or cuda")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for text in _printed:
        terminalreporter.write_line(text)


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    chosen = torch.device(pytestconfig.getoption("--device"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device=cuda needs a GPU that this torch can use; none is there")
    return chosen


@pytest.fixture(scope="module")
def measured(
    request: pytest.FixtureRequest, device: torch.device
) -> Iterator[dict[str, CaseResult]]:
    """The family's results so far; printed at the end, and stored when every case ran in full."""
    family: str = request.module.FAMILY
    names = [case.name for case in request.module.CASES]
    environment = describe(device)
    results: dict[str, CaseResult] = {}
    yield results
    if not results:
        return
    done = FamilyResult(family, environment, [results[name] for name in names if name in results])
    _printed.append(f"\n{family} on {environment['machine']}\n{request.module.TABLE.plain([done])}")
    if warning := disturbance(environment):
        _printed.append(warning)
    if request.config.getoption("--quick"):
        _printed.append("Not stored: a quick run has too few rounds.")
    elif len(results) < len(names):
        _printed.append(f"Not stored: only {len(results)} of {len(names)} cases ran to the end.")
    else:
        _printed.append(f"Stored in {done.store()}")


@pytest.fixture
def compare(
    request: pytest.FixtureRequest,
    benchmark: BenchmarkFixture,
    device: torch.device,
    measured: dict[str, CaseResult],
) -> Callable[[Case], None]:
    """Runs one case: agreement of the results, interleaved rounds, peak memory."""

    def run(case: Case) -> None:
        workload = case.prepare(device)
        check_agreement(case, workload)
        probe = case.ceiling and ceiling_probe(case.ceiling, case.dtype, device)
        timer = cuda_timer() if device.type == "cuda" else wall_timer()
        rounds = RoundRobin(workload.calls, case.variants, timer, probe or None)
        quick = request.config.getoption("--quick")
        seconds, fewest, most = _QUICK if quick else _FULL
        if case.seconds is not None and not quick:
            seconds = case.seconds
        wanted = int(seconds / rounds.calibrate())
        # pytest-benchmark times ours; its setup step, outside that time, times everyone else.
        benchmark.pedantic(  # type: ignore[no-untyped-call]
            rounds.ours,
            setup=rounds.opponents,
            rounds=min(max(wanted, fewest), most),
            iterations=1,
        )
        flops, traffic = workload.flops, workload.bytes
        del workload
        gc.collect()
        peaks = measure_in_subprocess(request.module.__name__, case, device)
        result = CaseResult(
            name=case.name,
            shape=case.shape,
            dtype=str(case.dtype).removeprefix("torch."),
            layout=case.layout,
            direction=case.direction,
            flops=flops,
            bytes=traffic,
            ceiling_kind=case.ceiling,
            ceiling=rounds.ceilings,
            baseline=case.baseline,
            variants={
                name: VariantResult(
                    rounds.seconds[name], rounds.calls_per_timing[name], peaks[name]
                )
                for name in case.variants
            },
        )
        benchmark.extra_info.update(
            calls_per_round=rounds.calls_per_timing, variants=result.summary()
        )
        measured[case.name] = result

    return run
