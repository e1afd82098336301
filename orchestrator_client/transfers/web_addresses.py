"""URLs from specs, settings and redirects: reading them strictly, and showing them without secrets."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import SplitResult, unquote, urlsplit

from orchestrator_client.errors import AddressError

_PORTS: Final = {"http": 80, "https": 443}
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_HOST: Final = re.compile(r"(?!.{254})([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_IPV6: Final = re.compile(r"[0-9a-f:.]+")
_QUERY_NAME: Final = re.compile(r"[\w.\[\]-]{1,60}")
_LONGEST_SHOWN: Final = 300
_SHORTEST_SECRET: Final = 4
"""Cutting out every "1" of a text would make it unreadable."""


@dataclass(frozen=True)
class Origin:
    """Whom a URL talks to; the port is always given."""

    scheme: str
    host: str
    port: int


@dataclass(frozen=True)
class WebAddress:
    """A URL that was read.

    Attributes:
        origin: whom it talks to.
        url: without userinfo and fragment: what is asked for.
        credentials: `Authorization` made from its userinfo; empty if it has none.
        secrets: parts of it that no log may show.
    """

    origin: Origin
    url: str
    credentials: str
    secrets: tuple[str, ...]


def read_address(url: str, *, what: str) -> WebAddress:
    """Read an http(s) URL.

    Args:
        url: from anywhere.
        what: names it in the error, for instance "spec.output.destination.url".

    Raises:
        AddressError: no http(s), no or an odd host, a wrong port, control characters.
    """
    if _CONTROL.search(url) or url != url.strip() or "\\" in url:
        raise AddressError(f"{what} has control characters, blanks around it or a backslash: correct the URL")
    try:
        parts = urlsplit(url)
        port = parts.port
        host = (parts.hostname or "").rstrip(".")
    except ValueError as error:
        raise AddressError(f"{what} {shown_url(url)} is no URL: correct its host or port") from error
    if parts.scheme not in _PORTS:
        raise AddressError(f"{what} {shown_url(url)} has no http:// or https://: only these are called")
    if not host:
        raise AddressError(f"{what} {shown_url(url)} has no host: expected {parts.scheme}://HOST/…")
    if not (_IPV6 if ":" in host else _HOST).fullmatch(host):
        raise AddressError(f"{what} {shown_url(url)} has no usable host: write it in ASCII (xn--… for other letters)")
    place = f"[{host}]" if ":" in host else host
    if port is not None:
        place += f":{port}"
    plain = parts._replace(netloc=place, fragment="").geturl()
    origin = Origin(parts.scheme, host, port if port is not None else _PORTS[parts.scheme])
    return WebAddress(origin, plain, _credentials(parts), _secrets(parts))


def is_allowed(origin: Origin, patterns: tuple[str, ...]) -> bool:
    """Whether an origin fits one of `name`, `name:port`, `*.domain`; `*.domain` is its subdomains, not itself."""
    return any(_fits(origin, pattern.lower()) for pattern in patterns)


def check_pattern(pattern: str) -> None:
    """Look whether a pattern for `is_allowed` can fit anything.

    Raises:
        AddressError: it is none of the forms; the text shows them.
    """
    name = pattern.removeprefix("*.")
    bare_ipv6 = name.count(":") > 1 and "[" not in name
    try:
        read_address(f"http://[{name}]" if bare_ipv6 else f"http://{name}", what="the pattern")
        is_host = not re.search(r"[/?#@]", pattern)
    except AddressError:
        is_host = False
    if not is_host:
        raise AddressError(
            f"{shown_url(pattern)!r} is no host: expected `name`, `name:port` or `*.domain` without http:// and path, "
            "for instance orch.example:8000"
        )


def shown_url(url: str) -> str:
    """A URL for logs, errors and results: no userinfo, query values as ***, at most 300 characters, one line."""
    plain = _CONTROL.sub("", url)
    start, _, query = plain.partition("#")[0].partition("?")
    try:
        parts = urlsplit(plain)
        parts.port  # noqa: B018 - raises ValueError for a port that is none
    except ValueError:
        parts = SplitResult("", "", "", "", "")
    if parts.netloc:
        path = re.sub(r"://.*", "://…", parts.path)  # a second URL within it has secrets of its own
        start = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{path}"
    elif "@" in plain:  # nobody can tell where its userinfo ends: `http://me:pass/word@host` has the port "pass"
        return f"{parts.scheme}:…" if parts.scheme else "(an address that cannot be read)"
    shown = start + ("?" + "&".join(_shown_pair(pair) for pair in query.split("&")) if query else "")
    return shown if len(shown) <= _LONGEST_SHOWN else shown[:_LONGEST_SHOWN] + "…"


def extended(url: str, tail: str) -> str:
    """A URL whose path goes on with `tail` ("/a/b"); its query stays behind the path."""
    parts = urlsplit(url)
    return parts._replace(path=parts.path.rstrip("/") + tail, fragment="").geturl()


def without_secrets(text: str, secrets: tuple[str, ...]) -> str:
    """A text in which no secret of some length is left."""
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, "***")
    return text


def _shown_pair(pair: str) -> str:
    name, equals, _ = pair.partition("=")
    return f"{name}=***" if equals and _QUERY_NAME.fullmatch(name) else "***"


def _fits(origin: Origin, pattern: str) -> bool:
    host, port = pattern, ""
    if pattern.startswith("["):
        host, _, port = pattern[1:].partition("]")
        port = port.removeprefix(":")
    elif pattern.count(":") == 1:
        host, _, port = pattern.partition(":")
    if port and port != str(origin.port):
        return False
    host = host.rstrip(".")
    return origin.host.endswith(host[1:]) if host.startswith("*.") else origin.host == host


def _credentials(parts: SplitResult) -> str:
    if parts.username is None:
        return ""
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return f"Basic {base64.b64encode(pair.encode()).decode()}"


def _secrets(parts: SplitResult) -> tuple[str, ...]:
    userinfo = [part for part in (parts.username, parts.password) if part]
    values = [value for pair in parts.query.split("&") if (value := pair.partition("=")[2] or pair)]
    return tuple({secret for raw in (*userinfo, *values) for secret in (raw, unquote(raw))})
