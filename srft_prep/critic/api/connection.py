"""A provider's official client, made for one server."""

from importlib import import_module
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

from srft_prep.critic.api.exchange import Wire
from srft_prep.errors import ConfigError

CONNECT_SECONDS: Final = 10.0
_CONNECTIONS: Final = 16
"""Of one client."""


def load_sdk(provider: str) -> Any:
    """Return the package of a provider's official client.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return import_module(provider)
    except ImportError:
        raise ConfigError(
            f"--critic {provider}: needs the package {provider}: pip install 'srft-prep[api]'"
        ) from None


def shown_url(url: str) -> str:
    """Return a base URL as it may be seen: without credentials.

    Raises:
        ConfigError: it is no HTTP URL.
    """
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    if parts.scheme not in ("http", "https") or not host:
        raise ConfigError(
            f"--base-url: expected http://HOST:PORT/v1 or the like, got {host or parts.path!r}"
        )
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def clients_of(
    sdk: Any, wire: Wire, url: str, key: str, concurrency: int, timeout_seconds: float
) -> list[Any]:
    """Return the provider's official client for each request that may be under way at a server.

    A client's pool looks at each of its connections whenever a request begins or ends, so that one
    of 256 connections would spend two thirds of the time on that: a client serves only a few.
    Trying again is ours, so the clients do not.
    """
    import httpx2

    verify = httpx2.create_ssl_context()
    slots: list[Any] = []
    while len(slots) < concurrency:
        share = min(_CONNECTIONS, concurrency - len(slots))
        client = getattr(sdk, wire.client)(
            api_key=key,
            base_url=url,
            max_retries=0,
            http_client=sdk.DefaultAsyncHttpxClient(
                timeout=httpx2.Timeout(
                    timeout_seconds, connect=min(CONNECT_SECONDS, timeout_seconds)
                ),
                limits=httpx2.Limits(max_connections=share + 1, max_keepalive_connections=share),
                verify=verify,
            ),
        )
        slots += [client] * share
    return slots[::-1]
