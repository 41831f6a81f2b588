"""A stub of an OpenAI-compatible server of several adapters, and uvicorn in a thread for it and for the proxy."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

MODELS = ("base", "adapter-0", "adapter-1", "adapter-2")


def create_stub() -> tuple[Starlette, list[dict[str, Any]]]:
    """The application, and the requests that it gets: path, query, headers, and body."""
    received: list[dict[str, Any]] = []

    async def completions(request: Request) -> Response:
        body = await request.json()
        note = {"path": request.url.path, "query": request.url.query, "headers": dict(request.headers), "body": body}
        received.append(note)
        if body["model"] not in MODELS:
            return JSONResponse({"error": {"message": f"no model {body['model']}"}}, 404)
        await asyncio.sleep(body.get("seconds", 0))
        if body.get("stream"):
            return StreamingResponse(_events(body), media_type="text/event-stream")
        return JSONResponse({"model": body["model"], "prompt": body.get("prompt")}, headers={"x-upstream": "yes"})

    async def models(request: Request) -> Response:
        return JSONResponse({"data": [{"id": name} for name in MODELS]})

    paths = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings")
    routes = [Route(path, completions, methods=["POST"]) for path in paths]
    return Starlette(routes=[*routes, Route("/v1/models", models)]), received


async def _events(body: dict[str, Any]) -> AsyncIterator[str]:
    """Three events, of which the later ones come when they are due; it breaks off after `breaks_after`."""
    for number in range(3):
        if number == body.get("breaks_after"):
            raise RuntimeError("the stub breaks off")
        yield f"data: {json.dumps({'model': body['model'], 'number': number})}\n\n"
        await asyncio.sleep(body.get("pause", 0))
    yield "data: [DONE]\n\n"


@contextmanager
def serving(app: Starlette) -> Iterator[str]:
    """The address at which uvicorn serves an application on the loopback, in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server ended"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
