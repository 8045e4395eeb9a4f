"""A process that may write only where the modes of files and folders let it, also as root."""

from __future__ import annotations

import ctypes
import os

NOT_GIVEN_UP = 77  # the exit status where root cannot do so
_DROP_CAPABILITY, _MAY_WRITE_ANYWHERE = 24, 1  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE: capabilities(7)


def without_the_right_to_write_anywhere() -> None:
    """Of a child before it becomes another program. Root writes by this capability alone."""
    if os.geteuid() == 0 and ctypes.CDLL(None).prctl(
        _DROP_CAPABILITY, _MAY_WRITE_ANYWHERE, 0, 0, 0
    ):
        os._exit(NOT_GIVEN_UP)
