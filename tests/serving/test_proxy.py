"""The proxy between a client and a server of adapters, all on the loopback."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from socket import socket
from types import SimpleNamespace

import httpx
import pytest
from conftest import clip_tower
from stub_server import MODELS, create_stub, serving
from text_models import TEXTS, llama, tokenizer, upscaled
from transformers import CLIPImageProcessor

from fusion_bench_smile import ConfigError, RequestRouter
from fusion_bench_smile.serving import ProxySettings, create_app
from fusion_bench_smile.serving.command import main

FORMAT = "adapter-{expert}"


@pytest.fixture(scope="module")
def router() -> RequestRouter:
    return RequestRouter(upscaled(llama()), tokenizer())


@pytest.fixture
def proxy(router: RequestRouter) -> Iterator[SimpleNamespace]:
    """A client of the proxy, and the requests that the stub got."""
    stub, received = create_stub()
    with serving(stub) as server:
        app = create_app(router, ProxySettings(server, "base", adapter_format=FORMAT, timeout=1.0))
        with serving(app) as address, httpx.Client(base_url=address, timeout=20) as client:
            yield SimpleNamespace(client=client, received=received, address=address)


def expected(router: RequestRouter, text: str) -> str:
    (route,) = router.route([text])
    return FORMAT.format(expert=route.expert)


@pytest.mark.parametrize(
    ("path", "make"),
    [
        ("completions", lambda text: {"prompt": text, "temperature": 0.5}),
        ("completions", lambda text: {"prompt": [text]}),
        ("embeddings", lambda text: {"input": text}),
        ("chat/completions", lambda text: {"messages": [{"role": "user", "content": text}], "n": 2}),
    ],
)
def test_the_model_of_a_request_becomes_its_adapter_and_nothing_else_changes(proxy, router, path, make) -> None:
    for text in TEXTS:
        body = {"model": "auto", **make(text)}
        answer = proxy.client.post(f"/v1/{path}?key=a%20b", json=body, headers={"authorization": "Bearer secret"})
        name = expected(router, text)
        assert answer.json()["model"] == name
        assert FORMAT.format(expert=answer.headers["x-smile-expert"]) == name
        assert float(answer.headers["x-smile-confidence"]) == pytest.approx(
            router.route([text])[0].confidence, abs=1e-3
        )
        assert answer.headers["x-upstream"] == "yes"
        got = proxy.received.pop()
        assert got["body"] == {**body, "model": name}
        assert (got["path"], got["query"]) == (f"/v1/{path}", "key=a%20b")
        assert got["headers"]["authorization"] == "Bearer secret"


def test_texts_have_several_experts(router: RequestRouter) -> None:
    assert len({expected(router, text) for text in TEXTS}) > 1


def test_other_requests_pass_unchanged(proxy) -> None:
    for model in MODELS:
        assert proxy.client.post("/v1/completions", json={"model": model, "prompt": "a"}).json()["model"] == model
        assert proxy.received.pop()["body"]["model"] == model
    answer = proxy.client.post("/v1/completions", json={"model": "none", "prompt": "a"})
    assert (answer.status_code, answer.json()) == (404, {"error": {"message": "no model none"}})
    assert "x-smile-expert" not in answer.headers
    assert [model["id"] for model in proxy.client.get("/v1/models").json()["data"]] == list(MODELS)
    assert proxy.client.get("/v1/nowhere").status_code == 404


def test_streams_arrive_as_they_are_sent(proxy, router: RequestRouter) -> None:
    body = {"model": "auto", "prompt": TEXTS[0], "stream": True, "pause": 0.3}
    times, events = [], []
    with proxy.client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line:
                times.append(time.perf_counter())
                events.append(line.removeprefix("data: "))
    assert events[-1] == "[DONE]"
    name = expected(router, TEXTS[0])
    assert [json.loads(event) for event in events[:-1]] == [{"model": name, "number": n} for n in range(3)]
    assert times[-1] - times[0] > 0.5  # a collected stream would arrive at once


def test_a_stream_that_breaks_off_breaks_off(proxy) -> None:
    body = {"model": "auto", "prompt": TEXTS[0], "stream": True, "breaks_after": 1}
    with pytest.raises(httpx.RemoteProtocolError), proxy.client.stream("POST", "/v1/completions", json=body) as answer:
        list(answer.iter_lines())
    assert proxy.client.get("/v1/models").status_code == 200  # the proxy goes on


def test_many_requests_at_once_get_their_own_answers(proxy, router: RequestRouter) -> None:
    texts = [TEXTS[index % len(TEXTS)] for index in range(40)]

    def ask(text: str) -> tuple[str, str]:
        body = {"model": "auto", "prompt": text, "seconds": 0.05}
        values = httpx.post(f"{proxy.address}/v1/completions", json=body, timeout=30).json()
        return values["model"], values["prompt"]

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, texts))
    assert answers == [(expected(router, text), text) for text in texts]


@pytest.mark.parametrize(
    "values",
    [
        {}, {"prompt": ""}, {"prompt": ["a", "b"]}, {"prompt": [1, 2, 3]}, {"messages": []}, {"messages": "a"},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, {"prompt": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_request_without_one_text_is_refused(proxy, values: dict[str, object]) -> None:
    answer = proxy.client.post("/v1/completions", json={"model": "auto", **values})
    assert answer.status_code == 400
    assert "send one text, or name a model" in answer.json()["error"]["message"]
    assert not proxy.received


def test_a_slow_server_is_a_timeout(proxy) -> None:
    answer = proxy.client.post("/v1/completions", json={"model": "auto", "prompt": "a", "seconds": 3})
    assert (answer.status_code, answer.json()["error"]["type"]) == (504, "smile_route_error")
    assert "did not answer in 1 seconds" in answer.json()["error"]["message"]


def test_without_a_server_there_is_one_line(router: RequestRouter) -> None:
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        settings = ProxySettings(f"http://127.0.0.1:{free.getsockname()[1]}", "base")
        with serving(create_app(router, settings)) as address:
            answer = httpx.post(f"{address}/v1/completions", json={"model": "auto", "prompt": "a"}, timeout=20)
    assert answer.status_code == 502
    assert "can't be reached" in answer.json()["error"]["message"]


def test_the_base_model_serves_where_the_router_is_not_sure(router: RequestRouter) -> None:
    stub, received = create_stub()
    unsure = RequestRouter(upscaled(llama()), tokenizer(), threshold=1.0)
    with serving(stub) as server, serving(create_app(unsure, ProxySettings(server, "base"))) as address:
        answer = httpx.post(f"{address}/v1/completions", json={"model": "auto", "prompt": "a b"}, timeout=20)
    assert received[0]["body"]["model"] == "base"
    assert "x-smile-expert" not in answer.headers
    assert float(answer.headers["x-smile-confidence"]) < 1


def test_a_name_in_the_format_of_sglang(router: RequestRouter) -> None:
    (route,) = router.route(["a"])
    settings = ProxySettings("http://server", "base", adapter_format="{base}:{expert}")
    assert settings.served_model(route) == f"base:{route.expert}"


def test_a_router_of_images_is_refused() -> None:
    images = RequestRouter(upscaled(clip_tower()), CLIPImageProcessor())
    with pytest.raises(ConfigError, match="chooses by texts, and this router by images"):
        create_app(images, ProxySettings("http://server", "base"))


@pytest.mark.cli
def test_the_command_serves_a_checkpoint(tmp_path: Path, router: RequestRouter) -> None:
    upscaled(llama()).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    router = RequestRouter.from_pretrained(tmp_path)
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    stub, _ = create_stub()
    with serving(stub) as server:
        command = [sys.executable, "-m", "fusion_bench_smile.serving.command", str(tmp_path), "--server", server]
        command += ["--base-model", "base", "--adapter-format", FORMAT, "--port", str(port)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline().startswith(
                    f"model=auto is one of 0, 1, 2 at {server}; the router holds"
                )
                answer = _ask_until_it_serves(
                    f"http://127.0.0.1:{port}/v1/completions", {"model": "auto", "prompt": "a"}
                )
                assert answer["model"] == expected(router, "a")
            finally:
                process.terminate()


def _ask_until_it_serves(url: str, body: dict[str, str]) -> dict[str, str]:
    for _ in range(100):
        try:
            return httpx.post(url, json=body, timeout=20).json()
        except httpx.ConnectError:
            time.sleep(0.1)
    raise AssertionError("the proxy does not answer")


def test_errors_of_the_command_are_one_line(tmp_path: Path) -> None:
    arguments = ["--server", "http://127.0.0.1:1", "--base-model", "base"]
    with pytest.raises(SystemExit, match=r"error: .*nowhere"):
        main([str(tmp_path / "nowhere"), *arguments])
    upscaled(llama()).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=r"error: .* has no tokenizer"):
        main([str(tmp_path), *arguments])
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=r"error: --adapter-format \{name\} may use the names"):
        main([str(tmp_path), *arguments, "--adapter-format", "{name}"])
