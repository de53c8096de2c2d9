# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What every reward that is asked over HTTP needs: connections, what is sent, and what no message may say."""

import io
import ipaddress
from typing import NoReturn
from urllib.parse import urlsplit

import httpx2
from PIL import Image

from ..media import to_rgb


# What is sent, and what may come back: uncompressed, so that its size is that of what was received.
PLAIN_JSON = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
ABOUT_ALL = (401, 402, 404, 405, 407, 410)  # statuses that say something of the secret, the address or the model


def encode_png(image: Image.Image) -> bytes:
    """
    The image as a PNG file in RGB, see [`~trl_marble.media.to_rgb`].

    Raises:
        `ValueError`: If the image cannot be converted to RGB.
    """
    file = io.BytesIO()
    to_rgb(image).save(file, format="PNG", compress_level=1)  # the default saves a tenth, for much more time
    return file.getvalue()


def refuse_constant(constant: str) -> NoReturn:
    """Python's `json` would accept NaN and Infinity, which JSON does not have."""
    raise ValueError(f"{constant} is not JSON")


def bearer(secret: str | None) -> dict[str, str]:
    """The header that carries a secret."""
    return {"Authorization": f"Bearer {secret}"} if secret else {}


def redact(text: str, secret: str | None) -> str:
    """The text without the secret: a server may repeat it in what it answers."""
    return text.replace(secret, "[secret]") if secret else text


def start_of(text: str, length: int = 200) -> str:
    """The start of a text, quoted, for messages."""
    return repr(text if len(text) <= length else text[: length - 3] + "...")


def check_secret(secret: str | None, argument: str) -> str | None:
    """
    The secret, `None` if it is empty. No message quotes it.

    Raises:
        `ValueError`: If an HTTP header cannot carry it.
    """
    # Here, because an HTTP library quotes the header that it refuses.
    if secret and not (secret.isascii() and secret.isprintable() and " " not in secret):
        raise ValueError(
            f"`{argument}` has characters that an HTTP header cannot carry, often a line break or a space at its end. "
            "Strip it, or choose one of letters, digits and punctuation."
        )
    return secret or None


def check_url(url: str, argument: str) -> str:
    """
    The URL without a slash at its end.

    Raises:
        `ValueError`: If it is not `http(s)://host[:port][/path]`. Credentials in it are not quoted.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        raise ValueError(f"`{argument}` is not a URL; expected 'http://host:port'.") from None
    if "@" in url or parts.query or parts.fragment:
        raise ValueError(
            f"`{argument}` must be 'http://host:port/path' and no more: no user, password or query. Secrets have an "
            "argument of their own, which is kept out of logs."
        )
    if not valid:
        raise ValueError(f"`{argument}` is {url!r}; expected 'http://host:port'.")
    return url.rstrip("/")


def is_loopback(host: str) -> bool:
    """Whether a name or an address of a host is this machine's own, which no other machine reaches."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name = host.lower().rstrip(".")
        return name == "localhost" or name.endswith(".localhost")
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def open_client(url: str) -> httpx2.Client:
    """A client for a server. Proxies that the environment names are used unless the server is on this machine."""
    # A client with a transport of its own asks for no proxies. Certificates are those that it would take itself.
    return httpx2.Client(transport=httpx2.HTTPTransport() if _is_here(url) else None)


def open_async_client(url: str, max_connections: int) -> httpx2.AsyncClient:
    """The same for coroutines, without a timeout, and with a bound on the number of connections."""
    limits = httpx2.Limits(max_connections=max_connections)
    transport = httpx2.AsyncHTTPTransport(limits=limits) if _is_here(url) else None
    return httpx2.AsyncClient(timeout=None, limits=limits, transport=transport)


def _is_here(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return is_loopback(host) or host in ("0.0.0.0", "::")  # where a server listens that says so; clients take it, too
