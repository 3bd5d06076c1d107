"""Where an engine keeps its KV, and the stream on which it computes it."""

import os
from typing import TYPE_CHECKING

import torch

from kvxfer import ConfigError
from kvxfer.config import Config

if TYPE_CHECKING:
    from vllm.config import VllmConfig

HOST = "host"


def place(config: Config, vllm_config: "VllmConfig") -> str:
    """The agent's `memory`: "host", or "cuda:N" with the number in this process.

    The pool is where the KV is: nothing is copied between host and device."""
    engine = vllm_config.device_config.device_type
    if engine not in ("cpu", "cuda"):
        raise ConfigError(f"kvxfer cannot move KV of a {engine} engine; use cpu or cuda")
    # The one is ours, the other vLLM's own, which has a value whether or not it was given.
    given = [("buffer_device", config.buffer_device)]
    given.append(("kv_buffer_device", vllm_config.kv_transfer_config.kv_buffer_device))
    for name, wanted in given:
        if wanted is not None and wanted != engine:
            raise ConfigError(
                f"{name} = {wanted!r}, but this engine keeps its KV on {engine}, and the pool has "
                f"to be there too; remove {name}, or set it to {engine}"
            )
    return HOST if engine == "cpu" else f"cuda:{torch.cuda.current_device()}"


def memory_bytes(memory: str) -> int:
    """All the memory of that place."""
    if memory == HOST:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(torch.cuda.get_device_properties(memory).total_memory)


def current_stream(memory: str) -> int | None:
    """The handle of the stream that this thread's work is on; None on the host."""
    if memory == HOST:
        return None
    return int(torch.cuda.current_stream(memory).cuda_stream)
