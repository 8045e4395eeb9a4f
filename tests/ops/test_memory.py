"""Memory does not grow with the number of calls."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from op_samples import OPS

TESTS = Path(__file__).resolve().parents[1]
PROGRAM = f"""
import json, sys
sys.path.insert(0, {str(TESTS)!r})
import torch, growkernels as gk
from op_samples import OPS
from resident_memory import resident_kib
torch.set_num_threads(1)

def grown(call, calls):
    for _ in range(calls // 10):
        call()
    before = resident_kib()
    for _ in range(calls):
        call()
    return resident_kib() - before

found = {{}}
for name, op in OPS.items():
    sample = min(op.samples, key=lambda s: sum(torch.Size(shape).numel() for shape in s.shapes))
    tensors = sample.tensors(torch.float32)
    found[name] = [grown(lambda: op.results(op.function, tensors, sample), 10_000),
                   grown(lambda: op.with_gradients(op.function, tensors, sample), 1000)]
x, w = torch.randn(5, 4), torch.randn(5, 3)
found["splitting_eigs"] = [grown(lambda: gk.splitting_eigs(x, w), 1000)]
print(json.dumps(found))
"""


def test_ten_thousand_calls_take_no_more_memory_than_a_thousand() -> None:
    """In KiB: a tenth of one for each call is less than any tensor takes."""
    finished = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    assert found.keys() == {*OPS, "splitting_eigs"}
    assert {name: kept for name, kept in found.items() if max(kept) > 1024} == {}
