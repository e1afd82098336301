"""The one HTTP client of the worker: whom it calls, with which credentials, and how its errors read."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import ssl
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING, Final

from pydantic import SecretStr

from orchestrator_client.errors import AddressError, RefusedError, TransferError
from orchestrator_client.transfers.bandwidth import Bandwidth
from orchestrator_client.transfers.http_answers import LOCATION
from orchestrator_client.transfers.patience import with_patience
from orchestrator_client.transfers.web_addresses import Origin, is_allowed, read_address, shown_url, without_secrets

if TYPE_CHECKING:
    import httpx

__all__ = ["HttpCall", "HttpLink", "HttpPolicy", "Target", "shown_url", "with_patience"]

CONNECT_SEC: Final = 10.0
_TOKEN: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_BAD_VALUE: Final = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_METHODS: Final = frozenset({"GET", "POST", "PUT", "PATCH"})
_OURS: Final = frozenset(
    {
        "accept-encoding", "connection", "content-length", "expect", "host", "keep-alive", "proxy-authorization",
        "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade",
    }
)  # fmt: skip
"""Headers that belong to the connection; a spec that sets them would only break it."""
_NO_SECRET: Final = frozenset({"accept", "content-type", "user-agent"})


@dataclass(frozen=True)
class HttpPolicy:
    """Whom the worker calls.

    Attributes:
        base_url: ORCHESTRATOR_BASE_URL; its origin is trusted. May be empty.
        upload_url: RESULTS_UPLOAD_URL; its origin is trusted. May be empty.
        token: bearer token; goes to the trusted origins only, and only where a request has no Authorization of its own.
        allowed_hosts: `name`, `name:port` or `*.domain`; empty is any host. The trusted origins are always allowed.
        bandwidth_bytes_per_sec: cap on everything that is sent; None is none.
    """

    base_url: str = ""
    upload_url: str = ""
    token: SecretStr | None = None
    allowed_hosts: tuple[str, ...] = ()
    bandwidth_bytes_per_sec: float | None = None


@dataclass(frozen=True)
class Target:
    """Where a result goes (WIRE 6).

    Attributes:
        url: the results route, normally `…/api/v1/results`.
        method: of the request with the result; files are always POSTed.
        headers: from the spec, untrusted.
        timeout_sec: longest silence of the peer, for each read and write; None is 15 s for a result, 30 s for a file.
    """

    url: str
    method: str = "POST"
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout_sec: float | None = None


@dataclass(frozen=True)
class HttpCall:
    """A request without its body, checked and ready to be sent.

    Attributes:
        url: without userinfo and fragment.
        origin: whom it goes to.
        headers: complete but for the length of a body.
        shown: method and URL for people.
        secrets: what no text about it may hold.
    """

    method: str
    url: str
    origin: Origin
    headers: tuple[tuple[str, str], ...]
    shown: str
    secrets: tuple[str, ...]

    def clean(self, text: str) -> str:
        """A text from the peer or a library: one printable line of at most 300 characters, without secrets."""
        line = " ".join(without_secrets(text, self.secrets).split())
        return "".join(letter if letter.isprintable() else "?" for letter in line)[:300]


class HttpLink:
    """Makes requests. Costs nothing until the first one: httpx is imported, and the client made, then.

    Proxies (HTTPS_PROXY …) and certificates (SSL_CERT_FILE) are taken from the environment by httpx, because operators
    rely on both. Nothing else is: no netrc, no cookies, no redirects that are followed behind our back.

    Args:
        policy: whom to call.

    Raises:
        AddressError: a URL of the policy cannot be read.
    """

    def __init__(self, policy: HttpPolicy) -> None:
        self._policy = policy
        self._trusted = frozenset(
            read_address(url, what=name).origin
            for name, url in (("ORCHESTRATOR_BASE_URL", policy.base_url), ("RESULTS_UPLOAD_URL", policy.upload_url))
            if url
        )
        self._token = policy.token.get_secret_value() if policy.token else ""
        self._client: httpx.AsyncClient | None = None
        self._starting = asyncio.Lock()
        self.bandwidth = Bandwidth(policy.bandwidth_bytes_per_sec)

    def check_url(self, url: str, *, what: str) -> None:
        """Look whether a URL may be called.

        Args:
            url: from anywhere.
            what: names the field in the error, for instance "spec.output.destination.url".

        Raises:
            AddressError: it may not.
        """
        self._check_host(read_address(url, what=what).origin, url, what)

    def prepare(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        *,
        own: Mapping[str, str],
        with_token: bool = True,
    ) -> HttpCall:
        """Check a request and complete its headers.

        Args:
            method: POST, PUT, PATCH or GET.
            url: where to.
            headers: from a spec.
            own: ours; they replace those of the same name in any case. An empty value only removes.
            with_token: whether the token may be added; it is only ever added for the trusted origins.

        Raises:
            AddressError: the URL may not be called.
            RefusedError: a header or the method cannot be sent.
        """
        address = read_address(url, what="the URL")
        self._check_host(address.origin, url, "the URL")
        if method.upper() not in _METHODS:
            raise RefusedError(f"the method {method[:20]!r} is not used: expected POST, PUT or PATCH")
        replaced = _OURS | {name.lower() for name in own}
        complete = [(name, value) for name, value in _checked(headers.items()) if name.lower() not in replaced]
        given = [value for name, value in complete if name.lower() not in _NO_SECRET]
        if not any(name.lower() == "authorization" for name, _ in complete):
            if address.credentials:
                complete.append(("Authorization", address.credentials))
            elif with_token and self._token and address.origin in self._trusted:
                complete += _checked([("Authorization", f"Bearer {self._token}")])
        complete += _checked((name, value) for name, value in own.items() if value)
        words = [word for value in (*given, address.credentials) for word in (value, *value.split())]
        secrets = (self._token, *address.secrets, *(word for word in words if len(word) >= 6))
        return HttpCall(
            method.upper(), address.url, address.origin, tuple(complete), f"{method.upper()} {shown_url(url)}", secrets
        )

    @contextlib.asynccontextmanager
    async def exchange(
        self, call: HttpCall, body: AsyncIterable[bytes] | None, *, stall_sec: float
    ) -> AsyncIterator[httpx.Response]:
        """Send a request; the answer's body is read inside the `async with`.

        Args:
            call: from `prepare`, with the Content-Length of the body, if there is one.
            body: in pieces, each of which is written whole within `stall_sec`.
            stall_sec: longest silence of the peer, for each read and write.

        Raises:
            TransferError: the network or the peer failed.
            AddressError: httpx reads the URL in another way than we do.
            RefusedError: the request cannot be put together; it would be the same the next time.
        """
        import httpx  # noqa: PLC0415 - the daemon starts without it

        client = await self._ready_client()
        try:
            request = client.build_request(
                call.method,
                call.url,
                headers=[(name.encode("ascii"), value.encode("latin-1")) for name, value in call.headers],
                content=body,
                timeout=httpx.Timeout(stall_sec, connect=CONNECT_SEC, pool=None),
            )
            host = request.url.host
        except (httpx.InvalidURL, ValueError) as error:  # ValueError: an xn-- name that stands for nothing
            raise AddressError(f"{call.shown} cannot be called: {call.clean(str(error))}") from None
        if host.rstrip(".") != call.origin.host or request.url.scheme != call.origin.scheme:
            raise AddressError(f"{call.shown} cannot be called: its host is ambiguous")
        try:
            answer = await client.send(request, stream=True, follow_redirects=False)
            try:
                yield answer
            finally:
                await answer.aclose()
        except httpx.LocalProtocolError:
            raise RefusedError(f"{call.shown} cannot be put together: look at its headers and URL") from None
        except httpx.TransportError as error:
            # Not chained: httpx's and h11's errors may quote a header.
            raise TransferError(f"{call.shown} failed: {_described(error, call, stall_sec)}") from None

    async def aclose(self) -> None:
        """Close all connections. The link can be used again."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    def _check_host(self, origin: Origin, url: str, what: str) -> None:
        allowed = self._policy.allowed_hosts
        if allowed and origin not in self._trusted and not is_allowed(origin, allowed):
            raise AddressError(
                f"{what} {shown_url(url)} is on a host that this worker does not call: "
                f"add {origin.host} to WORKER_ALLOWED_HOSTS, or use another URL"
            )

    async def _ready_client(self) -> httpx.AsyncClient:
        async with self._starting:
            if self._client is None:
                try:
                    # The import and the certificates take some 100 ms, which the heartbeat shall not feel.
                    self._client = await asyncio.to_thread(_new_client)
                except (OSError, ValueError, ImportError) as error:
                    raise TransferError(
                        "no HTTP client can be made in the worker's environment: correct SSL_CERT_FILE, SSL_CERT_DIR, "
                        f"HTTP_PROXY, HTTPS_PROXY or ALL_PROXY, and start the worker again ({error})"
                    ) from error
            return self._client


def _new_client() -> httpx.AsyncClient:
    import httpx  # noqa: PLC0415 - the daemon starts without it

    from orchestrator_client.transfers.listening_stream import listen_while_sending  # noqa: PLC0415 - imports httpcore

    for name in ("httpx", "httpcore"):
        # They log whole URLs, queries included, and at DEBUG the peer's headers.
        logging.getLogger(name).setLevel(logging.WARNING)
    client = httpx.AsyncClient(
        headers={"User-Agent": "flowmesh-worker", "Accept": "*/*", "Accept-Encoding": "identity"},
        follow_redirects=False,
        event_hooks={"response": [_keep_location_unread]},
        verify=_certificates(),
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),  # one task's cookies are not the next one's
        # Shorter than the five seconds after which common servers close: else a request meets a closing connection.
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=8, keepalive_expiry=2.0),
    )
    listen_while_sending(client)
    return client


@cache
def _certificates() -> ssl.SSLContext:
    """Whom we trust with https, by SSL_CERT_FILE or certifi: read once, it takes a while."""
    import httpx  # noqa: PLC0415 - the daemon starts without it

    return httpx.create_ssl_context()


async def _keep_location_unread(answer: httpx.Response) -> None:
    # httpx reads a Location even if it is to follow none, and takes one that it cannot read for a broken connection.
    answer.extensions[LOCATION] = answer.headers.pop("location", "")


def _checked(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    found = []
    for name, value in headers:
        if not _TOKEN.fullmatch(name):
            raise RefusedError(f"the header name {name[:60]!r} cannot be sent: expected letters, digits and dashes")
        stripped = value.strip(" \t")
        if _BAD_VALUE.search(stripped) or any(ord(letter) > 255 for letter in stripped):
            raise RefusedError(
                f"the value of the header {name!r} cannot be sent: it has control characters, or is not latin-1"
            )
        found.append((name, stripped))
    return found


def _described(error: httpx.TransportError, call: HttpCall, stall_sec: float) -> str:
    import httpx  # noqa: PLC0415 - the daemon starts without it

    match error:
        case httpx.ConnectTimeout():
            return f"no connection within {CONNECT_SEC:g} s"
        case httpx.ReadTimeout():
            return f"no answer for {stall_sec:g} s"
        case httpx.WriteTimeout():
            return f"the peer took no data for {stall_sec:g} s"
        case httpx.ConnectError() if "All connection attempts failed" in str(error):  # anyio's word for any cause
            return f"no connection to {call.origin.host}:{call.origin.port}: refused, or not reachable"
        case _:
            return call.clean(str(error)) or "the connection broke"
