"""A small router for disaggregated prefill: prefill first, then decode, nothing in between.

It sends exactly the requests of production-stack's `--routing-logic disaggregated_prefill`:

1. the prefill server gets the client's body with `max_tokens: 1` and `stream: false` (and
   without what contradicts them); its answer is read whole and thrown away;
2. the decode server gets the client's body as it came; its bytes are streamed back.

No word about the KV cache passes through here. The decode engine finds it by the content of
the prompt, because kvxfer pushed it there while the prefill server was computing it.
"""

import argparse
import asyncio
import logging
import os
import time
import uuid
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import web

log = logging.getLogger("router")

ENDPOINTS = ("/v1/completions", "/v1/chat/completions")
# They contradict `max_tokens: 1` or `stream: false`, so the prefill server would refuse them.
DROPPED_FOR_PREFILL = ("max_completion_tokens", "min_tokens", "stream_options")
CONNECT_SECONDS = 5.0
PREFILL_SECONDS = 300.0
# Between two pieces of an answer, not for the whole of it.
DECODE_SILENCE_SECONDS = 600.0
LARGEST_BODY = 64 << 20


@dataclass(frozen=True)
class Server:
    """One engine's HTTP server, and what to call it in messages."""

    name: str
    url: str


class Unreachable(Exception):
    """A server did not answer at all."""

    def __init__(self, server: Server, error: Exception) -> None:
        reason = str(error) or type(error).__name__
        super().__init__(f"the {server.name} server at {server.url} is unreachable: {reason}")


def prefill_body(body: dict[str, Any]) -> dict[str, Any]:
    """What the prefill server is asked: the same prompt, one token."""
    kept = {key: value for key, value in body.items() if key not in DROPPED_FOR_PREFILL}
    return kept | {"max_tokens": 1, "stream": False}


def forwarded_headers(request_id: str) -> dict[str, str]:
    """The headers of both requests. The client's own Authorization goes no further."""
    # "Bearer None" without a key is what production-stack sends, and engines ignore it.
    return {
        "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY')}",
        "X-Request-ID": request_id,
    }


class Router:
    """Forwards requests; one `aiohttp` session for both servers."""

    def __init__(self, prefill: Server, decode: Server) -> None:
        self.prefill = prefill
        self.decode = decode
        self._session: aiohttp.ClientSession | None = None

    @property
    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("the router was not started")
        return self._session

    async def run(self, _app: web.Application) -> Any:
        """Holds the client session as long as the application runs."""
        # As many connections as requests: a limit here would be a queue nobody sees.
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            self._session = session
            yield
        self._session = None

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """One request: prefill, then decode."""
        started = time.monotonic()
        request_id = request.headers.get("X-Request-ID") or str(uuid.uuid4())
        try:
            body = await request.json()
        except ValueError as error:
            return failure(400, "invalid_request_error", f"the body is not JSON: {error}")
        if not isinstance(body, dict):
            return failure(400, "invalid_request_error", "the body must be a JSON object")
        try:
            refusal = await self._prefill(request.path, body, request_id)
            if refusal is not None:
                log.warning("%s: prefill answered %d", request_id, refusal.status)
                return refusal
            prefilled = time.monotonic()
            response, sent = await self._decode(request, body, request_id)
        except Unreachable as error:
            log.error("%s: %s", request_id, error)
            return failure(503, "engine_unreachable", str(error))
        done = time.monotonic()
        log.info(
            "%s %s: %d, prefill %.0f ms, decode %.0f ms, %d bytes",
            request_id,
            request.path,
            response.status,
            (prefilled - started) * 1000,
            (done - prefilled) * 1000,
            sent,
        )
        return response

    async def _prefill(
        self, path: str, body: dict[str, Any], request_id: str
    ) -> web.Response | None:
        """Runs the prompt on the prefill server; an answer only if that failed."""
        timeout = aiohttp.ClientTimeout(total=PREFILL_SECONDS, sock_connect=CONNECT_SECONDS)
        try:
            async with self.session.post(
                self.prefill.url + path,
                json=prefill_body(body),
                headers=forwarded_headers(request_id),
                timeout=timeout,
            ) as answer:
                text = await answer.text()
                status = answer.status
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Unreachable(self.prefill, error) from error
        if status < 400:
            return None
        return failure(status, "prefiller_error", text)

    async def _decode(
        self, request: web.Request, body: dict[str, Any], request_id: str
    ) -> tuple[web.StreamResponse, int]:
        """Streams the decode server's answer back; how many bytes went."""
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_SECONDS, sock_read=DECODE_SILENCE_SECONDS
        )
        response: web.StreamResponse | None = None
        sent = 0
        try:
            async with self.session.post(
                self.decode.url + request.path,
                json=body,
                headers=forwarded_headers(request_id),
                timeout=timeout,
            ) as answer:
                response = web.StreamResponse(status=answer.status)
                response.content_type = answer.content_type
                response.headers["X-Request-ID"] = request_id
                await response.prepare(request)
                async for piece in answer.content.iter_any():
                    await response.write(piece)
                    sent += len(piece)
        except (aiohttp.ClientError, TimeoutError) as error:
            if response is None or not response.prepared:
                raise Unreachable(self.decode, error) from error
            # The status is long gone: cutting the connection is the only honest signal left.
            log.error("%s: the decode server broke off: %s", request_id, error)
            if request.transport is not None:
                request.transport.abort()
            return response, sent
        await response.write_eof()
        return response, sent

    async def models(self, _request: web.Request) -> web.Response:
        """The decode server's list of models; both serve the same."""
        timeout = aiohttp.ClientTimeout(total=CONNECT_SECONDS)
        try:
            async with self.session.get(f"{self.decode.url}/v1/models", timeout=timeout) as answer:
                return web.Response(
                    status=answer.status,
                    body=await answer.read(),
                    content_type=answer.content_type,
                )
        except (aiohttp.ClientError, TimeoutError) as error:
            return failure(503, "engine_unreachable", str(Unreachable(self.decode, error)))

    async def health(self, _request: web.Request) -> web.Response:
        """200 when both servers are healthy, else 503 that says which is not."""
        states = await asyncio.gather(self._state(self.prefill), self._state(self.decode))
        healthy = all(state == "ok" for state in states)
        answer = {"status": "ok" if healthy else "unhealthy"}
        answer |= {self.prefill.name: states[0], self.decode.name: states[1]}
        return web.json_response(answer, status=200 if healthy else 503)

    async def _state(self, server: Server) -> str:
        timeout = aiohttp.ClientTimeout(total=CONNECT_SECONDS)
        try:
            async with self.session.get(f"{server.url}/health", timeout=timeout) as answer:
                return "ok" if answer.status == 200 else f"/health answered {answer.status}"
        except (aiohttp.ClientError, TimeoutError) as error:
            return str(Unreachable(server, error))

    async def report(self, _app: web.Application) -> None:
        """Says at start which servers answer. A late one is no error: requests will tell."""
        for server in (self.prefill, self.decode):
            state = await self._state(server)
            if state == "ok":
                log.info("%s server at %s: ok", server.name, server.url)
            else:
                log.warning("%s; start it, the router need not be restarted", state)


def failure(status: int, kind: str, message: str) -> web.Response:
    """An error in the shape of the OpenAI API."""
    return web.json_response({"error": {"type": kind, "message": message}}, status=status)


async def elsewhere(request: web.Request) -> web.Response:
    known = ", ".join((*ENDPOINTS, "/v1/models", "/health"))
    return failure(404, "not_found", f"{request.path}: this router serves {known}")


def application(prefill_url: str, decode_url: str) -> web.Application:
    """The router as an aiohttp application."""
    router = Router(
        Server("prefill", prefill_url.rstrip("/")),
        Server("decode", decode_url.rstrip("/")),
    )
    app = web.Application(client_max_size=LARGEST_BODY)
    app.cleanup_ctx.append(router.run)
    app.on_startup.append(router.report)
    for endpoint in ENDPOINTS:
        app.router.add_post(endpoint, router.serve)
    app.router.add_get("/v1/models", router.models)
    app.router.add_get("/health", router.health)
    app.router.add_route("*", "/{path:.*}", elsewhere)
    return app


def server_url(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a URL; write http://HOST:PORT")
    return text


def arguments() -> argparse.Namespace:
    summary, details = (__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--prefill", required=True, type=server_url, metavar="URL")
    parser.add_argument("--decode", required=True, type=server_url, metavar="URL")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (%(default)s)")
    return parser.parse_args()


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    given = arguments()
    log.info("listening on http://%s:%d", given.host, given.port)
    # A client that hangs up must stop the engines' work as well.
    web.run_app(
        application(given.prefill, given.decode),
        host=given.host,
        port=given.port,
        print=None,
        access_log=None,
        handler_cancellation=True,
    )


if __name__ == "__main__":
    main()
