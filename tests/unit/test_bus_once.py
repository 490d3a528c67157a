"""Requests as they are recorded: before their handler, or in the transaction of its change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from shoal_bus.client import Client
from shoal_bus.connection import Connection
from shoal_bus.context import Context
from shoal_bus.database import Database
from shoal_bus.errors import InvalidArgument, NotFound, Unavailable
from shoal_bus.message import Empty
from shoal_bus.once import Intent, Requests

INTENT = Intent(
    "one",
    "demo.item.add",
    "default",
    "default item/a",
    b"payload",
    {"traceparent": "t", "Shoal-Lease": "l", "other": "x"},
)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = Database(tmp_path / "metadata.db", "n1", ["CREATE TABLE items (name TEXT PRIMARY KEY)"])
    yield made
    made.close()


@pytest.fixture
async def context(database: Database) -> Context:
    """Of a request whose handler records it."""
    made = Context(id="one", node="n1", namespace="default", client=Client(Connection(), "n1"))
    made._requests, made._intent = Requests(database), INTENT
    return made


def states(database: Database) -> list[tuple[str, str, bytes]]:
    return [(row["id"], row["state"], row["payload"]) for row in database.read("SELECT * FROM requests ORDER BY id")]


def find(database: Database, payload: bytes = b"payload") -> object:
    found = Requests(database).find("one", "demo.item.add", "default", payload)
    return found.outcome() if found is not None else "unknown"


async def test_answer_records_the_request_with_its_change(database: Database, context: Context) -> None:
    with database.write() as tx:
        context.answer(tx, Empty())
        assert context.answered is None
    assert context.answered == find(database) == Empty().pack()
    assert states(database) == [("one", "done", b"")]
    with pytest.raises(InvalidArgument, match="already used"):
        find(database, b"another")


async def test_begun_in_one_transaction_and_answered_in_another(database: Database, context: Context) -> None:
    with database.write() as tx:
        context.begin(tx)
        context.begin(tx)
    assert states(database) == [("one", "begun", b"payload")]
    with database.write() as tx:
        context.begin(tx)
        context.answer(tx, Empty())
    assert states(database) == [("one", "done", b"")]


async def test_begun_and_answered_in_one(database: Database, context: Context) -> None:
    with database.write() as tx:
        context.begin(tx)
        context.answer(tx, Empty())
    assert states(database) == [("one", "done", b"")]


@pytest.mark.parametrize("step", ["begin", "answer"])
async def test_transaction_that_is_rolled_back_has_recorded_nothing(
    database: Database, context: Context, step: str
) -> None:
    def change() -> None:
        with database.write() as tx:
            context.begin(tx) if step == "begin" else context.answer(tx, Empty())
            raise NotFound("no")

    with pytest.raises(NotFound):
        change()
    assert (states(database), context.answered) == ([], None)
    with database.write() as tx:
        context.begin(tx)
    assert states(database) == [("one", "begun", b"payload")]


async def test_failure_before_anything_was_recorded(database: Database, context: Context) -> None:
    requests = Requests(database)
    requests.fail("one", Unavailable("not now"), intent=context._intent)
    assert find(database) == "unknown"
    requests.fail("one", NotFound("never"), intent=context._intent)
    assert states(database) == [("one", "failed", b"")]
    with pytest.raises(NotFound, match="never"):
        find(database)


def test_look_tells_of_others_under_the_lock(database: Database) -> None:
    requests = Requests(database)
    look = ("one", "demo.item.add", "default", b"payload", "default item/a")
    assert requests.look(*look) == (None, False)
    requests.begin(INTENT)
    found, others = requests.look(*look)
    assert (found is not None and found.state, others) == ("begun", False)
    assert found is not None
    assert found.headers == {"traceparent": "t", "Shoal-Lease": "l"}
    for id, lock in (("two", "default item/a"), ("three", "default item/b")):
        requests.begin(Intent(id, "demo.item.add", "default", lock, b"", {}))
    assert requests.look(*look) == (found, True)
    assert requests.look("five", *look[1:]) == (None, True)
    assert requests.look("five", *look[1:4], "default item/c") == (None, False)
