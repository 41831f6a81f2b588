"""Which adapter serves a request: a router without experts, and a proxy for servers of several LoRA adapters."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .proxy import ProxySettings, create_app
    from .request_router import RequestRouter, Route

__all__ = ["ProxySettings", "RequestRouter", "Route", "create_app"]
__getattr__ = lazy_names(__name__, {
    "proxy": ("ProxySettings", "create_app"),
    "request_router": ("RequestRouter", "Route"),
})  # fmt: skip
