"""For programs of the tests: memory that is refused as the system refuses it (Linux)."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# For the environment: large blocks come from the system each time, one arena serves all threads.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


@contextmanager
def no_more_than(headroom: int) -> Iterator[None]:
    """Inside, no more than so many bytes can be mapped beside those that are."""
    with open("/proc/self/statm") as statm:
        mapped = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + headroom, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def refusals(
    call: Callable[[], object],
    check_untouched: Callable[[], None] = lambda: None,
    factor: float = 1.6,
) -> tuple[int, object]:
    """Call with more and more memory, until there is enough: how often there was not; the result.

    `check_untouched` is called after each refusal, with all memory.
    """
    headroom, count, told = float(2**19), 0, ""
    while headroom < 2**34:
        try:
            with no_more_than(int(headroom)):
                return count, call()
        except (RuntimeError, MemoryError) as error:  # oneDNN: could not create a primitive
            told = repr(error)
            count += 1
            check_untouched()
            headroom *= factor
    raise AssertionError(f"No memory was enough: {told}")
