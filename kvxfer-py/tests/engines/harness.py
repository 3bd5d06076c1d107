"""Real vLLM engines as child processes of a test.

Every call has a deadline; an engine that misses it is killed, and the failure shows the end
of its log. Engines are ended by their process id, and only those started here.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHILD = Path(__file__).with_name("engine.py")
TREE = Path(__file__).resolve().parents[3]
LOGS = TREE / "target" / "logs"
START_SECONDS = 180.0
CALL_SECONDS = 120.0
STOP_SECONDS = 30.0
TAIL_LINES = 60


class EngineFailed(Exception):
    """An engine answered with an error, died, or did not answer in time."""


def free_port() -> int:
    """A TCP port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True)
class Answer:
    """What one prompt got."""

    tokens: list[int]
    finished: str | None


@dataclass(frozen=True)
class Run:
    """What several prompts got together, and what it cost the engine."""

    answers: list[Answer]
    steps: int
    seconds: float
    cpu_seconds: float


@dataclass
class Config:
    """How an engine is started; the defaults suit the tiny model."""

    model: Path
    role: str | None = None
    connector: str = "KvxferConnector"
    connector_module: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    policy: str = "recompute"
    dtype: str = "float32"
    blocks: int = 96
    prefix_caching: bool = True
    max_tokens_per_step: int = 1024
    environment: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        transfer: dict[str, Any] | None = None
        if self.role is not None:
            transfer = {
                "kv_connector": self.connector,
                "kv_role": self.role,
                "kv_load_failure_policy": self.policy,
                "kv_connector_extra_config": self.extra,
            }
            if self.connector_module is not None:
                transfer["kv_connector_module_path"] = self.connector_module
        return {
            "model": str(self.model),
            "dtype": self.dtype,
            "max_model_len": 4096,
            "max_num_batched_tokens": self.max_tokens_per_step,
            "max_num_seqs": 8,
            "num_gpu_blocks_override": self.blocks,
            "enable_prefix_caching": self.prefix_caching,
            "transfer": transfer,
        }


def environment(cache: Path) -> dict[str, str]:
    """What vLLM needs on a machine without a GPU and without a model hub."""
    lines = (TREE / "env" / "vllm-cpu.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if not line.startswith("#")) | {
        # Scheduler half and worker half in one process, where a test can look at both.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "VLLM_CONFIG_ROOT": str(cache / "vllm-config"),
        "XDG_CACHE_HOME": str(cache),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
    }


class Engine:
    """One engine. `start` returns before it is up, so several can start together."""

    def __init__(self, name: str, config: Config) -> None:
        self.name = name
        self.config = config
        LOGS.mkdir(parents=True, exist_ok=True)
        self.log = LOGS / f"{name}.log"
        self._unread = b""
        self._waiting: str | None = "start"
        self.baseline: dict[str, Any] = {}
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | environment(TREE / "target" / "cache") | config.environment,
            )
        self._send(config.as_json())

    # Life

    def ready(self, seconds: float = START_SECONDS) -> "Engine":
        """Waits until the engine is up; its first `stats` become the baseline."""
        self.baseline = self.finish(seconds)
        return self

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone: nothing of it gets to run any more."""
        self._process.kill()
        self._process.wait(STOP_SECONDS)

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def stop(self) -> None:
        """The orderly end; SIGKILL when that takes too long."""
        if self.alive and self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    # Calls

    def start(self, call: str, **args: Any) -> None:
        """Makes a call without waiting for its answer, which `finish` returns."""
        if self._waiting is not None:
            raise RuntimeError(f"{self.name} is still at `{self._waiting}`")
        self._waiting = call
        self._send({"call": call, "args": args})

    def finish(self, seconds: float = CALL_SECONDS) -> Any:
        """The answer to the call under way."""
        call = self._waiting
        line = self._line(seconds)
        self._waiting = None
        answer = json.loads(line)
        if "error" in answer:
            raise self._failed(f"`{call}` failed: {answer['error']}")
        return answer["ok"]

    def call(self, name: str, seconds: float = CALL_SECONDS, **args: Any) -> Any:
        self.start(name, **args)
        return self.finish(seconds)

    def start_ask(
        self, prompts: list[list[int]], max_tokens: int, seconds: float = CALL_SECONDS
    ) -> None:
        # The engine gives up first, and can say in which state.
        self.start("ask", prompts=prompts, max_tokens=max_tokens, seconds=seconds - 5)

    def finish_ask(self, seconds: float = CALL_SECONDS) -> Run:
        got = self.finish(seconds)
        return Run(**(got | {"answers": [Answer(**one) for one in got["answers"]]}))

    def ask(self, prompts: list[list[int]], max_tokens: int, seconds: float = CALL_SECONDS) -> Run:
        """Runs prompts together, from the same first step on, until the engine is at rest."""
        self.start_ask(prompts, max_tokens, seconds)
        return self.finish_ask(seconds)

    def one(self, prompt: list[int], max_tokens: int, seconds: float = CALL_SECONDS) -> list[int]:
        """The tokens one prompt gets; an error when it got none."""
        (answer,) = self.ask([prompt], max_tokens, seconds).answers
        if answer.finished != "length":
            raise self._failed(f"the request ended with {answer.finished!r}")
        return answer.tokens

    def stats(self) -> dict[str, Any]:
        got: dict[str, Any] = self.call("stats")
        return got

    def tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-TAIL_LINES:])

    # Plumbing

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failed("is gone") from None

    def _line(self, seconds: float) -> bytes:
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        deadline = time.monotonic() + seconds
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                self.kill()
                raise self._failed(f"`{self._waiting}` took more than {seconds:.0f} s; killed")
            piece = os.read(pipe, 1 << 16)
            if not piece:
                code = self._process.wait(STOP_SECONDS)
                raise self._failed(f"ended with {code} during `{self._waiting}`")
            self._unread += piece
        line, self._unread = self._unread.split(b"\n", 1)
        return line

    def _failed(self, what: str) -> EngineFailed:
        return EngineFailed(
            f"{self.name}: {what}\n--- end of {self.log.relative_to(TREE)} ---\n{self.tail()}"
        )


class Fleet:
    """The engines of a test or of a module; ends them all."""

    def __init__(self) -> None:
        self.engines: list[Engine] = []

    def launch(self, name: str, config: Config) -> Engine:
        """Starts an engine and returns at once."""
        engine = Engine(name, config)
        self.engines.append(engine)
        return engine

    def start(self, **configs: Config) -> list[Engine]:
        """Starts engines side by side and returns when all are up."""
        engines = [self.launch(name, config) for name, config in configs.items()]
        return [engine.ready() for engine in engines]

    def end(self) -> None:
        for engine in self.engines:
            engine.stop()


@contextlib.contextmanager
def fleet() -> Iterator[Fleet]:
    """A fleet that is gone afterwards, whatever happened."""
    engines = Fleet()
    try:
        yield engines
    finally:
        engines.end()
