"""A prompt's KV from one engine to another, both in this process.

In real life the two halves are two processes, on one host, with the same code: the path is then
`shm`. Run it with the Python that kvxfer is installed in.
"""

import ctypes
from array import array

import kvxfer

LAYERS, BLOCKS, BLOCK_BYTES = 4, 128, 16 << 10


class Cache:
    """One engine's KV cache: for each layer, blocks of 16 tokens."""

    def __init__(self, fill: int) -> None:
        size = BLOCKS * BLOCK_BYTES
        self.layers = [(ctypes.c_uint8 * size)(*[fill] * size) for _ in range(LAYERS)]
        self.memory = [(ctypes.addressof(layer), BLOCKS, BLOCK_BYTES) for layer in self.layers]

    def block(self, layer: int, block: int) -> memoryview:
        return memoryview(self.layers[layer]).cast("B")[block * BLOCK_BYTES :][:BLOCK_BYTES]


computed, empty = Cache(1), Cache(0)
# Anything but in order: an engine's free blocks are scattered.
source = [block * 37 % 128 for block in range(63)]
target = [block * 51 % 128 for block in range(63)]
for layer in range(LAYERS):
    for at, block in enumerate(source):
        computed.block(layer, block)[:] = bytes([100 + at]) * BLOCK_BYTES

# README: from here on.
layout = kvxfer.Layout(
    model="my-model", dtype="bfloat16", chunk_tokens=256, groups=[(16, [BLOCK_BYTES] * LAYERS)]
)
prompt = array("I", range(1000))
keys = kvxfer.Keyspace(layout).chain(prompt.tobytes())

# The decode engine. It owns the memory that prompts arrive in.
decode = kvxfer.Agent(role="consumer", layout=layout)
decode.register(empty.memory)
decode_scheduler = kvxfer.Observer([decode.address], "decode")

# The prefill engine. It offers a prompt as soon as it arrives, then pushes what it computes.
prefill = kvxfer.Agent(role="producer", layout=layout, peers=[decode.address])
prefill.register(computed.memory)
prefill_scheduler = kvxfer.Observer([prefill.address], "prefill")
assert prefill.wait_connected(10), "no decode engine"
offer = prefill_scheduler.offer("request 1", keys)
prefill.begin_step([(offer, 0, [array("I", source).tobytes()])])
# The forward pass: after each layer `prefill.layer_ready(layer)`, to send it meanwhile.
prefill.end_step()

# The decode engine again: what of this prompt is here, or on its way? Into its own blocks with it.
claim = decode_scheduler.claim("request 1", keys, timeout=10)
status = decode_scheduler.settled(claim, 10)
assert status, "no answer in time"
decode.load(1, claim, 0, status[0], [array("I", target).tobytes()])
assert decode.wait(10), "not loaded in time"
[loaded] = decode.poll()
# README: to here.

for part in (prefill_scheduler, decode_scheduler, prefill, decode):
    part.close()
assert loaded.error is None, loaded.error
for layer in range(LAYERS):
    for at, block in enumerate(target):
        assert empty.block(layer, block) == bytes([100 + at]) * BLOCK_BYTES, f"block {block}"
ms = loaded.seconds * 1e3
print(f"{loaded.tokens} tokens, {loaded.bytes} bytes by {loaded.path} in {ms:.2f} ms")
