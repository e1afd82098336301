"""Errors of the wire.

WireError                  base
├─ EnvelopeError           a message on the task topic that is no valid task
├─ BrokerRefusedError      the broker answered, and said no: credentials, permissions, wrong database
├─ BrokerUnreachableError  no broker answers at the address
├─ TransferError           an attempt to send or fetch over HTTP failed; another may succeed
├─ RefusedError            the HTTP peer said no, and would say so again
│  └─ AddressError         a URL that this worker does not call
└─ ArchiveError            an archive cannot be made or read
   └─ UnsafeArchiveError   an archive that would write outside its folder, or is larger than allowed
"""

from __future__ import annotations


class WireError(Exception):
    """Base of everything this package raises on purpose."""


class EnvelopeError(WireError):
    """A message on the task topic that is no valid task.

    Attributes:
        task_id: the id, when it could be read.
        assigned_worker: the worker it was meant for, when that could be read.
    """

    def __init__(self, message: str, *, task_id: str | None = None, assigned_worker: str | None = None) -> None:
        super().__init__(message)
        self.task_id = task_id
        self.assigned_worker = assigned_worker


class BrokerRefusedError(WireError):
    """The broker answered, and said no: credentials, permissions, wrong database."""


class BrokerUnreachableError(WireError):
    """No broker answers at the address."""


class TransferError(WireError):
    """An attempt to send or fetch over HTTP failed; another may succeed.

    Attributes:
        retry_after_sec: how long the peer wants to be left alone, if it said so.
    """

    def __init__(self, message: str, *, retry_after_sec: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_sec = retry_after_sec


class RefusedError(WireError):
    """The HTTP peer said no, and would say so again.

    Attributes:
        status: its status code; None when it was not asked.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class AddressError(RefusedError):
    """A URL that this worker does not call: no http(s), or a host outside WORKER_ALLOWED_HOSTS."""


class ArchiveError(WireError):
    """An archive cannot be made or read."""


class UnsafeArchiveError(ArchiveError):
    """An archive that would write outside its folder, holds links out or devices, or is larger than allowed."""
