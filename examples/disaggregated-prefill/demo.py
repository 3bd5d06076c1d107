"""Disaggregated prefill on one machine without a GPU: two vLLM servers, a router, one prompt.

    make demo                    with the prompt below
    make demo PROMPT="…"         with yours
    make demo KEEP=1             leaves the servers up until Ctrl-C

The completion that came through prefill server, kvxfer and decode server is compared with the
one a single engine gives. Exits non-zero if they differ, or if any token or byte is missing.
"""

import argparse
import json
import os
import re
import shlex
import sys
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from servers import TREE, Server, ServerFailed, ended_afterwards, free_port, wait_for

HERE = Path(__file__).parent
REPORT = TREE / "target" / "reports" / "demo.json"
MODEL = "smollm2-135m"
# Not bfloat16, because the two completions are to be equal whatever the prompt. The decode server
# computes the last prompt token alone, and in bfloat16 vLLM's product of one row rounds otherwise
# than the same row among others: of 12 prompts, 6 went another way within 40 tokens. In float32
# none did.
DTYPE, DTYPE_BYTES = "float32", 4
BLOCK_TOKENS = 128
MAX_PROMPT = 4096
ANSWER_SECONDS = 600.0
SOURCES = ("external_kv_transfer", "local_compute", "local_cache_hit")

PROMPT = """\
A lighthouse is a simple machine with a hard task. It must be seen, from as far away as the curve \
of the earth allows, by people who are tired, wet and afraid, and it must never be mistaken for \
anything else. For most of history the light was a fire in an iron basket. It ate wood or coal by \
the ton, it went low exactly when the wind was worst, and from a few miles out nobody could tell \
it from a farmhouse, a lime kiln or another lighthouse.

Three inventions changed that. The first was the oil lamp with a hollow wick, which burned \
brightly and almost without smoke. The second was the lens that Augustin Fresnel designed in \
1822: rings of glass prisms around the lamp, each cut at its own angle, which bent the light that \
would have been lost to the sky and to the ground into one flat beam. A lamp that had been seen \
at eight miles was now seen at twenty. The third was clockwork. A weight, wound up by the keeper \
every few hours, turned the lens, so that the beam swept over the sea and each ship saw a flash. \
The number of seconds between the flashes became the name of the place.

The keepers lived by that clock. They trimmed the wick at midnight, wound the weight, wiped the \
salt from the glass, and wrote down the weather. The log books are still there, and they are \
mostly dull, which is what a good log book should be: wind from the west, light kept well. Now \
and then a line stands out. One keeper wrote that geese had flown into the lantern in a storm and \
broken nine panes, and that he and his daughter held blankets against the gap until morning so \
that the lamp would not go out.

Today the lamps are electric and the keepers are gone, and ships find their way by satellites.

The three inventions that changed the lighthouse were:

1."""


@dataclass
class Report:
    """What happened; the fields of target/reports/demo.json."""

    identical: bool
    prompt_tokens: int
    # As vLLM's own counter on the decode server has it.
    external_tokens: int
    # As the consumer counted while it copied pool pages into the engine's blocks.
    copied_bytes: int
    # What the KV of this prompt is, by the model's geometry.
    bytes: int
    path: str
    handover_ms: float
    completion: str
    reference: str

    def complaints(self) -> list[str]:
        """What is wrong, in words; nothing when the demo proved its point."""
        found = []
        if not self.identical:
            found.append("the two completions differ")
        # One token is recomputed anyway, so there is nothing to hand over for it alone.
        expected = self.prompt_tokens if self.prompt_tokens > 1 else 0
        if self.external_tokens != expected:
            found.append(
                f"decode took {self.external_tokens} of {expected} prompt tokens from kvxfer"
            )
        if self.copied_bytes != self.bytes:
            found.append(f"{self.copied_bytes:,} bytes were copied instead of {self.bytes:,}")
        return found


def say(text: str) -> None:
    print(f"\033[1m[{time.strftime('%H:%M:%S')}] {text}\033[0m", file=sys.stderr, flush=True)


def fetch(url: str, body: dict[str, Any] | None = None) -> bytes:
    """GET, or POST of a JSON body; an HTTP error becomes a message with its text."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
            content: bytes = answer.read()
            return content
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        raise RuntimeError(f"{url} answered {error.code}: {text}") from error


def prompt_tokens_by_source(decode: str) -> dict[str, int]:
    """vLLM's counters of where the decode server's prompt tokens came from."""
    text = fetch(f"{decode}/metrics").decode()
    found = re.findall(
        r'^vllm:prompt_tokens_by_source_total\{[^}]*source="(\w+)"[^}]*\} (\S+)$', text, re.M
    )
    counts = {source: int(float(value)) for source, value in found}
    return {source: counts.get(source, 0) for source in SOURCES}


def kv_bytes(model: Path, tokens: int) -> int:
    """Bytes of the KV blocks of so many tokens; blocks go whole."""
    config = json.loads((model / "config.json").read_text())
    heads = config["num_key_value_heads"]
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    per_token = config["num_hidden_layers"] * 2 * heads * head * DTYPE_BYTES
    blocks = -(-tokens // BLOCK_TOKENS) if tokens > 1 else 0
    return int(blocks * BLOCK_TOKENS * per_token)


def transfer_config(connector: str, role: str, port: int) -> str:
    """The `--kv-transfer-config` of the README."""
    return json.dumps(
        {
            "kv_connector": connector,
            "kv_role": role,
            "kv_connector_extra_config": {"peer_host": "127.0.0.1", "peer_port": port},
        }
    )


def engine_environment() -> dict[str, str]:
    lines = (TREE / "env" / "vllm-cpu.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if not line.startswith("#"))


def engine(name: str, role: str, model: Path, peer_port: int, connector: str) -> Server:
    """Starts one vLLM server; `connector` "none" is for a look at the demo without kvxfer."""
    port = free_port()
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model), "--served-model-name", MODEL),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", DTYPE, "--enforce-eager", "--block-size", str(BLOCK_TOKENS)),
        *("--max-model-len", str(MAX_PROMPT), "--max-num-batched-tokens", str(MAX_PROMPT)),
        *("--max-num-seqs", "8"),
        # The reference must be computed, not remembered from the request before it.
        "--no-enable-prefix-caching",
    ]
    if connector != "none":
        command += ["--kv-transfer-config", transfer_config(connector, role, peer_port)]
    cache = TREE / "target" / "cache"
    caches = {
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "VLLM_CONFIG_ROOT": str(cache / "vllm-config"),
        "XDG_CACHE_HOME": str(cache),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
    }
    return Server(name, f"http://127.0.0.1:{port}", command, engine_environment() | caches)


def retrieved(decode: Server) -> tuple[int, str, float]:
    """Bytes, path and milliseconds out of the decode server's "Retrieved …" lines."""
    lines = re.findall(
        r"Retrieved \d+ out of \d+ out of total \d+ tokens"
        r".*?\bpath (\S+), (\d+) bytes, ([\d.]+) ms",
        decode.text(),
    )
    if not lines:
        return 0, "none", 0.0
    path, _, milliseconds = lines[-1]
    return sum(int(size) for _, size, _ in lines), path, float(milliseconds)


def show(report: Report, router: str, counters: dict[str, int]) -> None:
    """The table people came for."""
    same = "yes" if report.identical else "NO"
    alone = report.prompt_tokens == 1
    remark = "(the only token is computed anyway)" if alone else "(not computed by decode)"
    rows = [
        ("completion, through kvxfer", report.completion.strip()),
        ("reference, single engine", report.reference.strip()),
        ("identical", same),
        ("prompt tokens", f"{report.prompt_tokens:,}"),
        ("external tokens", f"{report.external_tokens:,}  {remark}"),
        ("KV of the prompt", f"{report.bytes:,} bytes"),
        ("copied by the consumer", f"{report.copied_bytes:,} bytes"),
        ("path", report.path),
        ("hand-over", f"{report.handover_ms:.1f} ms"),
        *((f"vLLM: {source}", f"{counters[source]:,} tokens") for source in SOURCES),
    ]
    width = max(len(name) for name, _ in rows)
    print()
    for name, value in rows:
        first, *more = value.splitlines() or [""]
        print(f"  {name:{width}}  {first}")
        for line in more:
            print(f"  {'':{width}}  {line}")
    print(f"\n  report: {REPORT.relative_to(TREE)}    router: {router}")


def compare(body: dict[str, Any], model: Path, prefill: Server, decode: Server, router: str) -> int:
    """One request through the router, the same to the single engine, and the verdict."""
    say("the prompt goes to the router, as this would send it:")
    shown = body | {"prompt": body["prompt"] if len(body["prompt"]) < 60 else "Your prompt here"}
    print(
        f"    curl {router}/v1/completions -H 'Content-Type: application/json' \\\n"
        f"        -d {shlex.quote(json.dumps(shown, ensure_ascii=False))}",
        file=sys.stderr,
    )
    before = prompt_tokens_by_source(decode.url)
    began = time.monotonic()
    through = json.loads(fetch(f"{router}/v1/completions", body))
    if "choices" not in through:
        raise RuntimeError(f"the decode server refused: {json.dumps(through)}")
    say(f"answered after {time.monotonic() - began:.1f} s; now the single engine, for comparison")
    after = prompt_tokens_by_source(decode.url)
    counters = {source: after[source] - before[source] for source in SOURCES}
    single = json.loads(fetch(f"{prefill.url}/v1/completions", body))

    completion, reference = through["choices"][0]["text"], single["choices"][0]["text"]
    tokens = through["usage"]["prompt_tokens"]
    copied, path, milliseconds = retrieved(decode)
    report = Report(
        identical=completion == reference,
        prompt_tokens=tokens,
        external_tokens=counters["external_kv_transfer"],
        copied_bytes=copied,
        bytes=kv_bytes(model, tokens),
        path=path,
        handover_ms=milliseconds,
        completion=completion,
        reference=reference,
    )
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n")
    show(report, router, counters)
    complaints = report.complaints()
    for complaint in complaints:
        print(f"  FAILED: {complaint}")
    if complaints:
        print(f"  The logs: {prefill.log.relative_to(TREE)}, {decode.log.relative_to(TREE)}")
    return 1 if complaints else 0


def run(options: argparse.Namespace) -> int:
    # env/install left the place of the environment, and with it of the model, beside us.
    model = Path(sys.prefix, "made-from").read_text().strip() + f"/{MODEL}"
    body = {
        "model": MODEL,
        "prompt": options.prompt,
        "max_tokens": options.max_tokens,
        "temperature": 0,
    }
    with ended_afterwards() as servers:
        say(f"starting a prefill server and a decode server (vLLM, SmolLM2-135M, {DTYPE})")
        peer_port = free_port()
        for name, role in (("prefill", "kv_producer"), ("decode", "kv_consumer")):
            servers.append(engine(name, role, Path(model), peer_port, options.connector))
        prefill, decode = servers
        wait_for(servers)
        port = str(free_port())
        url = f"http://127.0.0.1:{port}"
        command = [sys.executable, str(HERE / "router.py"), "--port", port]
        command += ["--prefill", prefill.url, "--decode", decode.url]
        router = Server("router", url, command, {})
        servers.append(router)
        wait_for([router])
        code = compare(body, Path(model), prefill, decode, url)
        if options.keep:
            say(f"the servers stay up at {url}; Ctrl-C ends them")
            while all(server.healthy() for server in servers):
                time.sleep(5)
        return code


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # The Makefile hands over its variables in the environment; an empty one was not given.
    environment = os.environ
    parser.add_argument("--prompt", default=environment.get("PROMPT") or PROMPT)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--keep", action="store_true", default=bool(environment.get("KEEP")))
    parser.add_argument("--connector", default="KvxferConnector", help="or none, to see it fail")
    return parser.parse_args()


def main() -> int:
    try:
        return run(arguments())
    except (ServerFailed, RuntimeError, OSError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the servers are gone", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
