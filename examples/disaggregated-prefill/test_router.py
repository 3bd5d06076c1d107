"""The router between two fake engines that remember every request.

The expected requests were recorded from production-stack's `disaggregated_prefill`
(commit a6c01db0): four client requests and what reached each engine.
"""

import asyncio
import json
import os
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

sys.path.insert(0, str(Path(__file__).parent))
import router

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
PROMPT = {"model": "m", "prompt": "Your prompt here"}

# (path, client's headers, client's body, body at the prefill server)
RECORDED = [
    (
        COMPLETIONS,
        {},
        PROMPT | {"max_tokens": 4},
        PROMPT | {"max_tokens": 1, "stream": False},
    ),
    (
        COMPLETIONS,
        {},
        PROMPT | {"max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}},
        PROMPT | {"max_tokens": 1, "stream": False},
    ),
    (
        CHAT,
        {"X-Request-Id": "my-req-77", "Authorization": "Bearer user-key"},
        {"model": "m", "messages": HI, "max_completion_tokens": 6, "min_tokens": 2},
        {"model": "m", "messages": HI, "max_tokens": 1, "stream": False},
    ),
    (
        CHAT,
        {},
        {"model": "m", "messages": HI, "max_tokens": 3, "stream": True},
        {"model": "m", "messages": HI, "max_tokens": 1, "stream": False},
    ),
]


@dataclass
class Seen:
    engine: str
    path: str
    headers: dict[str, str]
    raw: bytes

    @property
    def body(self) -> Any:
        return json.loads(self.raw)


@dataclass
class FakeEngine:
    """Answers like an engine and notes what it was asked."""

    name: str
    seen: list[Seen]
    status: int = 200
    # Set by a test that wants to see the stream arrive piece by piece.
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        self.seen.append(Seen(self.name, request.path, dict(request.headers), raw))
        if self.status != 200:
            return web.Response(status=self.status, text=f"{self.name} says no")
        if not json.loads(raw).get("stream"):
            return web.json_response({"answer of": self.name})
        response = web.StreamResponse()
        response.content_type = "text/event-stream"
        await response.prepare(request)
        await response.write(b"data: first\n\n")
        await self.go_on.wait()
        await response.write(b"data: [DONE]\n\n")
        return response

    async def models(self, _request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": self.name}]})

    async def health(self, _request: web.Request) -> web.Response:
        return web.Response(status=self.status)

    def server(self) -> TestServer:
        app = web.Application()
        app.router.add_post(COMPLETIONS, self.complete)
        app.router.add_post(CHAT, self.complete)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/health", self.health)
        return TestServer(app)


@dataclass
class Fleet:
    """Two fake engines, the router, and a client."""

    seen: list[Seen]
    prefill: FakeEngine
    decode: FakeEngine
    prefill_server: TestServer
    decode_server: TestServer
    url: str
    client: ClientSession


def with_fleet(test: Callable[[Fleet], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        seen: list[Seen] = []
        prefill, decode = FakeEngine("prefill", seen), FakeEngine("decode", seen)
        decode.go_on.set()
        prefill_server, decode_server = prefill.server(), decode.server()
        async with (
            prefill_server,
            decode_server,
            TestServer(
                router.application(
                    str(prefill_server.make_url("")), str(decode_server.make_url(""))
                )
            ) as ours,
            ClientSession() as client,
        ):
            url = str(ours.make_url("")).rstrip("/")
            await test(Fleet(seen, prefill, decode, prefill_server, decode_server, url, client))

    asyncio.run(asyncio.wait_for(run(), timeout=20))


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.mark.parametrize("path, headers, body, at_prefill", RECORDED)
def test_engines_get_the_recorded_requests(
    path: str, headers: dict[str, str], body: dict[str, Any], at_prefill: dict[str, Any]
) -> None:
    async def test(fleet: Fleet) -> None:
        async with fleet.client.post(fleet.url + path, json=body, headers=headers) as answer:
            assert answer.status == 200
            text = await answer.text()
        first, second = fleet.seen
        assert (first.engine, first.path) == ("prefill", path)
        assert (second.engine, second.path) == ("decode", path)
        # Byte for byte, the order of the keys included.
        assert first.raw == json.dumps(at_prefill).encode()
        assert second.raw == json.dumps(body).encode()
        for request in fleet.seen:
            assert request.headers["Authorization"] == "Bearer None"
            assert request.headers["Content-Type"] == "application/json"
            assert set(request.headers) == {
                "Host",
                "Authorization",
                "X-Request-ID",
                "Accept",
                "Accept-Encoding",
                "User-Agent",
                "Content-Length",
                "Content-Type",
            }
        ids = {request.headers["X-Request-ID"] for request in fleet.seen}
        assert len(ids) == 1
        if "X-Request-Id" in headers:
            assert ids == {headers["X-Request-Id"]}
        else:
            assert len(ids.pop()) == 36, "a uuid4"
        # The prefill server's answer is thrown away.
        assert "prefill" not in text
        assert text.endswith("data: [DONE]\n\n") if body.get("stream") else "decode" in text

    with_fleet(test)


def test_the_routers_own_key_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "operators-key")

    async def test(fleet: Fleet) -> None:
        client_key = {"Authorization": "Bearer user-key"}
        async with fleet.client.post(
            fleet.url + COMPLETIONS, json=PROMPT, headers=client_key
        ) as answer:
            assert answer.status == 200
        assert [s.headers["Authorization"] for s in fleet.seen] == ["Bearer operators-key"] * 2

    with_fleet(test)


def test_a_stream_arrives_before_it_ends() -> None:
    async def test(fleet: Fleet) -> None:
        fleet.decode.go_on.clear()
        body = PROMPT | {"stream": True}
        async with fleet.client.post(fleet.url + COMPLETIONS, json=body) as answer:
            assert answer.content_type == "text/event-stream"
            assert await answer.content.readuntil(b"\n\n") == b"data: first\n\n"
            fleet.decode.go_on.set()
            assert await answer.content.readuntil(b"\n\n") == b"data: [DONE]\n\n"

    with_fleet(test)


@pytest.mark.parametrize("dead", ["prefill", "decode"])
def test_an_unreachable_server_is_named(dead: str) -> None:
    async def test(fleet: Fleet) -> None:
        server = fleet.prefill_server if dead == "prefill" else fleet.decode_server
        address = str(server.make_url("")).rstrip("/")
        await server.close()
        async with fleet.client.post(fleet.url + COMPLETIONS, json=PROMPT) as answer:
            assert answer.status == 503
            error = (await answer.json())["error"]
        assert error["type"] == "engine_unreachable"
        assert f"the {dead} server at {address} is unreachable" in error["message"]
        # Prefill comes first: without it, decode is not asked.
        assert [s.engine for s in fleet.seen] == ([] if dead == "prefill" else ["prefill"])

        async with fleet.client.get(f"{fleet.url}/health") as answer:
            assert answer.status == 503
            states = await answer.json()
        assert states.pop("status") == "unhealthy"
        assert "unreachable" in states.pop(dead)
        assert list(states.values()) == ["ok"]

    with_fleet(test)


def test_an_error_of_prefill_ends_the_request() -> None:
    async def test(fleet: Fleet) -> None:
        fleet.prefill.status = 400
        async with fleet.client.post(fleet.url + COMPLETIONS, json=PROMPT) as answer:
            assert answer.status == 400
            error = (await answer.json())["error"]
        assert error == {"type": "prefiller_error", "message": "prefill says no"}
        assert [s.engine for s in fleet.seen] == ["prefill"]

    with_fleet(test)


def test_an_error_of_decode_is_passed_on() -> None:
    async def test(fleet: Fleet) -> None:
        fleet.decode.status = 500
        async with fleet.client.post(fleet.url + COMPLETIONS, json=PROMPT) as answer:
            assert answer.status == 500
            assert await answer.text() == "decode says no"

    with_fleet(test)


@pytest.mark.parametrize("raw", [b"no json", b"[1]", b"\xff"])
def test_a_body_that_is_no_object_reaches_no_engine(raw: bytes) -> None:
    async def test(fleet: Fleet) -> None:
        async with fleet.client.post(fleet.url + COMPLETIONS, data=raw) as answer:
            assert answer.status == 400
            assert (await answer.json())["error"]["type"] == "invalid_request_error"
        assert not fleet.seen

    with_fleet(test)


def test_models_health_and_unknown_paths() -> None:
    async def test(fleet: Fleet) -> None:
        async with fleet.client.get(f"{fleet.url}/v1/models") as answer:
            assert await answer.json() == {"data": [{"id": "decode"}]}
        async with fleet.client.get(f"{fleet.url}/health") as answer:
            assert answer.status == 200
            assert await answer.json() == {
                "status": "ok",
                "prefill": "ok",
                "decode": "ok",
            }
        async with fleet.client.post(f"{fleet.url}/v1/embeddings", json=PROMPT) as answer:
            assert answer.status == 404
            assert "/v1/chat/completions" in (await answer.json())["error"]["message"]
        assert not fleet.seen

    with_fleet(test)


def test_help_explains_itself() -> None:
    async def run() -> tuple[int | None, str]:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            router.__file__,
            "--help",
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {"COLUMNS": "100"},
        )
        output, _ = await asyncio.wait_for(process.communicate(), timeout=20)
        return process.returncode, output.decode()

    code, text = asyncio.run(run())
    assert code == 0
    assert "--prefill URL" in text and "thrown away" in text
