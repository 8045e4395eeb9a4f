"""What every test runs under: fixed seeds, memory that is NaN until written, no time limits.

And their order: what takes long begins first.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import hypothesis
import pytest
import torch
import torch.utils.deterministic

# Nothing depends on how fast the machine is, or an emulated one.
hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=False,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("repeatable")

# Triton reads it when a kernel is defined: without a GPU, kernels run on CPU tensors instead.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# cuBLAS is deterministic only with a fixed workspace, and warns about any other.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


# Their tests start programs: few tests, of which each takes long.
PROGRAMS = {"benchmarks", "distributed", "experiments", "integrations", "packaging"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long begin first, so that no process of pytest-xdist ends with one alone."""
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.parent.name not in PROGRAMS, -tests[item.path]))


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    """Seeds torch and lets `torch.empty`, from Python and from C++, return NaN.

    An element that a kernel forgets to write then shows in whatever is computed from it. Ops that
    torch has no deterministic form of warn instead of raising: the fill is what is wanted here.
    """
    mode = torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.set_deterministic_debug_mode(mode)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests marked `gpu` where there is no GPU: all from here, so that they are one line."""
    if "gpu" in item.keywords and not torch.cuda.is_available():
        build = "a CPU build" if torch.version.cuda is None else "without a visible GPU"
        pytest.skip(f"needs a CUDA GPU; torch {torch.__version__} is {build}")
