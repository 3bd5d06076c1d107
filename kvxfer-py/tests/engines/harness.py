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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .engine import Batches
from .processes import exit_code, in_session

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
    batches: Batches
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

    def alone(self) -> "Config":
        """The same engine without a connector."""
        return replace(self, role=None, extra={})

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


class Nursery:
    """The process that engines are forked from, so that vLLM is imported once."""

    def __init__(self) -> None:
        self._orders, theirs = socket.socketpair()
        LOGS.mkdir(parents=True, exist_ok=True)
        with theirs, (LOGS / "nursery.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(CHILD), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | environment(TREE / "target" / "cache"),
                pass_fds=[theirs.fileno()],
            )
        self._orders.settimeout(START_SECONDS)

    def fork(self, changes: dict[str, str], pipes: list[int]) -> int:
        """Starts an engine on these descriptors; its process id."""
        socket.send_fds(self._orders, [json.dumps(changes).encode()], pipes)
        pid = self._orders.recv(64)
        if not pid:
            raise EngineFailed(f"the nursery ended; see {LOGS / 'nursery.log'}")
        return int(pid)

    def end(self) -> None:
        self._orders.close()
        self._process.wait(STOP_SECONDS)


class Engine:
    """One engine. Made, it is not up yet, so several can start together."""

    def __init__(self, nursery: Nursery, name: str, config: Config) -> None:
        self.name = name
        self.config = config
        self.log = LOGS / f"{name}.log"
        self.baseline: dict[str, Any] = {}
        self._unread = b""
        self._waiting: str | None = "start"
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        with self.log.open("wb") as log:
            self.pid = nursery.fork(config.environment, [commands, answers, log.fileno()])
        os.close(commands)
        os.close(answers)
        self._handle = os.pidfd_open(self.pid)
        self._send(config.as_json())

    # Life

    def ready(self, seconds: float = START_SECONDS) -> "Engine":
        """Waits until the engine is up; its first `stats` become the baseline."""
        try:
            self.baseline = self.finish(seconds)
        except EngineFailed:
            self.kill()
            raise
        return self

    def refused(self) -> str:
        """Waits for a start that is to fail; why it did. By then nothing of the engine is left."""
        try:
            self.finish(START_SECONDS)
        except EngineFailed as error:
            assert self._ended(STOP_SECONDS), f"{self.name} does not end"
            assert exit_code(self.pid) == 1, f"{self.name} did not end by itself, as a failure"
            assert in_session(self.pid) == [], f"{self.name} left processes behind"
            return str(error)
        raise AssertionError(f"{self.name} started")

    @property
    def alive(self) -> bool:
        return not self._ended(0)

    def _ended(self, seconds: float) -> bool:
        return bool(select.select([self._handle], [], [], seconds)[0])

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone: nothing of it gets to run any more."""
        self.signal(signal.SIGKILL)
        assert self._ended(STOP_SECONDS), f"{self.name} survives SIGKILL"

    def ask_to_end(self) -> None:
        """The engine ends in an orderly way when its pipe is closed."""
        if self._commands >= 0:
            os.close(self._commands)
            self._commands = -1

    def stop(self) -> None:
        """The orderly end; SIGKILL when that takes too long. May be called again."""
        if self._handle < 0:
            return
        self.ask_to_end()
        if not self._ended(STOP_SECONDS):
            self.kill()
        os.close(self._answers)
        os.close(self._handle)
        self._handle = -1

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

    def settle(self) -> None:
        """Drops the answer to a call that a test which failed left under way."""
        if self._waiting is not None:
            with contextlib.suppress(EngineFailed):
                self.finish()

    def call(self, name: str, seconds: float = CALL_SECONDS, **args: Any) -> Any:
        self.start(name, **args)
        return self.finish(seconds)

    def ask(
        self,
        prompts: list[list[int]],
        max_tokens: int,
        seconds: float = CALL_SECONDS,
        batches: Batches | None = None,
    ) -> Run:
        """Runs prompts together, from the same first step on, until all are answered.

        With `batches`, those of another engine's run, in the same ones.
        """
        # The engine gives up first, and can say in which state.
        args = {"prompts": prompts, "max_tokens": max_tokens, "batches": batches}
        self.start("ask", **args, seconds=seconds - 5)
        return self._run(seconds)

    def submit(self, prompt: list[int], max_tokens: int) -> str:
        """Adds a request and takes one step; its id is for `answers`."""
        request: str = self.call("submit", prompt=prompt, max_tokens=max_tokens)
        self.call("step")
        return request

    def answers(self, requests: list[str], seconds: float = CALL_SECONDS) -> Run:
        """Until submitted requests are answered."""
        self.start("answers", requests=requests, seconds=seconds - 5)
        return self._run(seconds)

    def start_rest(self, seconds: float = CALL_SECONDS) -> None:
        self.start("rest", seconds=seconds - 5)

    def rest(self, seconds: float = CALL_SECONDS) -> None:
        """Until the engine would go to sleep: no delayed free, no push is pending."""
        self.start_rest(seconds)
        self.finish(seconds)

    def one(self, prompt: list[int], max_tokens: int, seconds: float = CALL_SECONDS) -> list[int]:
        """The tokens one prompt gets; an error when it got none."""
        (answer,) = self.ask([prompt], max_tokens, seconds).answers
        self.rest(seconds)
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

    def _run(self, seconds: float) -> Run:
        got = self.finish(seconds)
        return Run(**(got | {"answers": [Answer(**one) for one in got["answers"]]}))

    def _send(self, message: dict[str, Any]) -> None:
        left = json.dumps(message).encode() + b"\n"
        try:
            while left:
                left = left[os.write(self._commands, left) :]
        except BrokenPipeError:
            raise self._failed("is gone") from None

    def _line(self, seconds: float) -> bytes:
        deadline = time.monotonic() + seconds
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._answers], [], [], left)[0]:
                self.kill()
                raise self._failed(f"`{self._waiting}` took more than {seconds:.0f} s; killed")
            piece = os.read(self._answers, 1 << 16)
            if not piece:
                raise self._failed(f"ended during `{self._waiting}`")
            self._unread += piece
        line, self._unread = self._unread.split(b"\n", 1)
        return line

    def _failed(self, what: str) -> EngineFailed:
        return EngineFailed(
            f"{self.name}: {what}\n--- end of {self.log.relative_to(TREE)} ---\n{self.tail()}"
        )


class Fleet:
    """Engines that end together."""

    def __init__(self) -> None:
        self.engines: list[Engine] = []
        self._nursery = Nursery()

    def launch(self, name: str, config: Config) -> Engine:
        """Starts an engine and returns at once."""
        engine = Engine(self._nursery, name, config)
        self.engines.append(engine)
        return engine

    def end(self) -> None:
        for engine in self.engines:
            engine.ask_to_end()
        for engine in self.engines:
            engine.stop()
        self._nursery.end()


@contextlib.contextmanager
def fleet() -> Iterator[Fleet]:
    """A fleet that is gone afterwards, whatever happened."""
    engines = Fleet()
    try:
        yield engines
    finally:
        engines.end()
