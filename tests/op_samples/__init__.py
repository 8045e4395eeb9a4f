"""One table of sample calls of every op, for the tests on every device.

What holds for all ops is asserted once over the table, in tests/ops/test_contract_*.py on the CPU
and in tests/gpu/test_contract.py on a GPU. A new op is one more entry here.
"""

from __future__ import annotations

from op_samples import basis_conv, splitting, virtual_grad
from op_samples.table import DTYPES, Bad, Op, Sample

__all__ = ["DTYPES", "OPS", "Bad", "Op", "Sample"]

OPS: dict[str, Op] = {
    op.name: op for family in (basis_conv, splitting, virtual_grad) for op in family.OPS
}
