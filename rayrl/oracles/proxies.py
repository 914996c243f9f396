"""Proxy of the environment through which a judge is reached."""

import importlib
import ipaddress
import urllib.request
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from yarl import URL

SOCKS_PACKAGE = "aiohttp-socks"
"""What a SOCKS proxy needs; aiohttp knows only HTTP proxies."""
_SOCKS = ("socks5", "socks5h")


def proxy_of(url: str) -> str | None:
    """Return the proxy that HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY name for an address; None is none.

    A judge on the loopback has none: a proxy would look for it on its own machine.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_loopback(host) or urllib.request.proxy_bypass(host):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy:
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def require_usable(proxy: str) -> None:
    """Refuse a proxy that cannot be used.

    Raises:
        ValueError: it is no address of a proxy.
        ImportError: it is a SOCKS proxy, and its package is not installed.
    """
    address = URL(proxy)
    if address.scheme not in ("http", "https", *_SOCKS) or not address.host:
        raise ValueError("no address of a proxy")
    if is_socks(proxy):
        _socks()


def is_socks(proxy: str) -> bool:
    """Return whether a proxy speaks SOCKS rather than HTTP."""
    return urlsplit(proxy).scheme in _SOCKS


def socks_connector(proxy: str, **options: Any) -> aiohttp.TCPConnector:
    """Make the connector that reaches a judge through a SOCKS proxy, which looks up the judge's name too."""
    address = URL(proxy)
    return _socks().ProxyConnector(
        address.host, address.port or 1080, username=address.user, password=address.password, rdns=True, **options
    )


def socks_errors() -> tuple[type[Exception], ...]:
    """List the errors of a SOCKS proxy that gave no connection; none are aiohttp's own."""
    return _socks().ProxyConnectionError, _socks().ProxyError, _socks().ProxyTimeoutError


def _socks() -> Any:
    return importlib.import_module("aiohttp_socks")


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine itself."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def without_password(proxy: str) -> str:
    """Write a proxy's address for a message: without user name and password."""
    parts = urlsplit(proxy)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
