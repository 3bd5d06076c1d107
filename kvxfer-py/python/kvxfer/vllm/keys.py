"""A request's prompt as keys."""

from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys

from kvxfer import Keys, Keyspace

if TYPE_CHECKING:
    from vllm.v1.request import Request


def prompt_keys(space: Keyspace, chunk_tokens: int, request: "Request") -> Keys:
    """The keys of the prompt's chunks; the last chunk may be short. Generated tokens have none."""
    prompt = request.num_prompt_tokens
    tokens = np.asarray(request.all_token_ids[:prompt], dtype="<u4").tobytes()
    return space.chain(tokens, _extras(request, prompt, chunk_tokens))


def _extras(request: "Request", prompt: int, chunk_tokens: int) -> list[bytes] | None:
    """What determines the KV besides the tokens, by vLLM's own account: the adapter's name and
    path, the hashes of images, the cache salt, prompt embeddings. Not vLLM's block hashes
    themselves: their seed and algorithm differ between engines."""
    if not (
        request.lora_request
        or request.mm_features
        or request.cache_salt
        or request.prompt_embeds is not None
    ):
        return None
    extras, image = [], 0
    for start in range(0, prompt, chunk_tokens):
        end = min(start + chunk_tokens, prompt)
        found, image = generate_block_hash_extra_keys(request, start, end, image)
        extras.append(_encode(found))
    return extras


def _encode(value: Any) -> bytes:
    """Bytes that only an equal value gives: every part carries its type and its length."""
    if value is None:
        return b"n"
    if isinstance(value, tuple | list):
        body = b"".join(_encode(part) for part in value)
        return b"t%d:%s" % (len(value), body)
    if isinstance(value, bytes):
        return b"b%d:%s" % (len(value), value)
    if isinstance(value, int | str):
        kind = b"i" if isinstance(value, int) else b"s"
        text = str(value).encode("utf-8", "surrogatepass")
        return b"%s%d:%s" % (kind, len(text), text)
    # Better no match at all than a match by an address in memory.
    raise TypeError(f"vLLM put a {type(value).__name__} among the extra keys of a block")
