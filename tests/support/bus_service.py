"""A small service on the bus, run as processes by the bus's own tests: `python -m tests.support.bus_service --root …`.

What it does it notes in `<root>/demo/journal`, one line for each effect, so that a test sees what was done twice.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

from shoal_bus.context import Context
from shoal_bus.errors import AlreadyExists, NotFound, Unavailable
from shoal_bus.events import Topic
from shoal_bus.message import Empty, Message, Request
from shoal_bus.process import Process, run_service
from shoal_bus.verb import OperationVerb, StreamVerb, Verb, behaves


class Put(Request):
    name: str
    die: str = ""
    """Where the copy that isn't told `resumed` kills itself: `before` or `after` the effect, or after the `answer`."""
    seconds: float = 0.0


class Item(Message):
    name: str
    made_by: int = 0


class ListItems(Request):
    count: int = 10
    size: int = 10
    pause: float = 0.0


class Thing(Message):
    number: int
    body: str


class Get(Request):
    name: str


class Work(Request):
    name: str
    steps: int = 5
    step_seconds: float = 0.1
    die_at: int = 0
    fail: str = ""


class Progress(Message):
    step: int


ITEM_PUT = Verb("demo", "item", "put", Put, Item, mutates=True, behaviour=behaves("Makes an item."))
ITEM_ADD = Verb("demo", "item", "add", Put, Item, mutates=True, behaviour=behaves("Makes one, and begins itself."))
ITEM_GET = Verb("demo", "item", "get", Get, Item, behaviour=behaves("An item."))
ITEM_WAIT = Verb("demo", "item", "wait", Get, Item, waits=True, behaviour=behaves("An item, once it is there."))
ITEM_LIST = StreamVerb("demo", "item", "list", ListItems, Thing, behaviour=behaves("Things."))
ITEM_NEST = Verb("demo", "item", "nest", Get, Empty, behaviour=behaves("Calls its own service."))
ITEM_WORK = OperationVerb("demo", "item", "work", Work, Item, Progress, behaviour=behaves("Long work."))
ITEM_RUSH = OperationVerb(
    "demo", "item", "rush", Work, Item, Progress, quiet_seconds=5.0, tells_all=True,
    behaviour=behaves("Work that is over before any progress is told."),
)  # fmt: skip
ITEM_BREAK = Verb("demo", "item", "break", Get, Empty, behaviour=behaves("Raises what nobody foresaw."))
ITEMS_PUT = Topic("demo", "/items/put", Item, "name")

MIGRATIONS = ["CREATE TABLE items (name TEXT PRIMARY KEY, request_id TEXT NOT NULL, made_by INTEGER NOT NULL);"]


class Demo:
    """The handlers, over one journal and one table."""

    def __init__(self, process: Process) -> None:
        self._db = process.database(MIGRATIONS)
        self._journal = process.root / "journal"

    def note(self, line: str) -> None:
        fd = os.open(self._journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(f"{line} {os.getpid()}\n")

    async def put(self, context: Context, request: Put) -> Item:
        row = self._db.read_one("SELECT * FROM items WHERE name = ?", (request.name,))
        if row is not None and row["request_id"] != context.id:
            raise AlreadyExists(f"item {request.name}: already exists")
        if not context.resumed and request.die == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        await asyncio.sleep(request.seconds)
        item = Item(name=request.name, made_by=os.getpid())
        with self._db.write() as tx:
            tx.execute("INSERT INTO items VALUES (?, ?, ?)", (request.name, context.id, os.getpid()))
            tx.emit(context.namespace, ITEMS_PUT, item)
            context.answer(tx, item)
        self.note(f"put {request.name}")
        if not context.resumed and request.die == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    async def get(self, _: Context, request: Get) -> Item:
        row = self._db.read_one("SELECT * FROM items WHERE name = ?", (request.name,))
        if row is None:
            raise NotFound(f"item {request.name}: not found", hint="put it first")
        return Item(name=row["name"], made_by=row["made_by"])

    async def wait(self, context: Context, request: Get) -> Item:
        while True:
            try:
                return await self.get(context, request)
            except NotFound:
                await asyncio.sleep(0.1)

    async def list(self, _: Context, request: ListItems) -> AsyncIterator[Thing]:
        try:
            for number in range(request.count):
                await asyncio.sleep(request.pause)
                yield Thing(number=number, body="x" * request.size)
        finally:
            self.note("list ended")

    async def nest(self, context: Context, request: Get) -> Empty:
        depth = int(request.name)
        if depth:
            await context.client.call(ITEM_NEST, Get(name=str(depth - 1)))
        return Empty()

    async def work(self, context: Context, request: Work) -> Item:
        self.note(f"work {request.name} {'resumed' if context.resumed else 'begun'}")
        try:
            for step in range(1, request.steps + 1):
                context.progress(Progress(step=step))
                await asyncio.sleep(request.step_seconds)
                if step == request.die_at and not context.resumed:
                    os.kill(os.getpid(), signal.SIGKILL)
            if request.fail:
                raise Unavailable(request.fail)
        except BaseException:
            self.note(f"undone {request.name}")
            raise
        self.note(f"done {request.name}")
        return Item(name=request.name, made_by=os.getpid())

    async def undo(self, _: Context, request: Work) -> None:
        self.note(f"undone {request.name}")

    async def break_(self, _: Context, request: Get) -> Empty:
        secret = {"password": request.name}
        return Empty(**{"x": secret["nothing"]})


async def setup(process: Process) -> None:
    demo = Demo(process)
    service = process.service()
    service.handle(ITEM_PUT, demo.put, lock=lambda r: f"item/{r.name}")
    service.handle(ITEM_ADD, demo.put, lock=lambda r: f"item/{r.name}", begins_itself=True)
    service.handle(ITEM_GET, demo.get)
    service.handle(ITEM_WAIT, demo.wait)
    service.handle(ITEM_NEST, demo.nest)
    service.handle(ITEM_BREAK, demo.break_)
    service.stream(ITEM_LIST, demo.list)
    service.operate(ITEM_WORK, demo.work, undo=demo.undo)
    service.operate(ITEM_RUSH, demo.work, undo=demo.undo)


def journal(root: Path) -> list[str]:
    """What all copies under `root` have done, without who did it."""
    path = root / "demo" / "journal"
    return [line.rpartition(" ")[0] for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    run_service("demo", setup, needs_root=False)
