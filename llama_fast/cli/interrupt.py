"""What Ctrl-C does, before and after there is something to clean up."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

INTERRUPTED = 130


def leave_at_once(*_: Any) -> None:
    """Ctrl-C before there is anything to clean up: libraries that are being imported would make
    other errors of a KeyboardInterrupt, or swallow it."""
    os.write(2, b"llama-fast: interrupted\n")
    os._exit(INTERRUPTED)


def unwind_when_stopped() -> None:
    """From here on Ctrl-C and a termination unwind as errors do, so that nothing half-written is
    left behind. Changes nothing where `main` was called by another program."""
    if signal.getsignal(signal.SIGINT) is leave_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
