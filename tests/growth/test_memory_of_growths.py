"""Growths and conversions leave no memory behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import gc, sys
sys.path.insert(0, {folder!r})
import torch
from test_interrupted_surgeries import SURGERIES, loss, prepared
torch.set_num_threads(1)

def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * 4

def grown(number):
    model, optimizer, surgery, driver = prepared(SURGERIES[number % len(SURGERIES)])
    surgery()
    if driver is not None:
        driver.close()
    loss(model).backward()
    optimizer.step()

for number in range(60):
    grown(number)
before, modules = resident(), sum(isinstance(o, torch.nn.Module) for o in gc.get_objects())
for number in range(300):
    grown(number)
kept = resident() - before
print(kept, sum(isinstance(o, torch.nn.Module) for o in gc.get_objects()) - modules)
"""


def test_three_hundred_growths_take_no_more_memory_than_sixty() -> None:
    """Every kind of surgery in turn, each on a model of its own."""
    program = PROGRAM.format(folder=str(Path(__file__).parent))
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    kilobytes, modules = map(int, finished.stdout.split())
    assert modules == 0
    assert kilobytes < 2048
