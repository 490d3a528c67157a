"""The connection to NATS: how it is found, how it is kept.

It reconnects for ever, and sends nothing late: what was written while the server was away is refused at once
(UNAVAILABLE) instead of being kept and delivered to somebody who has given up.

nats-py closes a connection for good on most errors the server reports, loses its reader to a late PONG or to a message
that it can't decode, and can run two reconnections at once; so the state machine here is our own, and small: anything
that goes wrong ends in `_reconnect`, of which there is one at a time.

What is done for every message is our own, too: it is written in the loop's next turn, together with whatever else
there is to write by then, and one that was read is handed to its `listen`er without a queue and a task in between.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import nats.errors
from nats.aio.client import PING_PROTO
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.protocol import command
from pydantic import BaseModel

from shoal_bus import logs, subjects
from shoal_bus.errors import Unauthenticated, Unavailable
from shoal_bus.framing import Parser, plain_headers, pub
from shoal_bus.receiver import Receiver

log = logs.get_logger(__name__)

RECONNECT_SECONDS = 0.25
PING_SECONDS = 10
CONNECT_TIMEOUT_SECONDS = 2

R = TypeVar("R")
Hook = Callable[[], Awaitable[None] | None]
Listener = Callable[[Msg], None]

_UNWRITTEN = 256 * 1024
"""Bytes that the server hasn't taken yet before more are kept back: kept back, they are forgotten on disconnect."""
_PENDING_BYTES = 1 << 30
_BLANK = re.compile(r"[ \t\r\n]")


class Address(BaseModel):
    """Where the bus is, and who we are to it. `nkey` and `creds` are paths of files that hold them."""

    urls: list[str]
    user: str = ""
    password: str = ""
    nkey: str = ""
    creds: str = ""


class Connection(Nats):
    """nats-py's client, kept for ever, that forgets on disconnect what it hasn't sent."""

    def __init__(self) -> None:
        super().__init__()
        self._parser = Parser(self)
        self._ps = self._parser  # type: ignore[assignment]
        self._listeners: dict[int, Listener] = {}
        self._writing = False
        self._closing: asyncio.Task[None] | None = None
        self._full = asyncio.Event()
        """The server takes nothing more for now."""
        self.up = asyncio.Event()
        self.generation = 0
        """Rises each time the server is lost: what was known of the other side may be so no more."""
        self._on_reconnect: list[Hook] = []
        self._kept = False
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._hooks: asyncio.Task[None] | None = None

    def on_reconnect(self, callback: Hook) -> None:
        """Calls `callback` each time the server has been away and is back."""
        self._on_reconnect.append(callback)

    async def wait_up(self, seconds: float) -> None:
        """Returns when the server is there; UNAVAILABLE when it isn't after `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                await self.up.wait()
        except TimeoutError:
            raise Unavailable("the bus isn't there", hint="is nats-server running, and --nats-url right?") from None

    async def while_up(self, work: Coroutine[Any, Any, R]) -> R:
        """The result of `work`, which is cancelled when the server is lost: UNAVAILABLE, at once.

        What waits for an answer would learn of it only when its own time is up.
        """
        task = asyncio.ensure_future(work)
        either: set[asyncio.Future[Any]] = {task, self._lost}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Unavailable("the bus was lost")
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    async def close(self) -> None:
        """Ends it. What the server doesn't take any more is dropped."""
        self._kept = False
        self.up.clear()
        with suppress(OSError, RuntimeError):
            await super().close()

    def keep(self) -> None:
        """From here on it is kept, whatever happens."""
        self._kept = True
        self.up.set()

    # -------------------------------------------------------------------------------------------------- of each message

    async def listen(self, subject: str, listener: Listener, *, queue: str = "") -> Subscription:
        """A subscription whose messages are given to `listener` as they are read. It must neither block nor raise."""
        subscription = await self.subscribe(subject, queue, cb=_unheard, pending_bytes_limit=_PENDING_BYTES)
        self._listeners[subscription._id] = listener
        return subscription

    def send(
        self, subject: str, payload: bytes = b"", reply: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        """`publish`, at once: it is written in the loop's next turn."""
        if self._status != Nats.CONNECTED and not self.is_connected:
            raise nats.errors.ConnectionClosedError if self.is_closed else nats.errors.OutboundBufferLimitError
        if self.is_draining_pubs:
            raise nats.errors.ConnectionDrainingError
        if len(payload) > self._max_payload:
            raise nats.errors.MaxPayloadError
        if not subject or len(subject) > subjects.LONGEST or _BLANK.search(subject) or _BLANK.search(reply):
            raise nats.errors.BadSubjectError
        command = pub(subject, reply, payload, headers)
        self.stats["out_msgs"] += 1
        self.stats["out_bytes"] += len(payload)
        self._pending.append(command)
        self._pending_data_size += len(command)
        self._write_soon()

    async def publish(
        self, subject: str, payload: bytes = b"", reply: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        """Publishes a message. Raises nats-py's errors, at once when the server isn't there."""
        self.send(subject, payload, reply, headers)

    def _write_soon(self) -> None:
        if not self._writing:
            self._writing = True
            asyncio.get_running_loop().call_soon(self._write)

    def _write(self) -> None:
        self._writing = False
        if not self._pending or self._full.is_set() or self._transport is None or not self.is_connected:
            return
        data, self._pending, self._pending_data_size = b"".join(self._pending), [], 0
        self._transport.write(data)
        writer = getattr(self._transport, "_io_writer", None)  # a websocket has none: it is waited for each time
        if writer is None or writer.transport.get_write_buffer_size() > _UNWRITTEN:
            self._full.set()

    async def _read_loop(self) -> None:
        # nats-py's task for reading. Here it waits for the end: what comes is parsed as it comes.
        reader, writer = (getattr(self._transport, name, None) for name in ("_io_reader", "_io_writer"))
        if reader is None or writer is None:
            await super()._read_loop()  # a websocket's
            return
        receiver = Receiver(self._parser)
        await receiver.take_over(reader, writer)
        await self._process_op_err(await receiver.ended)

    async def _flusher(self) -> None:
        # nats-py's task for writing. Here it waits for a server that takes nothing more to go on.
        while True:
            await self._full.wait()
            assert self._transport is not None
            try:
                await self._transport.drain()  # type: ignore[no-untyped-call]
            except OSError as error:
                await self._process_op_err(error)
                return
            self._full.clear()
            self._write_soon()

    async def _flush_pending(self, force_flush: bool = False) -> None:
        self._write_soon()

    def _remove_sub(self, sid: int, max_msgs: int = 0) -> None:
        super()._remove_sub(sid, max_msgs)
        self._listeners.pop(sid, None)

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        try:
            listener = self._listeners.get(sid)
            if listener is None:
                await super()._process_msg(sid, subject, reply, data, headers)
                return
            self.stats["in_msgs"] += 1
            self.stats["in_bytes"] += len(data)
            told = plain_headers(headers) if headers else None
            if headers and told is None:
                told = await self._process_headers(headers)
            listener(Msg(self, subject.decode(), reply.decode(), data, told or None, _sid=sid))
        except (ValueError, IndexError, TypeError) as error:  # not UTF-8, headers that are none
            log.warning("bus.message_dropped", error=type(error).__name__, subject=repr(subject[:200]))

    # ------------------------------------------------------------------------------------ what nats-py calls on trouble

    async def _process_err(self, err_msg: str) -> None:
        if "permissions violation" in err_msg:
            await self._error_cb(nats.errors.Error(f"nats: {err_msg.strip(chr(39))}"))
            return
        error = nats.errors.Error(f"nats: {err_msg.strip(chr(39))}")
        if self._kept:
            await self._process_op_err(error)
        else:  # nats-py's way to close waits for this and that, which the parser doesn't
            self._closing = asyncio.create_task(self._process_op_err(error))

    async def _process_op_err(self, e: Exception) -> None:
        if not self._kept:
            await super()._process_op_err(e)
            return
        if self._reconnection_task is not None and not self._reconnection_task.done():
            return  # it will notice: nothing it waits for comes
        self._begin_reconnect(e)

    async def force_reconnect(self) -> None:
        """Drops the connection and makes it anew."""
        await self._process_op_err(nats.errors.Error("asked to reconnect"))

    async def _send_ping(self, future: asyncio.Future[Any] | None = None) -> None:
        # nats-py writes it past what is still pending: the PONG would say nothing of the subscriptions before it.
        self._pongs.append(future or asyncio.get_running_loop().create_future())
        await self._send_command(PING_PROTO)
        await self._flush_pending()

    async def _process_pong(self) -> None:
        # A PONG whose waiter has given up must not end the reader.
        if self._pongs and self._pongs[0].done():
            self._pongs.pop(0)
            self._pings_outstanding = 0
            return
        await super()._process_pong()

    # -------------------------------------------------------------------------------------------------------- reconnect

    def _begin_reconnect(self, error: Exception) -> None:
        self._status = Nats.RECONNECTING
        self.generation += 1
        self.up.clear()
        self._forget()
        self._lost.set_result(None)
        self._lost = asyncio.get_running_loop().create_future()
        log.warning("bus.lost", error=f"{type(error).__name__}: {error}".rstrip(": "))
        self._reconnection_task = asyncio.get_running_loop().create_task(self._reconnect())

    def _forget(self) -> None:
        # What hasn't been written is for callers who will have asked again: it must not be sent late.
        self._pending.clear()
        self._pending_data_size = 0
        self._full.clear()

    async def _reconnect(self) -> None:
        while True:
            await self._hang_up()
            try:
                await self._select_next_server()
                async with asyncio.timeout(3 * CONNECT_TIMEOUT_SECONDS):
                    await self._greet()
                if self._reading_task is not None and not self._reading_task.done():
                    break  # and not lost again already
            except (OSError, nats.errors.Error, TimeoutError, ValueError) as error:
                log.debug("bus.reconnecting", error=f"{type(error).__name__}: {error}")
            except Exception:
                log.exception("bus.reconnecting")
            self._status = Nats.RECONNECTING
            await asyncio.sleep(RECONNECT_SECONDS)
        self.up.set()
        self.stats["reconnects"] += 1
        url = self.connected_url
        log.info("bus.found", server=url.netloc.rpartition("@")[2] if url else "")
        # In a task of its own: a connection lost meanwhile has to find this one done.
        self._hooks = asyncio.get_running_loop().create_task(self._call_hooks())

    async def _call_hooks(self) -> None:
        for callback in self._on_reconnect:
            try:
                result = callback()
                if result is not None:
                    await result
            except Exception:
                log.exception("bus.hook_failed")

    async def _hang_up(self) -> None:
        for task in (self._reading_task, self._ping_interval_task, self._flusher_task):
            if task is not None and not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError, TimeoutError):
                    async with asyncio.timeout(1):
                        await asyncio.wait({task})
        if self._transport is not None:
            with suppress(Exception):
                self._transport.close()  # type: ignore[no-untyped-call]
            self._transport = None
        self._ps.reset()
        for pong in self._pongs:
            pong.cancel()
        self._pongs = []

    async def _greet(self) -> None:
        """INFO, CONNECT, and every subscription anew; the server has answered a PING behind them when this returns."""
        await self._process_connect_init()
        if self._status != Nats.CONNECTED:
            raise nats.errors.Error("nats: the server went away during the handshake")
        assert self._transport is not None
        self._forget()
        for sid, subscription in list(self._subs.items()):
            self._transport.write(command.sub_cmd(subscription._subject, subscription._queue, sid))
        await self._transport.drain()  # type: ignore[no-untyped-call]
        await self.flush(CONNECT_TIMEOUT_SECONDS)


async def connect(address: Address, *, name: str, inbox_prefix: str = "_INBOX", patience: float = 5.0) -> Connection:
    """A connection to the bus. UNAVAILABLE when none of the servers answers within `patience` seconds.

    Raises UNAUTHENTICATED when a server refuses the credentials.
    """
    where = ", ".join(url.rpartition("@")[2].removeprefix("nats://") for url in address.urls)
    ends = asyncio.get_running_loop().time() + patience
    while True:
        connection = Connection()
        try:
            async with asyncio.timeout_at(ends):
                await connection.connect(**_options(address, name, inbox_prefix))
            connection.keep()
            return connection
        except (nats.errors.Error, TimeoutError, OSError) as error:
            await connection.close()
            if "authorization" in str(error).lower():
                raise Unauthenticated(f"the bus at {where} refuses the credentials") from None
            if asyncio.get_running_loop().time() + 0.05 > ends:
                raise Unavailable(f"the bus at {where} doesn't answer", hint="is nats-server running?") from None
        except BaseException:
            await connection.close()
            raise
        await asyncio.sleep(0.05)


def _options(address: Address, name: str, inbox_prefix: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "servers": address.urls,
        "name": name,
        "error_cb": _on_error,
        "allow_reconnect": False,  # a first connection that fails is told; afterwards reconnecting is ours
        "max_reconnect_attempts": -1,
        "reconnect_time_wait": RECONNECT_SECONDS,
        "ping_interval": PING_SECONDS,
        "connect_timeout": CONNECT_TIMEOUT_SECONDS,
        "pending_size": 0,
        "inbox_prefix": inbox_prefix,
    }
    if address.user:
        options |= {"user": address.user, "password": address.password}
    if address.nkey:
        options["nkeys_seed"] = address.nkey
    if address.creds:
        options["user_credentials"] = address.creds
    return options


async def _unheard(_: Msg) -> None:
    raise AssertionError("it has a listener")


async def _on_error(error: Exception) -> None:
    if not isinstance(error, (OSError, asyncio.TimeoutError, nats.errors.UnexpectedEOF)):
        log.warning("bus.error", error=f"{type(error).__name__}: {error}")
