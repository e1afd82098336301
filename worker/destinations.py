"""Where results go over HTTP: what the task wants, what the operator overrides (WIRE 6, 7)."""

from __future__ import annotations

from typing import Final

from executors.errors import BadSpecError
from executors.task_spec import Destination
from orchestrator_client.errors import RefusedError
from orchestrator_client.transfers.http_link import HttpLink, HttpPolicy, Target
from worker.settings import Settings

_FIELD: Final = "spec.output.destination"
_METHODS: Final = ("POST", "PUT", "PATCH")
_RESULTS_ROUTE: Final = "/api/v1/results"


def http_policy(settings: Settings) -> HttpPolicy:
    """The operator's word on who may be called, with what, and how fast."""
    return HttpPolicy(
        base_url=settings.orchestrator_base_url,
        upload_url=settings.results_upload_url,
        token=settings.orchestrator_token,
        allowed_hosts=settings.worker_allowed_hosts,
        bandwidth_bytes_per_sec=settings.worker_network_bandwidth_bytes_per_sec,
    )


def target_of(destination: Destination, settings: Settings, link: HttpLink) -> Target:
    """Where results for a destination of type http are sent.

    RESULTS_UPLOAD_URL replaces the task's URL: many task files name `localhost`, which is not where a remote worker
    finds the orchestrator.

    Raises:
        BadSpecError: no URL, one that this worker does not call, headers that cannot be sent, a method without a body.
    """
    url = settings.results_upload_url or (destination.url or "").strip()
    if not url and settings.orchestrator_base_url:
        url = settings.orchestrator_base_url + _RESULTS_ROUTE
    if not url:
        raise BadSpecError(
            f"{_FIELD}.url is missing: expected an http(s) URL, because {_FIELD}.type is 'http'",
            hint="name the URL in the task, or set RESULTS_UPLOAD_URL or ORCHESTRATOR_BASE_URL at the worker",
        )
    method = destination.method.strip().upper()
    if method not in _METHODS:
        raise BadSpecError(f"{_FIELD}.method is {destination.method!r}: expected one of {', '.join(_METHODS)}")
    target = Target(url=url, method=method, headers=destination.headers, timeout_sec=destination.timeout_sec)
    try:
        link.prepare(method, url, destination.headers, own={})
    except RefusedError as error:
        raise BadSpecError(f"{_FIELD}: {error}", hint="correct the task's destination") from error
    return target
