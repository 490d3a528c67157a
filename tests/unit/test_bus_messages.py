"""Messages, errors and identifiers: what travels, and what is told of what can't."""

from __future__ import annotations

import errno
import sqlite3
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import field_validator
from shoal_bus import wire
from shoal_bus.errors import BY_CODE, Code, Internal, NotFound, ShoalError, Unknown, from_exception, from_wire
from shoal_bus.identifiers import check_identifier
from shoal_bus.message import InvalidArgument, Message, Request, pack, unpack
from shoal_bus.outbox import EventId


class Told(Message):
    name: str
    at: datetime
    data: bytes = b""
    maybe: int | None = None


class Asked(Request):
    name: str


def test_message_comes_back_as_it_was() -> None:
    told = Told(name="ü", at=datetime(2026, 1, 2, 3, 4, 5, 6, UTC), data=b"\x00\xff")
    assert Told.unpack(told.pack()) == told


def test_message_ignores_what_it_does_not_know_and_request_refuses_it() -> None:
    data = pack({"name": "a", "at": datetime.now(UTC), "new": 1})
    assert Told.unpack(data).name == "a"
    with pytest.raises(InvalidArgument, match="nmae"):
        Asked.unpack(pack({"name": "a", "nmae": "b"}))


class Loud(Request):
    words: str = ""

    @field_validator("words")
    @classmethod
    def _check(cls, value: str) -> str:
        if value != value.upper():
            raise ValueError("Must be as LOUD as CAP_NET_ADMIN")
        return value


def test_a_validators_own_words_are_told_as_they_are() -> None:
    with pytest.raises(InvalidArgument, match=r"^Loud: words: must be as LOUD as CAP_NET_ADMIN$"):
        Loud.of({"words": "quiet"})


@pytest.mark.parametrize(
    "data",
    [
        b"\xc1", b"\x93\x01", pack([1]), pack("x"), b"\x81\x90\x01", b"\xa2\xff\xfe", b"\x91" * 5000,
        b"\xc7\x0c\xff" + b"\xff" * 12, b"{}", b"\x81\xa4name",
    ],
)  # fmt: skip
def test_payload_that_is_no_message_is_invalid_argument(data: bytes) -> None:
    with pytest.raises(InvalidArgument):
        Asked.unpack(data)


@given(st.binary(max_size=200))
def test_no_payload_does_more_than_be_invalid(data: bytes) -> None:
    try:
        Asked.unpack(data)
        unpack(data)
    except InvalidArgument:
        pass


@pytest.mark.parametrize("code", [code for code in Code if code is not Code.OK])
def test_error_travels_as_itself(code: Code) -> None:
    error = BY_CODE[code]("image x:\n not found", hint="pull it")
    back = wire.error_of(wire.error_headers(error))
    assert type(back) is type(error)
    assert back is not None
    assert (back.message, back.hint) == ("image x: not found", "pull it")


def test_unknown_code_is_unknown() -> None:
    assert isinstance(from_wire("NEW_CODE", "x"), Unknown)


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (NotFound("x"), Code.NOT_FOUND),
        (TimeoutError(), Code.DEADLINE_EXCEEDED),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), Code.RESOURCE_EXHAUSTED),
        (OSError(errno.EACCES, "Permission denied", "/x"), Code.PERMISSION_DENIED),
        (ConnectionResetError(errno.ECONNRESET, "reset"), Code.UNAVAILABLE),
        (ValueError("secret"), Code.INTERNAL),
        (sqlite3.OperationalError("secret"), Code.INTERNAL),
    ],
)
def test_exception_becomes_its_canonical_code(raised: Exception, code: Code) -> None:
    error = from_exception(raised)
    assert error.code is code
    assert "secret" not in str(error)
    assert "Traceback" not in str(error)


def test_full_disk_under_a_database_is_resource_exhausted(tmp_path) -> None:  # type: ignore[no-untyped-def]
    database = sqlite3.connect(tmp_path / "db")
    database.execute("PRAGMA max_page_count = 3")
    with pytest.raises(sqlite3.Error) as raised:
        database.executescript("".join(f"CREATE TABLE t{number} (a);" for number in range(100)))
    database.close()
    assert from_exception(raised.value).code is Code.RESOURCE_EXHAUSTED


def test_long_error_fits_into_a_header() -> None:
    assert len(wire.error_headers(Internal("x" * 100_000))[wire.ERROR]) <= 1000


@pytest.mark.parametrize("good", ["a", "web-1", "a.b_c-d", "A9"])
def test_identifier_is_taken(good: str) -> None:
    assert check_identifier(good) == good


@pytest.mark.parametrize("bad", ["", "-a", "a-", "a--b", "a/b", "..", "a b", "ü", "a" * 77, "a\n"])
def test_identifier_that_is_none_is_refused(bad: str) -> None:
    with pytest.raises(InvalidArgument):
        check_identifier(bad)


def test_event_ids_of_a_later_epoch_are_later_whatever_their_number() -> None:
    assert EventId("o", "00000000000000000002-a", 1) > EventId("o", "00000000000000000001-f", 99)
    id = EventId("o", "00000000000000000001-f", 99)
    assert EventId.parse(str(id)) == id
    assert EventId.parse("somebody-else's") is None


@pytest.mark.parametrize("value", ["", "x", "-1", "1e3", "²"])
def test_timeout_that_is_no_number_is_none(value: str) -> None:
    assert wire.timeout_of({wire.TIMEOUT: value}) in (None, 0.0)


def test_every_error_is_one_line() -> None:
    assert "\n" not in str(ShoalError("a\nb", hint="c\nd"))


@given(st.text(max_size=64).filter(str.isprintable))
def test_a_lease_goes_into_a_header_and_comes_out_again(lease: str) -> None:
    headers = wire.lease_header(lease)
    assert all(value.isascii() and value.isprintable() for value in headers.values())
    assert wire.lease_of(headers) == lease


@pytest.mark.parametrize("header", ["%0a", "%00", "x" * 257, "%ff\n"])
def test_what_is_no_lease_is_refused(header: str) -> None:
    with pytest.raises(InvalidArgument, match="lease"):
        wire.lease_of({wire.LEASE: header})
