"""One offline vLLM engine in a process of its own, driven by JSON lines.

Scheduler half and worker half of a connector live in this one process
(`VLLM_ENABLE_V1_MULTIPROCESSING=0`), so a test can look at both. The parent is `harness.py`;
the protocol is a line `{"call": NAME, "args": {…}}` in, a line `{"ok": …}` or `{"error": …}` out.

Whatever vLLM prints goes to the log (stderr); the answers go to the pipe that was stdout.
"""

import json
import os
import sys
import time
import traceback
from typing import Any


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
        self.engine = self.llm.llm_engine
        # Typed as the client's interface; in one process it is the core itself.
        self.core: Any = self.engine.engine_core.engine_core
        self.scheduler: Any = self.core.scheduler
        self.steps = 0
        self.outputs: dict[str, dict[str, Any]] = {}
        self.serial = 0

    # Requests

    def ask(
        self, prompts: list[list[int]], max_tokens: int, seconds: float, params: Any = None
    ) -> dict[str, Any]:
        """Runs prompts together from the first step on, to their end and the engine's rest."""
        ids = [self.submit(prompt, max_tokens, params) for prompt in prompts]
        began, cpu, steps = time.monotonic(), time.process_time(), self.steps
        self.run(seconds)
        return {
            "answers": [self.outputs.pop(i) for i in ids],
            "steps": self.steps - steps,
            "seconds": time.monotonic() - began,
            "cpu_seconds": time.process_time() - cpu,
        }

    def submit(self, prompt: list[int], max_tokens: int, params: Any = None) -> str:
        """Adds a request without stepping; its id."""
        from vllm import SamplingParams

        self.serial += 1
        request_id = f"request-{self.serial}"
        sampling = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args={"kv_transfer_params": params} if params else None,
        )
        self.outputs[request_id] = {"tokens": [], "finished": None}
        self.engine.add_request(request_id, {"prompt_token_ids": prompt}, sampling)
        return request_id

    def run(self, seconds: float) -> None:
        """Steps as the server's loop does, until the engine would go to sleep.

        That is later than the last answer: delayed frees and pending pushes keep it awake.
        """
        deadline = time.monotonic() + seconds
        while self.scheduler.has_requests():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not at rest after {seconds} s: {self.stats()}")
            self.step()

    def step(self, count: int = 1) -> None:
        """`count` engine steps, whether there is anything to do or not."""
        for _ in range(count):
            self.steps += 1
            scheduled = self._computed()
            for output in self.engine.step():
                known = self.outputs[output.request_id]
                known["tokens"] = list(output.outputs[0].token_ids)
                if output.finished:
                    known["finished"] = output.outputs[0].finish_reason
            # What `EngineCore._process_engine_step` does when nothing was executed.
            if self._computed() == scheduled and self.scheduler.has_requests():
                time.sleep(0.001)

    def _computed(self) -> int:
        return sum(r.num_computed_tokens for r in self.scheduler.requests.values())

    def result(self, request: str) -> dict[str, Any]:
        """What a submitted request has so far."""
        return self.outputs[request]

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
        read = getattr(connector, "agent_stats", None)
        return dict(read()) if read is not None else None

    # Hooks

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


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**what: Any) -> None:
        answers.write(json.dumps(what) + "\n")

    try:
        engine = Engine(json.loads(sys.stdin.readline()))
    except Exception as error:
        traceback.print_exc()
        answer(error=f"{type(error).__name__}: {error}")
        sys.exit(1)
    answer(ok=engine.stats())
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer(ok=getattr(engine, request["call"])(**request["args"]))
        except Exception as error:
            traceback.print_exc()
            answer(error=f"{type(error).__name__}: {error}")
    # The parent closed the pipe: the orderly end.
    engine.core.shutdown()


if __name__ == "__main__":
    main()
