"""The command line: `kvxfer`, or `python -m kvxfer`."""

import os
import signal
import sys

from kvxfer._kvxfer import cli
from kvxfer.ucx import ucx_wheel


def main() -> int:
    """Runs the command line of this process."""
    # Python's own handler would only run once the native half has returned.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Where a wheel has its files, only Python knows.
    if wheel := ucx_wheel():
        os.environ.setdefault("KVXFER_UCX_WHEEL", wheel)
    return cli(sys.argv[1:])
