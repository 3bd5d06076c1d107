"""What the KV cache of this engine looks like, read from vLLM's own description of it."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import vllm
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    UniformTypeKVCacheSpecs,
)

from kvxfer import ConfigError, Layout
from kvxfer.config import Config

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

DEFAULT_CHUNK_TOKENS = 256

# Exactly these: a subclass may store something that is not "one block per so many tokens".
_SUPPORTED = (FullAttentionSpec, MLAAttentionSpec)

# Differ between two hosts, or two releases, that hold the same model.
_VOLATILE = {"_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype"}


@dataclass(frozen=True)
class Geometry:
    """An engine's layout without the rank. The workers know it all and send it to the scheduler
    half, so that both compute keys from the same fingerprint."""

    model: str
    dtype: str
    chunk_tokens: int
    groups: tuple[tuple[int, tuple[int, ...]], ...]
    tags: tuple[tuple[str, str], ...]

    def native(self, shard: tuple[int, int]) -> Layout:
        """The same for the native half."""
        return Layout(
            model=self.model,
            dtype=self.dtype,
            chunk_tokens=self.chunk_tokens,
            groups=self.groups,
            shard=shard,
            tags=dict(self.tags),
        )

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a full chunk in all layers."""
        return sum(self.chunk_tokens // tokens * sum(layers) for tokens, layers in self.groups)

    def default_buffer(self, max_model_len: int, segments: int, memory: int) -> int:
        """Room for two of the longest prompts, so that one can arrive while one is loaded; but
        not more than a quarter of the `memory` bytes that there are. Whole chunks in each of the
        segments that the agent cuts the pool into."""
        step = segments * self.chunk_bytes
        wanted = math.ceil(2 * math.ceil(max_model_len / self.chunk_tokens) / segments)
        return max(1, min(wanted, memory // 4 // step)) * step


def layer_names(kv: "KVCacheConfig") -> list[str]:
    """The flat layers: groups in order, and each group's layers in the order they run."""
    return [name for group in kv.kv_cache_groups for name in group.layer_names]


def _layer_spec(group: "KVCacheGroupSpec", layer: str) -> KVCacheSpec:
    spec = group.kv_cache_spec
    return spec.kv_cache_specs[layer] if isinstance(spec, UniformTypeKVCacheSpecs) else spec


def check_supported(vllm_config: "VllmConfig", kv: "KVCacheConfig") -> None:
    """Refuses what would be moved wrongly."""
    parallel = vllm_config.parallel_config
    for name, size in [
        ("pipeline_parallel_size", parallel.pipeline_parallel_size),
        ("decode_context_parallel_size", parallel.decode_context_parallel_size),
        ("prefill_context_parallel_size", parallel.prefill_context_parallel_size),
    ]:
        if size != 1:
            raise ConfigError(f"kvxfer cannot be used with {name} = {size} yet; set it to 1")
    for group in kv.kv_cache_groups:
        for layer in group.layer_names:
            kind = type(_layer_spec(group, layer))
            if kind not in _SUPPORTED or not group.enable_kv_transfer or group.host_resident:
                raise ConfigError(
                    f"layer {layer} keeps its KV as {kind.__name__}, which kvxfer cannot move yet "
                    "(only full attention and MLA): sliding windows and recurrent state need "
                    "more than blocks of tokens; use a model without, or no KV connector"
                )


def chunk_tokens(config: Config, kv: "KVCacheConfig") -> int:
    """Tokens in a chunk: what is configured, or the default rounded up to whole blocks."""
    blocks = math.lcm(*(group.kv_cache_spec.block_size for group in kv.kv_cache_groups))
    if config.chunk_size is None:
        return math.ceil(DEFAULT_CHUNK_TOKENS / blocks) * blocks
    if config.chunk_size % blocks:
        raise ConfigError(
            f"chunk_size = {config.chunk_size} is not a multiple of vLLM's block size {blocks}; "
            f"set it to {math.ceil(config.chunk_size / blocks) * blocks}"
        )
    return config.chunk_size


def describe(config: Config, vllm_config: "VllmConfig", kv: "KVCacheConfig") -> Geometry:
    """The geometry as a worker sees it: the model is loaded, so the backends are known."""
    groups = tuple(
        (
            group.kv_cache_spec.block_size,
            tuple(_layer_spec(group, layer).page_size_bytes for layer in group.layer_names),
        )
        for group in kv.kv_cache_groups
    )
    dtypes = {
        str(getattr(_layer_spec(group, layer), "dtype", "bytes")).removeprefix("torch.")
        for group in kv.kv_cache_groups
        for layer in group.layer_names
    }
    return Geometry(
        model=_model(config, vllm_config),
        dtype="+".join(sorted(dtypes)),
        chunk_tokens=chunk_tokens(config, kv),
        groups=groups,
        tags=tuple(sorted(_tags(vllm_config, kv).items())),
    )


def _model(config: Config, vllm_config: "VllmConfig") -> str:
    model = vllm_config.model_config
    name = config.model_name or model.model
    return f"{name}@{model.revision or 'main'}+{config.weight_version}"


def _tags(vllm_config: "VllmConfig", kv: "KVCacheConfig") -> dict[str, str]:
    """What else must be equal for a page of one side to mean the same on the other.

    A page is opaque: how K and V lie in it is the attention backend's affair, which may change
    with the release and, on CPUs, with the instruction set."""
    model = vllm_config.model_config
    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    names = [name for name in layer_names(kv) if name in layers]
    backends = sorted({layers[name].get_attn_backend().get_name() for name in names})
    tags = {
        "vllm": vllm.__version__,
        "attention backend": ",".join(backends) or "unknown",
        "cache layout": str(kv.kv_cache_layout),
        "cache dtype": str(vllm_config.cache_config.cache_dtype),
        "compute dtype": str(model.dtype).removeprefix("torch."),
        "quantization": str(model.quantization),
        # Same name, other content: a directory of that name, another --hf-overrides.
        "model config": _digest(model.hf_config),
    }
    if vllm_config.device_config.device_type == "cpu":
        tags["instruction set"] = torch.backends.cpu.get_cpu_capability()
    return tags


def _digest(hf_config: Any) -> str:
    content = {k: v for k, v in hf_config.to_dict().items() if k not in _VOLATILE}
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def memory_of(
    kv: "KVCacheConfig", caches: "Mapping[str, torch.Tensor]", device: str
) -> list[tuple[int, int, int]]:
    """For each flat layer: the address of block 0, the number of blocks, the stride in bytes.

    All of it has to be on `device`: "cpu", or "cuda:N"."""
    placed = {name: tensor for tensor in kv.kv_cache_tensors for name in tensor.layers}
    memory = []
    for group in kv.kv_cache_groups:
        for layer in group.layer_names:
            cache, size = caches[layer], _layer_spec(group, layer).page_size_bytes
            if str(cache.device) != device:
                raise ConfigError(
                    f"layer {layer} keeps its KV on {cache.device}, and the others of this rank "
                    f"on {device}: kvxfer moves the KV of one device; turn KV offloading off"
                )
            stride = placed[layer].block_stride
            storage = cache.untyped_storage()
            end = cache.data_ptr() + (kv.num_blocks - 1) * stride + size
            # Kernels may cut a block into several; these must lie side by side to be one write.
            pieces, rest = divmod(cache.shape[0], kv.num_blocks)
            piece = cache.stride(0) * cache.element_size()
            if (
                rest
                or pieces * piece != stride
                or (pieces > 1 and pieces * piece != size)
                or _span(cache[0]) * cache.element_size() * pieces > size
                or end > storage.data_ptr() + storage.nbytes()
            ):
                raise ConfigError(
                    f"layer {layer}: blocks of {size} bytes every {stride} bytes were announced, "
                    f"but the tensor is {tuple(cache.shape)} with strides {cache.stride()} of "
                    f"{cache.dtype}; this KV cache layout is not supported, set "
                    "VLLM_KV_CACHE_LAYOUT=LBNHC"
                )
            memory.append((cache.data_ptr(), kv.num_blocks, stride))
    return memory


def _span(block: "torch.Tensor") -> int:
    """Elements from a block's first to its last, both included."""
    span: int = 1 + sum((n - 1) * s for n, s in zip(block.shape, block.stride(), strict=True))
    return span
