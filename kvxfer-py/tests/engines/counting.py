"""vLLM's scheduler, which counts its steps where another process can read them.

vLLM's own metrics leave out the steps in which nothing is computed, and it is those that count.
"""

import mmap
import os
from pathlib import Path
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from engines.server import STEPS_FILE


class CountingScheduler(Scheduler):  # type: ignore[misc]  # what comes from vLLM is Any
    """For `--scheduler-cls`. On a CPU it stands in for vLLM's default, which is its base."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        with Path(os.environ[STEPS_FILE]).open("r+b") as file:
            self._steps = memoryview(mmap.mmap(file.fileno(), 8)).cast("Q")

    def schedule(self, *args: Any, **more: Any) -> Any:
        self._steps[0] += 1
        return super().schedule(*args, **more)
