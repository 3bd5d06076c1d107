"""The command line: `kvxfer`, or `python -m kvxfer`."""

import signal
import sys

from kvxfer._kvxfer import cli


def main() -> int:
    """Runs the command line of this process."""
    # Python's own handler would only run once the native half has returned.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return cli(sys.argv[1:])
