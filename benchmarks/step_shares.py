"""`python -m benchmarks.step_shares`: where the time of ResNet-18's training steps goes.

The steps are those of the benchmark `resnet18_step`, profiled by torch; every op's own time counts,
without that of the ops it calls.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import environment, markdown
from benchmarks.case import Call
from benchmarks.models import bench_resnet18_step

WARM_UP, STEPS = 3, 5
# The first whose parts one of is in the name of an op names its kind.
KINDS = {
    "ours, backward": ("growkernels::basis_conv2d_backward",),
    "ours, forward": ("growkernels::",),
    "torch's convolutions, backward": ("convolution_backward",),
    "torch's convolutions, forward": ("convolution",),
    "batch norm": ("batch_norm",),
    "ReLU": ("relu", "clamp_min", "threshold"),
    "cat and its gradient": ("aten::cat", "slice_backward", "narrow"),
    "casts and copies": ("copy_", "_to_copy", "clone"),
    "additions": ("aten::add", "aten::add_"),
    "optimizer": ("_foreach", "Optimizer"),
}


def shares(step: Call) -> tuple[float, dict[str, float]]:
    """Milliseconds of a step, and the part of each kind in it, in percent."""
    for _ in range(WARM_UP):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(STEPS):
            step()
    found: Counter[str] = Counter()
    for event in profiled.key_averages():
        kind = next((k for k, parts in KINDS.items() if any(p in event.key for p in parts)), "rest")
        found[kind] += event.self_cpu_time_total
    whole = sum(found.values())
    return whole / STEPS / 1e3, {kind: 100 * found[kind] / whole for kind in (*KINDS, "rest")}


def main() -> None:
    rows: dict[str, list[str]] = {kind: [kind] for kind in ("milliseconds", *KINDS, "rest")}
    heading = ["share of a step, %"]
    for case in bench_resnet18_step.CASES:
        if "compile" in case.name:
            continue
        for name, step in case.prepare(torch.device("cpu")).calls.items():
            milliseconds, of_kinds = shares(step)
            dtype = str(case.dtype).removeprefix("torch.")
            heading.append(f"{name}, {dtype}")
            rows["milliseconds"].append(f"{milliseconds:.0f}")
            for kind, share in of_kinds.items():
                rows[kind].append(f"{share:.1f}")
    print(environment.describe(torch.device("cpu"))["machine"], "torch", torch.__version__)
    print(markdown.table(heading, list(rows.values())))


if __name__ == "__main__":
    main()
