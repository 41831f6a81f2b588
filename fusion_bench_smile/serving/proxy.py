"""A proxy that names the adapter of requests to an OpenAI-compatible server of several LoRA adapters.

The request's ``model`` is replaced where it is the proxy's own name, and everything else is forwarded as it is, in both
directions: other models, other paths, streams, errors.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route as HttpRoute

from ..exceptions import ConfigError
from .request_router import RequestRouter, Route

log = logging.getLogger(__name__)

# headers of one connection (RFC 9110, section 7.6.1), and those that httpx sets anew
NOT_FORWARDED = {
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding",
    "upgrade", "host", "content-length",
}  # fmt: skip
EXPERT_HEADER, CONFIDENCE_HEADER = "x-smile-expert", "x-smile-confidence"


@dataclass(frozen=True)
class ProxySettings:
    """The names of models at the server.

    Attributes:
        server: Address of the server, such as ``http://127.0.0.1:8000``.
        base_model: The name of the pretrained model there, for requests that no expert serves.
        model_name: The name of the model for which the proxy chooses.
        adapter_format: The name of an expert's adapter, with ``{expert}`` and ``{base}`` (SGLang: ``{base}:{expert}``).
        timeout: Seconds without a byte from the server, after which a request fails.
    """

    server: str
    base_model: str
    model_name: str = "auto"
    adapter_format: str = "{expert}"
    timeout: float = 600.0

    def served_model(self, route: Route) -> str:
        """The name of the model at the server that serves a request."""
        if route.expert is None:
            return self.base_model
        return self.adapter_format.format(expert=route.expert, base=self.base_model)


class BadRequestError(Exception):
    """A request whose expert can't be chosen; the message says why."""


def create_app(router: RequestRouter, settings: ProxySettings) -> Starlette:
    """The proxy as an ASGI application, for any server of these.

    Args:
        router: It chooses for one request at a time, in a thread.
        settings: The server and the names of models there.

    Raises:
        ConfigError: The router chooses by images, which the requests of such a server do not have.
    """
    if router.input_name != "input_ids":
        raise ConfigError("the proxy chooses by texts, and this router by images: call RequestRouter.route with them")

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
        timeout = httpx.Timeout(settings.timeout, connect=min(10.0, settings.timeout), pool=None)
        async with httpx.AsyncClient(base_url=settings.server, timeout=timeout, limits=limits) as client:
            app.state.proxy = Proxy(router, settings, client)
            yield

    async def handle(request: Request) -> Response:
        proxy: Proxy = request.app.state.proxy
        return await proxy.handle(request)

    methods = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
    return Starlette(routes=[HttpRoute("/{path:path}", handle, methods=methods)], lifespan=lifespan)


class Proxy:
    """The handler of requests, with its connections to the server."""

    def __init__(self, router: RequestRouter, settings: ProxySettings, client: httpx.AsyncClient) -> None:
        self.router, self.settings, self.client = router, settings, client
        self._one_at_a_time = anyio.CapacityLimiter(1)  # the model already uses all cores

    async def handle(self, request: Request) -> Response:
        """The server's response to a request, after its expert was chosen where it asks for one."""
        try:
            content, headers = await self._routed(request, await request.body())
        except BadRequestError as error:
            return _error(400, str(error))
        try:
            return await self._forward(request, content, headers)
        except httpx.TimeoutException:
            return _error(504, f"{self.settings.server} did not answer in {self.settings.timeout:g} seconds")
        except httpx.TransportError as error:
            return _error(502, f"{self.settings.server} can't be reached: {error or type(error).__name__}")

    async def _routed(self, request: Request, body: bytes) -> tuple[bytes, dict[str, str]]:
        """The body for the server, and headers of the response that name the expert."""
        values = _json_object(body) if request.method == "POST" else None
        if values is None or values.get("model") != self.settings.model_name:
            return body, {}
        text = self._text(values)
        (route,) = await anyio.to_thread.run_sync(self.router.route, [text], limiter=self._one_at_a_time)
        values["model"] = self.settings.served_model(route)
        log.info("%s: %s (%.2f)", request.url.path, values["model"], route.confidence)
        headers = {CONFIDENCE_HEADER: f"{route.confidence:.3f}"}
        return json.dumps(values).encode(), headers if route.expert is None else {
            EXPERT_HEADER: route.expert,
            **headers,
        }

    def _text(self, values: Mapping[str, Any]) -> str:
        """The text that the expert of a request is chosen by: its messages, prompt or input."""
        messages = values.get("messages")
        if isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages):
            text = self.router.text_of(messages)
        else:
            given = values.get("prompt", values.get("input"))
            text = given[0] if isinstance(given, list) and len(given) == 1 else given
        if not isinstance(text, str) or not text.strip():
            raise BadRequestError(
                f"model={self.settings.model_name} chooses an expert by the text of messages, prompt or input, and "
                "this request has no such text, or several: send one text, or name a model"
            )
        return text

    async def _forward(self, request: Request, content: bytes, headers: Mapping[str, str]) -> Response:
        """The server's response, whose body is passed on as it comes."""
        sent = [(name, value) for name, value in request.headers.items() if name not in NOT_FORWARDED]
        url = httpx.URL(path=request.url.path, query=request.url.query.encode())
        outgoing = self.client.build_request(request.method, url, headers=sent, content=content)
        answer = await self.client.send(outgoing, stream=True)
        received = {name: value for name, value in answer.headers.items() if name not in NOT_FORWARDED}
        return StreamingResponse(_body(answer), answer.status_code, {**received, **headers})


async def _body(answer: httpx.Response) -> AsyncIterator[bytes]:
    """The bytes of a response, which is closed also if the client leaves."""
    try:
        async for chunk in answer.aiter_raw():
            yield chunk
    finally:
        with anyio.CancelScope(shield=True):
            await answer.aclose()


def _json_object(body: bytes) -> dict[str, Any] | None:
    """A body that is a JSON object; None for others, which the server may understand."""
    try:
        values = json.loads(body)
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def _error(status: int, message: str) -> JSONResponse:
    """An error in the form of OpenAI's interface."""
    return JSONResponse({"error": {"message": message, "type": "smile_route_error", "code": status}}, status)
