"""Errors of the wire.

WireError                  base
├─ EnvelopeError           a message on the task topic that is no valid task
├─ BrokerRefusedError      the broker answered, and said no: credentials, permissions, wrong database
└─ BrokerUnreachableError  no broker answers at the address
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
