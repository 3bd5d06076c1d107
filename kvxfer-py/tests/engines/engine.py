"""Offline vLLM engines, each in a process of its own, driven by JSON lines.

Scheduler half and worker half of a connector live in this one process
(`VLLM_ENABLE_V1_MULTIPROCESSING=0`), so a test can look at both. The parent is `harness.py`;
the protocol is a line `{"call": NAME, "args": {…}}` in, a line `{"ok": …}` or `{"error": …}` out.

Whatever vLLM prints goes to the log (stderr); the answers go to the pipe that was stdout.
"""

import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

# For each step that computed something: which prompt, by its number, and how many of its tokens.
Batches = list[list[tuple[int, int]]]


class Engine:
    """The calls a parent can make, one method each."""

    def __init__(self, config: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.config import KVTransferConfig

        transfer = config.pop("transfer")
        self.llm = LLM(
            enforce_eager=True,
            skip_tokenizer_init=True,
            disable_log_stats=False,
            kv_transfer_config=KVTransferConfig(**transfer) if transfer else None,
            **config,
        )
        self.engine: Any = self.llm.llm_engine
        # Typed as the client's interface; in one process it is the core itself.
        self.core: Any = self.engine.engine_core.engine_core
        self.scheduler: Any = self.core.scheduler
        self.budget = int(self.scheduler.max_num_scheduled_tokens)
        self.steps = 0
        self.batches: list[dict[str, int]] = []
        self.outputs: dict[str, dict[str, Any]] = {}
        self.serial = 0
        self._record_batches()

    # Requests

    def ask(
        self,
        prompts: list[list[int]],
        max_tokens: int,
        seconds: float,
        batches: Batches | None = None,
    ) -> dict[str, Any]:
        """Runs prompts together, from the same first step on, until all are answered.

        With `batches`, those of another engine, in the same batches: what of a prompt is in none
        of them is computed before.
        """
        if batches is None:
            requests = [self.submit(prompt, max_tokens) for prompt in prompts]
        else:
            requests = self._replay(prompts, max_tokens, batches)
        return self.answers(requests, seconds)

    def answers(self, requests: list[str], seconds: float) -> dict[str, Any]:
        """Steps until these requests are answered."""
        began, cpu, steps = time.monotonic(), time.process_time(), self.steps
        batches = len(self.batches)
        self._step_while(lambda: any(not self.outputs[r]["finished"] for r in requests), seconds)
        return {
            "answers": [self.outputs.pop(r) for r in requests],
            "batches": [
                [(requests.index(r), tokens) for r, tokens in batch.items() if r in requests]
                for batch in self.batches[batches:]
            ],
            "steps": self.steps - steps,
            "seconds": time.monotonic() - began,
            "cpu_seconds": time.process_time() - cpu,
        }

    def _replay(self, prompts: list[list[int]], max_tokens: int, batches: Batches) -> list[str]:
        """Runs exactly these batches, and leaves the requests running."""
        requests, held = [], []
        for number, prompt in enumerate(prompts):
            left = next(tokens for batch in batches for n, tokens in batch if n == number)
            # Without the local cache, it is known beforehand how much there is to compute.
            requests.append(self.submit(prompt, max_tokens, read_cache=False))
            held.append(self._compute_but(left, requests[-1]))
        for batch in batches:
            self.scheduler.running = [held[number] for number, _ in batch]
            self.step()
            expected = {requests[number]: tokens for number, tokens in batch}
            assert self.batches[-1] == expected, "not the batch it was to be"
        self.scheduler.running = [request for request in held if not request.is_finished()]
        return requests

    def _compute_but(self, left: int, name: str) -> Any:
        """Computes a prompt but for its last tokens and sets the request aside: the scheduler
        goes by its list of running requests, and knows all others as well."""
        (request,) = (r for r in self.scheduler.requests.values() if _outer(r.request_id) == name)
        while (more := request.num_prompt_tokens - request.num_computed_tokens - left) > 0:
            self.scheduler.max_num_scheduled_tokens = min(self.budget, more)
            self.step()
        self.scheduler.max_num_scheduled_tokens = self.budget
        self.scheduler.running = []
        return request

    def rest(self, seconds: float) -> None:
        """Steps as the server's loop does, until the engine would go to sleep.

        That is later than the last answer: delayed frees and pending pushes keep it awake.
        """
        self._step_while(self.scheduler.has_requests, seconds)

    def ask_each(
        self, prompts: list[list[int]], max_tokens: int, seconds: float, last_alone: bool
    ) -> list[list[int]]:
        """Runs prompts one by one, each as if it were the first.

        `last_alone`: the last token of a prompt is computed in a step of its own.
        """
        answers = []
        for prompt in prompts:
            assert self.reset_prefix_cache()
            # Of a single token, nothing is left to be computed before.
            batches = [[(0, 1)]] if last_alone and len(prompt) > 1 else None
            run = self.ask([prompt], max_tokens, seconds, batches)
            answers.append(run["answers"][0]["tokens"])
        return answers

    def submit(self, prompt: list[int], max_tokens: int, read_cache: bool = True) -> str:
        """Adds a request without stepping; its id."""
        from vllm import SamplingParams

        self.serial += 1
        request_id = f"request-{self.serial}"
        sampling = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            skip_reading_prefix_cache=not read_cache,
        )
        self.outputs[request_id] = {"tokens": [], "finished": None}
        self.engine.add_request(request_id, {"prompt_token_ids": prompt}, sampling)
        return request_id

    def _step_while(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"still busy after {seconds} s: {self.stats()}")
            self.step()

    def step(self, count: int = 1) -> None:
        """`count` engine steps, whether there is anything to do or not."""
        for _ in range(count):
            self.steps += 1
            before = len(self.batches)
            for output in self.engine.step():
                known = self.outputs[output.request_id]
                known["tokens"] = list(output.outputs[0].token_ids)
                if output.finished:
                    known["finished"] = output.outputs[0].finish_reason
            # What `EngineCore._process_engine_step` does when nothing was executed.
            if len(self.batches) == before and self.scheduler.has_requests():
                time.sleep(0.001)

    def abort(self, request: str) -> None:
        """Aborts a submitted request, as a client that hangs up does."""
        self.engine.abort_request([request], internal=False)

    def reset_prefix_cache(self) -> bool:
        """Forgets the local prefix cache; False when blocks are still held."""
        done: bool = self.llm.reset_prefix_cache()
        return done

    # State

    def stats(self) -> dict[str, Any]:
        """What must be back at its baseline when nothing is going on."""
        pool = self.scheduler.kv_cache_manager.block_pool
        return {
            "free_blocks": pool.get_num_free_blocks(),
            "requests": {k: r.status.name for k, r in self.scheduler.requests.items()},
            "awake": self.scheduler.has_requests(),
            "steps": self.steps,
            "block_size": self.core.vllm_config.cache_config.block_size,
            "block_bytes": self._block_bytes(),
            "prompt_tokens": self._prompt_tokens(),
            "connector": self._connector_stats(),
        }

    def _block_bytes(self) -> int:
        """One block of every layer."""
        return sum(cache[0].nbytes for cache in self._caches())

    def _prompt_tokens(self) -> dict[str, int]:
        """vLLM's own counters of where prompt tokens came from."""
        return {
            metric.labels["source"]: int(metric.value)
            for metric in self.llm.get_metrics()
            if metric.name == "vllm:prompt_tokens_by_source"
        }

    def _connector_stats(self) -> dict[str, Any] | None:
        connector = self._connector()
        worker = getattr(connector, "_worker", None)
        return dict(worker._agent.stats()) if worker is not None else None

    # Hooks

    def _record_batches(self) -> None:
        """Keeps what each step with a forward computes: tokens by request, in their order."""
        schedule = self.scheduler.schedule

        def scheduled(*args: Any, **more: Any) -> Any:
            step = schedule(*args, **more)
            if step.num_scheduled_tokens:
                tokens = step.num_scheduled_tokens
                self.batches.append({_outer(r): tokens[r] for r in tokens})
            return step

        self.scheduler.schedule = scheduled

    def _connector(self) -> Any:
        """The worker half, where there is a connector."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

        return get_kv_transfer_group() if has_kv_transfer_group() else None

    def _caches(self) -> list[Any]:
        runner = self.core.model_executor.driver_worker.worker.model_runner
        return list(runner.kv_caches)

    def fill(self, value: float) -> None:
        """Overwrites the whole KV cache: what is read afterwards must have been loaded."""
        for cache in self._caches():
            cache.fill_(value)

    def add(self, delta: float) -> None:
        """Adds `delta` to the whole KV cache, now."""
        for cache in self._caches():
            cache.add_(delta)

    def perturb(self, delta: float) -> None:
        """Adds `delta` to each layer's KV in the next step that has a forward.

        After the layer's attention, before the connector sees it: the step's own answer is
        the clean one, what is pushed and what stays in this engine's cache is not.
        """
        connector = self._connector()
        save = connector.save_kv_layer
        finish = connector.wait_for_save
        touched = False

        def save_perturbed(name: str, layer: Any, *args: Any, **more: Any) -> None:
            nonlocal touched
            touched = True
            layer.add_(delta)
            save(name, layer, *args, **more)

        def finish_perturbed() -> None:
            if touched:
                connector.save_kv_layer, connector.wait_for_save = save, finish
            finish()

        connector.save_kv_layer, connector.wait_for_save = save_perturbed, finish_perturbed


def _outer(request_id: str) -> str:
    """The id a request was submitted with: vLLM adds a dash and random characters."""
    return request_id.rpartition("-")[0]


def run() -> int:
    """One engine, from its first line to the end of its pipe; its exit status."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    commands = os.fdopen(os.dup(0))

    def answer(**what: Any) -> None:
        answers.write(json.dumps(what) + "\n")

    try:
        engine = Engine(json.loads(commands.readline()))
    except Exception as error:
        traceback.print_exc()
        answer(error=f"{type(error).__name__}: {error}")
        return 1
    answer(ok=engine.stats())
    for line in commands:
        request = json.loads(line)
        try:
            answer(ok=getattr(engine, request["call"])(**request["args"]))
        except Exception as error:
            traceback.print_exc()
            answer(error=f"{type(error).__name__}: {error}")
    # The parent closed the pipe: the orderly end.
    engine.core.shutdown()
    return 0


def nursery(orders: socket.socket) -> int:
    """Imports vLLM once and forks an engine for each order. Returns in each of them, too.

    An order is the JSON of its environment, with its stdin, stdout and log as descriptors; the
    answer is its process id. vLLM forks its workers the same way.
    """
    import vllm.model_executor.models.llama
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.cpu_worker  # noqa: F401

    while True:
        order, pipes, _, _ = socket.recv_fds(orders, 1 << 16, 3)
        if not order:
            return 0
        pid = os.fork()
        if pid == 0:
            break
        for pipe in pipes:
            os.close(pipe)
        # Never waited for: as a zombie it keeps its id, so that a late signal hits nobody else.
        orders.sendall(str(pid).encode())
    orders.close()
    # What it leaves behind can be told by its session.
    os.setsid()
    for number, pipe in enumerate(pipes):
        os.dup2(pipe, number)
        os.close(pipe)
    os.environ.update(json.loads(order))
    return run()


if __name__ == "__main__":
    status = nursery(socket.socket(fileno=int(sys.argv[1])))
    sys.stdout.flush()
    sys.stderr.flush()
    # Python's own end takes seconds with everything that vLLM imports, and tests nothing of ours.
    os._exit(status)
