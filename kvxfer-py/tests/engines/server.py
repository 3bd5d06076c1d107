"""Whole vLLM servers as child processes of a test: what `vllm serve` starts, loop and all."""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .harness import (
    CALL_SECONDS,
    LOGS,
    START_SECONDS,
    STOP_SECONDS,
    TAIL_LINES,
    TREE,
    Config,
    EngineFailed,
    environment,
    free_port,
)
from .processes import cpu_seconds, in_session

# Tells `counting.py` the file of the count, 8 bytes that are there already.
STEPS_FILE = "STEPS_ARE_COUNTED_IN"
TESTS = Path(__file__).resolve().parents[1]


class Server:
    """One server, which is a session of processes. Made, it is not up yet."""

    def __init__(self, name: str, config: Config) -> None:
        self.name = name
        self.log = LOGS / f"{name}.log"
        self._steps = LOGS / f"{name}.steps"
        LOGS.mkdir(parents=True, exist_ok=True)
        self._steps.write_bytes(bytes(8))
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
                    *("--host", "127.0.0.1", "--port", str(port), *_flags(config)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ
                | environment(TREE / "target" / "cache")
                | {"PYTHONPATH": str(TESTS), STEPS_FILE: str(self._steps)}
                | config.environment,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    # Life

    def ready(self) -> "Server":
        """Waits until it answers."""
        deadline = time.monotonic() + START_SECONDS
        while not self._healthy():
            if self._process.poll() is not None:
                raise self._failed(f"ended with code {self._process.returncode}")
            if time.monotonic() > deadline:
                raise self._failed(f"did not come up within {START_SECONDS:.0f} s")
            time.sleep(0.2)
        return self

    def ended(self) -> int:
        """Waits until a server that cannot start has ended; its exit status."""
        try:
            return self._process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            raise self._failed(f"still there after {START_SECONDS:.0f} s") from None

    def processes(self) -> list[int]:
        """The ids of its processes that have not ended."""
        return in_session(self._process.pid)

    def kill(self) -> None:
        """SIGKILL to all of it at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(STOP_SECONDS)

    def ask_to_end(self) -> None:
        self._process.terminate()

    def stop(self) -> None:
        """The orderly end; SIGKILL to what is left of it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        self.kill()

    # Use

    def complete(self, prompt: list[int], max_tokens: int) -> list[int]:
        """The tokens one prompt gets; an error when it got none."""
        body = {
            "model": "tiny",
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        answer = self._fetch("/v1/completions", json.dumps(body).encode())
        tokens: list[int] = json.loads(answer)["choices"][0]["token_ids"]
        return tokens

    def steps(self) -> int:
        """Engine steps so far, those that computed nothing included."""
        return int.from_bytes(self._steps.read_bytes(), sys.byteorder)

    def cpu_seconds(self) -> float:
        """CPU time of all its processes so far."""
        return sum(map(cpu_seconds, self.processes()))

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def _healthy(self) -> bool:
        try:
            self._fetch("/health")
        except OSError:
            return False
        return True

    def _fetch(self, path: str, body: bytes | None = None) -> bytes:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=CALL_SECONDS) as answer:
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError as error:
            raise self._failed(f"{path} answered {error.code}: {error.read()!r}") from None

    def _failed(self, what: str) -> EngineFailed:
        tail = "\n".join(self.text().splitlines()[-TAIL_LINES:])
        log = self.log.relative_to(TREE)
        return EngineFailed(f"{self.name}: {what}\n--- end of {log} ---\n{tail}")


def _end_with_parent() -> None:
    # Should this process be killed outright, no `finally` runs. PR_SET_PDEATHSIG = 1.
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _flags(config: Config) -> list[str]:
    """The command line of an engine's configuration."""
    settings: dict[str, Any] = config.as_json() | {
        "served_model_name": "tiny",
        "scheduler_cls": "engines.counting.CountingScheduler",
        # The worker within the engine's process, as on one GPU. On a CPU, vLLM's default is a
        # process of its own, which spins on a whole core for a second after each step.
        "distributed_executor_backend": "uni",
    }
    transfer = settings.pop("transfer")
    caching = settings.pop("enable_prefix_caching")
    flags = ["--enforce-eager", "--skip-tokenizer-init"]
    flags.append("--enable-prefix-caching" if caching else "--no-enable-prefix-caching")
    if transfer is not None:
        flags += ["--kv-transfer-config", json.dumps(transfer)]
    for name, value in settings.items():
        flags += [f"--{name.replace('_', '-')}", str(value)]
    return flags


@contextlib.contextmanager
def servers(configs: dict[str, Config]) -> Iterator[list[Server]]:
    """Servers that start side by side and are gone afterwards, whatever happened."""
    started: list[Server] = []
    try:
        for name, config in configs.items():
            started.append(Server(name, config))
        yield started
    finally:
        for server in started:
            server.ask_to_end()
        for server in started:
            server.stop()
