"""What /proc tells of the processes that a test started."""

import contextlib
import os
import time
from pathlib import Path


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far, with that of threads which have ended."""
    # clock_getcpuclockid(3), which Python does not have.
    return time.clock_gettime(~pid << 3 | 2)


def in_session(leader: int) -> list[int]:
    """The ids of the processes of a session that have not ended."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, _, session = _stat(int(entry.name))[:4]
            if int(session) == leader and state != "Z":
                found.append(int(entry.name))
    return found


def exit_code(zombie: int) -> int:
    """How a process ended that its parent has not waited for; minus the signal, if by one."""
    return os.waitstatus_to_exitcode(int(_stat(zombie)[49]))


def _stat(pid: int) -> list[str]:
    """The fields of proc_pid_stat(5) from the third on: the second, a name, may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
