"""Servers as child processes: started side by side, waited for, and ended whatever happens."""

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

TREE = Path(__file__).resolve().parents[2]
LOGS = TREE / "target" / "logs"
START_SECONDS = 300.0
STOP_SECONDS = 10.0
POLL_SECONDS = 0.5
TAIL_LINES = 40

# What a log says, and what that means to somebody who waits; the last one found counts.
PHASES = (
    ("Resolved architecture", "starting the engine"),
    ("Initializing a V1 LLM engine", "starting the worker"),
    ("Starting to load model", "loading the model"),
    ("KV cache size", "making the KV cache"),
    ("init engine", "opening the HTTP port"),
    ("Application startup complete", "ready"),
)
# What to do about what a log says when a server did not come up.
REMEDIES = (
    ("Address already in use", "another process took the port; run the demo again"),
    ("Cannot allocate memory", "about 6 GB of free memory are needed; close something"),
    ("MemoryError", "about 6 GB of free memory are needed; close something"),
    ("No space left on device", "free some space: in /dev/shm, in /tmp or beside target/"),
    ("ConfigError", "kvxfer refused the configuration; the message in the log names the key"),
    ("No module named", "the environment is incomplete; remove target/venv and run again"),
)


class ServerFailed(Exception):
    """A server did not come up. The message says which, why, and what to do."""


def free_port() -> int:
    """A TCP port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _end_with_parent() -> None:
    # Should this process be killed outright, its `finally` does not run. PR_SET_PDEATHSIG = 1.
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


class Server:
    """One server in a process group of its own, with its log in target/logs."""

    def __init__(
        self, name: str, url: str, command: Sequence[str], environment: dict[str, str]
    ) -> None:
        self.name = name
        self.url = url
        self.log = LOGS / f"demo-{name}.log"
        LOGS.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def phase(self) -> str:
        text = self.text()
        found = [phase for words, phase in PHASES if words in text]
        return found[-1] if found else "loading Python packages"

    def healthy(self) -> bool:
        """Whether /health answers 200. A process that ended raises."""
        if self._process.poll() is not None:
            raise self._failed(f"ended with code {self._process.returncode} while starting")
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def late(self) -> ServerFailed:
        return self._failed(f"did not come up within {START_SECONDS:.0f} s")

    def _failed(self, what: str) -> ServerFailed:
        text = self.text()
        remedies = [remedy for words, remedy in REMEDIES if words in text]
        advice = remedies[0] if remedies else "the log above usually says why"
        tail = "\n".join(text.splitlines()[-TAIL_LINES:])
        where = self.log.relative_to(TREE)
        # What comes after the first error is mostly other processes' grief about it.
        errors = re.findall(r"^(?:\(.+\) ERROR .+\] *)?((?:\w+\.)*\w+Error: .+)$", text, re.M)
        first = f"\nThe first error: {errors[0]}" if errors else ""
        return ServerFailed(
            f"--- end of {where} ---\n{tail}\n---\n"
            f"The {self.name} server {what}.{first}\n"
            f"What to do: {advice}.\nThe whole log: {where}"
        )

    def ask_to_end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def end(self, deadline: float) -> None:
        """Waits for the orderly end, then kills what is left of the group."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, deadline - time.monotonic()))
        # The group outlives its leader while an engine process still runs in it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(STOP_SECONDS)


@contextlib.contextmanager
def ended_afterwards() -> Iterator[list[Server]]:
    """A list of servers that are gone when the block is left, also by Ctrl-C or SIGTERM."""

    def leave(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    servers: list[Server] = []
    try:
        yield servers
    finally:
        # A second Ctrl-C must not leave half of them behind.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for server in servers:
            server.ask_to_end()
        # One deadline for all: while it starts, vLLM is deaf to SIGTERM.
        deadline = time.monotonic() + STOP_SECONDS
        for server in servers:
            server.end(deadline)


def wait_for(servers: Sequence[Server]) -> None:
    """Until all answer /health, with a line that tells where each one is."""
    began = time.monotonic()
    live = sys.stderr.isatty()
    last = ""
    waiting = list(servers)
    while waiting:
        elapsed = time.monotonic() - began
        waiting = [server for server in waiting if not server.healthy()]
        states = [
            f"{server.name}: {server.phase() if server in waiting else 'ready'}"
            for server in servers
        ]
        line = "   ".join(states)
        if live:
            print(f"\r\033[K  {elapsed:4.0f} s   {line}", end="", file=sys.stderr, flush=True)
        elif line != last:
            print(f"  {elapsed:4.0f} s   {line}", file=sys.stderr, flush=True)
        last = line
        if waiting and elapsed > START_SECONDS:
            raise waiting[0].late()
        if waiting:
            time.sleep(POLL_SECONDS)
    if live:
        print(file=sys.stderr)
