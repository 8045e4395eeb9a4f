"""Growths and conversions leave no memory behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import gc, sys
sys.path[:0] = {folders!r}
import torch
from resident_memory import resident_kib
from test_interrupted_surgeries import SURGERIES, loss, prepared
torch.set_num_threads(1)

def grown(number):
    model, optimizer, surgery, driver = prepared(SURGERIES[number % len(SURGERIES)])
    surgery()
    if driver is not None:
        driver.close()
    loss(model).backward()
    optimizer.step()

for number in range(60):
    grown(number)
before, modules = resident_kib(), sum(isinstance(o, torch.nn.Module) for o in gc.get_objects())
for number in range(300):
    grown(number)
kept = resident_kib() - before
print(kept, sum(isinstance(o, torch.nn.Module) for o in gc.get_objects()) - modules)
"""


def test_three_hundred_growths_take_no_more_memory_than_sixty() -> None:
    """Every kind of surgery in turn, each on a model of its own."""
    growth = Path(__file__).parent
    program = PROGRAM.format(folders=[str(growth), str(growth.parent)])
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    kilobytes, modules = map(int, finished.stdout.split())
    assert modules == 0
    assert kilobytes < 1024
