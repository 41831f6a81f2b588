"""The command ``smile-route``: a proxy that chooses the LoRA adapter of every request.

smile-route FOLDER --server http://127.0.0.1:8000 --base-model meta-llama/Llama-3.2-1B
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from ..exceptions import SmileError


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve the proxy until it is stopped. An error is one line, and exits with 1."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        import uvicorn

        from .proxy import ProxySettings, create_app
    except ImportError as error:
        raise SystemExit(f"error: smile-route needs {error.name}: pip install 'fusion-bench-smile[serve]'") from None
    from .request_router import RequestRouter

    settings = ProxySettings(
        options.server, options.base_model, options.model_name, options.adapter_format, options.timeout
    )
    try:
        settings.adapter_format.format(expert="expert", base="base")
    except (KeyError, IndexError, ValueError):
        names = "{expert} and {base}"
        raise SystemExit(f"error: --adapter-format {options.adapter_format} may use the names {names} alone") from None
    try:
        router = RequestRouter.from_pretrained(
            options.folder, device=options.device, threshold=options.threshold, max_tokens=options.max_tokens
        )
        app = create_app(router, settings)
    except SmileError as error:
        raise SystemExit(f"error: {error}") from None
    print(
        f"model={settings.model_name} is one of {', '.join(router.experts)} at {settings.server}; the router holds "
        f"{router.num_bytes / 1e6:.0f} MB"
    )
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="A proxy for an OpenAI-compatible server of several LoRA adapters (vLLM, SGLang), which chooses "
        "the adapter of every request by its text."
    )
    parser.add_argument("folder", metavar="FOLDER", help="checkpoint of a SMILE model with routing_scope=input")
    parser.add_argument("--server", required=True, metavar="URL", help="address of the server of the adapters")
    parser.add_argument("--base-model", required=True, metavar="NAME", help="name of the pretrained model there")
    parser.add_argument("--model-name", default="auto", help="name of the model to choose for (default: auto)")
    parser.add_argument(
        "--adapter-format", default="{expert}", metavar="FORMAT",
        help="name of an expert's adapter at the server (default: {expert}; for SGLang: {base}:{expert})",
    )  # fmt: skip
    parser.add_argument(
        "--threshold", type=float, default=0.0, metavar="SHARE",
        help="below this confidence, from 0 to 1, the pretrained model serves a request (default: 0)",
    )  # fmt: skip
    parser.add_argument("--max-tokens", type=int, metavar="N", help="choose by the last N tokens (default: by all)")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="(default: 600)")
    parser.add_argument("--device", default="cpu", help="of the router (default: cpu)")
    parser.add_argument("--host", default="127.0.0.1", help="(default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8080, help="(default: 8080)")
    return parser


if __name__ == "__main__":
    main()
