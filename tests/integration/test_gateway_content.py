"""Content through the gateway: the two-way write with all its turns, reads of any range, lists, labels and statuses."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress

import grpc
import psutil
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from shoal_gateway.proto.containerd.services.content.v1 import content_pb2 as pb
from shoal_gateway.proto.containerd.services.leases.v1 import leases_pb2 as leases

from tests.support.gateway import refusal, rpc, socket_of, until
from tests.support.natsd import NatsServer
from tests.support.node import TestNode

CONTENT = "/containerd.services.content.v1.Content"
LEASES = "/containerd.services.leases.v1.Leases"
IN = (("containerd-namespace", "default"),)
NOTHING = "sha256:" + 64 * "0"


def digest_of(data: bytes, algorithm: str = "sha256") -> str:
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


@pytest.fixture(scope="module", params=["on its node", "elsewhere"])
def node(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[TestNode]:
    """A gateway that shares the node's file system, and one that gets every byte over the bus."""
    directory = tmp_path_factory.mktemp("n")
    with NatsServer(directory / "nats") as natsd, TestNode(directory, natsd) as made:
        made.start("content")
        made.start("gateway", module="tests.support.gateway_elsewhere" if request.param == "elsewhere" else "")
        yield made
        assert "Traceback" not in made.of("gateway").log.read_text()


class Writing:
    """One stream of writes, as containerd's client has it: each request waits for its response."""

    def __init__(self, call: grpc.aio.StreamStreamCall) -> None:
        self._call = call

    async def send(self, **request: object) -> pb.WriteContentResponse:
        await self._call.write(pb.WriteContentRequest(**request))  # type: ignore[arg-type]
        answer = await self._call.read()
        if answer is grpc.aio.EOF:
            raise grpc.aio.AioRpcError(
                await self._call.code(), grpc.aio.Metadata(), grpc.aio.Metadata(), await self._call.details()
            )
        return answer  # type: ignore[no-any-return]

    async def refused(self, **request: object) -> tuple[str, str]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.send(**request)
        return caught.value.code().name, caught.value.details() or ""

    async def last(self) -> pb.WriteContentResponse | None:
        """What comes when the client has said that it is done."""
        await self._call.done_writing()
        answer = await self._call.read()
        assert answer is grpc.aio.EOF or await self._call.read() is grpc.aio.EOF
        return None if answer is grpc.aio.EOF else answer  # type: ignore[return-value]


@pytest.fixture
async def channel(node: TestNode) -> AsyncIterator[grpc.aio.Channel]:
    options = [("grpc.max_receive_message_length", -1)]
    async with grpc.aio.insecure_channel(f"unix:{socket_of(node)}", options=options) as opened:
        yield opened


def seconds(moment: Timestamp) -> float:
    return moment.seconds + moment.nanos / 1e9


@asynccontextmanager
async def writing(channel: grpc.aio.Channel, *more: tuple[str, str]) -> AsyncIterator[Writing]:
    call = channel.stream_stream(
        f"{CONTENT}/Write",
        request_serializer=pb.WriteContentRequest.SerializeToString,
        response_deserializer=pb.WriteContentResponse.FromString,
    )(metadata=(*IN, *more), timeout=30)
    try:
        yield Writing(call)
        if not call.done():  # to its end: nobody is told when a call that is given up is undone
            await call.done_writing()
            while await call.read() is not grpc.aio.EOF:
                pass
    finally:
        call.cancel()


async def put(channel: grpc.aio.Channel, data: bytes, ref: str = "put", **labels: str) -> str:
    digest = digest_of(data)
    async with writing(channel) as stream:
        await stream.send(action=pb.WRITE, ref=ref, data=data)
        committed = await stream.send(
            action=pb.COMMIT, offset=len(data), total=len(data), expected=digest, labels=labels
        )
        assert (committed.digest, committed.offset) == (digest, len(data))
    return digest


async def got(channel: grpc.aio.Channel, digest: str, offset: int = 0, size: int = 0) -> bytes:
    request = pb.ReadContentRequest(digest=digest, offset=offset, size=size)
    pieces = channel.unary_stream(
        f"{CONTENT}/Read",
        request_serializer=pb.ReadContentRequest.SerializeToString,
        response_deserializer=pb.ReadContentResponse.FromString,
    )(request, metadata=IN, timeout=30)
    data, at = b"", max(0, offset)
    async for piece in pieces:
        assert piece.offset == at
        assert len(piece.data) <= 1 << 20
        data, at = data + piece.data, at + len(piece.data)
    return data


async def statuses(channel: grpc.aio.Channel, *filters: str) -> list[pb.Status]:
    request = pb.ListStatusesRequest(filters=filters)
    reply = await rpc(channel, f"{CONTENT}/ListStatuses", request, reply=pb.ListStatusesResponse, metadata=IN)
    return list(reply.statuses)


async def listed(channel: grpc.aio.Channel, *filters: str) -> list[list[pb.Info]]:
    request = pb.ListContentRequest(filters=filters)
    stream = channel.unary_stream(f"{CONTENT}/List")(request.SerializeToString(), metadata=IN)
    return [list(pb.ListContentResponse.FromString(data).info) async for data in stream]


async def delete(channel: grpc.aio.Channel, digest: str) -> None:
    await rpc(channel, f"{CONTENT}/Delete", pb.DeleteContentRequest(digest=digest), metadata=IN)


async def info(channel: grpc.aio.Channel, digest: str) -> pb.Info:
    request = pb.InfoRequest(digest=digest)
    return (await rpc(channel, f"{CONTENT}/Info", request, reply=pb.InfoResponse, metadata=IN)).info  # type: ignore


# ------------------------------------------------------------------------------------------------------------- writing


async def test_each_write_has_its_response_and_the_last_comes_once_more(channel: grpc.aio.Channel) -> None:
    async with writing(channel) as stream:
        begun = await stream.send(action=pb.STAT, ref="turns", total=9)
        assert (begun.action, begun.offset, begun.total, begun.digest) == (pb.STAT, 0, 9, digest_of(b""))
        assert begun.HasField("started_at")
        first = await stream.send(action=pb.WRITE, data=b"abc")
        assert (first.action, first.offset, first.digest) == (pb.WRITE, 3, digest_of(b"abc"))
        second = await stream.send(action=pb.WRITE, offset=3, data=b"def")
        assert (second.offset, second.digest) == (6, digest_of(b"abcdef"))
        committed = await stream.send(action=pb.COMMIT, offset=6, data=b"ghi", labels={"a": "b"})
        assert (committed.action, committed.offset, committed.total) == (pb.COMMIT, 9, 9)
        assert committed.digest == digest_of(b"abcdefghi")
        assert await stream.last() == committed
    found = await info(channel, digest_of(b"abcdefghi"))
    assert (found.size, dict(found.labels)) == (9, {"a": "b"})
    assert await statuses(channel, "ref==turns") == []
    await delete(channel, found.digest)


async def test_an_ingest_is_gone_on_with_where_it_was_left(channel: grpc.aio.Channel) -> None:
    async with writing(channel) as stream:
        await stream.send(action=pb.WRITE, ref="left", total=6, data=b"abc")
        left = await stream.last()
        assert left is not None
        assert left.offset == 3
    (status,) = await statuses(channel, "ref==left")
    assert (status.ref, status.offset, status.total) == ("left", 3, 6)
    async with writing(channel) as stream:
        found = await stream.send(action=pb.STAT, ref="left", total=6)
        assert (found.offset, found.digest) == (3, digest_of(b"abc"))
        code, message = await stream.refused(action=pb.WRITE, offset=2, data=b"x")
        assert (code, message) == ("OUT_OF_RANGE", "write @2 must occur at current offset 3")
    async with writing(channel) as stream:
        await stream.send(action=pb.WRITE, ref="left", offset=3, data=b"def")
        committed = await stream.send(action=pb.COMMIT, offset=6)
        assert committed.digest == digest_of(b"abcdef")
    await delete(channel, committed.digest)


async def test_an_ingest_was_updated_when_it_was_written_to_and_not_when_it_was_opened(
    channel: grpc.aio.Channel,
) -> None:
    async with writing(channel) as stream:
        before = time.time()
        written = await stream.send(action=pb.WRITE, ref="when", total=6, data=b"abc")
        after = time.time()
        assert before - 1e-3 < seconds(written.updated_at) < after
    await asyncio.sleep(0.05)
    async with writing(channel) as stream:
        found = await stream.send(action=pb.STAT, ref="when", total=6)
        assert before - 1e-3 < seconds(found.updated_at) < after
        assert seconds(found.started_at) <= seconds(found.updated_at)
        again = await stream.send(action=pb.WRITE, offset=3, data=b"def")
        assert seconds(again.updated_at) > after
    (status,) = await statuses(channel, "ref==when")
    assert after < seconds(status.updated_at) < time.time()
    await rpc(channel, f"{CONTENT}/Abort", pb.AbortRequest(ref="when"), metadata=IN)


async def test_a_write_at_0_starts_over_and_another_total_does_too(channel: grpc.aio.Channel) -> None:
    async with writing(channel) as stream:
        await stream.send(action=pb.WRITE, ref="over", total=100, data=b"x" * 50)
        again = await stream.send(action=pb.WRITE, data=b"new")
        assert (again.offset, again.digest) == (3, digest_of(b"new"))
    async with writing(channel) as stream:
        found = await stream.send(action=pb.STAT, ref="over", total=50)
        assert (found.offset, found.digest, found.total) == (0, digest_of(b""), 50)
    await rpc(channel, f"{CONTENT}/Abort", pb.AbortRequest(ref="over"), metadata=IN)
    code, message = await refusal(channel, f"{CONTENT}/Abort", pb.AbortRequest(ref="over"), metadata=IN)
    assert (code, message) == ("NOT_FOUND", "reference over: not found")


async def test_a_commit_that_is_refused_may_be_made_again_with_what_is_right(channel: grpc.aio.Channel) -> None:
    async with writing(channel) as stream:
        await stream.send(action=pb.WRITE, ref="wrong", data=b"abcd")
        code, message = await stream.refused(action=pb.COMMIT, offset=4, expected=NOTHING)
        assert code == "FAILED_PRECONDITION"
        assert f"unexpected commit digest {digest_of(b'abcd')}, expected {NOTHING}" in message
    for wrong in (3, 5):
        async with writing(channel) as stream:
            await stream.send(action=pb.STAT, ref="wrong")
            code, _ = await stream.refused(action=pb.COMMIT, offset=4, total=wrong)
            assert code == "FAILED_PRECONDITION"
    async with writing(channel) as stream:
        await stream.send(action=pb.STAT, ref="wrong")
        committed = await stream.send(action=pb.COMMIT, offset=4, total=4, expected=digest_of(b"abcd"))
    await delete(channel, committed.digest)


async def test_what_is_there_already_is_said_at_the_start_and_at_the_end(channel: grpc.aio.Channel) -> None:
    digest = await put(channel, b"there")
    for request in ({"expected": digest}, {"expected": digest, "total": 5}):
        async with writing(channel) as stream:
            code, _ = await stream.refused(action=pb.STAT, ref="again", **request)
            assert code == "ALREADY_EXISTS"
    for expected in (digest, ""):
        async with writing(channel) as stream:
            await stream.send(action=pb.WRITE, ref="again", data=b"there")
            code, _ = await stream.refused(action=pb.COMMIT, offset=5, expected=expected)
            assert code == "ALREADY_EXISTS"
        assert await statuses(channel) == []
    async with writing(channel) as stream:
        await stream.send(action=pb.WRITE, ref="again", data=b"th")
        code, message = await stream.refused(action=pb.WRITE, offset=2, expected=digest, data=b"ere")
        assert (code, message) == ("ALREADY_EXISTS", f"blob with expected digest {digest} exists")
    assert await statuses(channel) == []
    await delete(channel, digest)


async def test_one_writer_at_a_time_and_the_next_at_once_when_it_is_done(channel: grpc.aio.Channel) -> None:
    async with writing(channel) as first:
        await first.send(action=pb.WRITE, ref="one", data=b"abc")
        async with writing(channel) as second:
            code, _ = await second.refused(action=pb.STAT, ref="one")
            assert code == "UNAVAILABLE"
        await first.last()
    async with writing(channel) as third:
        assert (await third.send(action=pb.STAT, ref="one")).offset == 3
    # That one was cancelled: the hold on it ends with it, too.
    async with asyncio.timeout(10):
        while True:
            async with writing(channel) as fourth:
                with suppress(grpc.aio.AioRpcError):
                    assert (await fourth.send(action=pb.STAT, ref="one")).offset == 3
                    break
            await asyncio.sleep(0.05)
    await rpc(channel, f"{CONTENT}/Abort", pb.AbortRequest(ref="one"), metadata=IN)


async def test_sha512_is_a_digest_too(channel: grpc.aio.Channel) -> None:
    digest = digest_of(b"long", "sha512")
    async with writing(channel) as stream:
        begun = await stream.send(action=pb.STAT, ref="sha512", expected=digest)
        assert begun.digest == digest_of(b"", "sha512")
        await stream.send(action=pb.WRITE, data=b"long")
        assert (await stream.send(action=pb.COMMIT, offset=4, expected=digest)).digest == digest
    assert await got(channel, digest) == b"long"
    await delete(channel, digest)


async def test_a_large_blob_is_written_in_large_pieces_and_read_back(channel: grpc.aio.Channel) -> None:
    data = os.urandom((24 << 20) + 5)
    async with writing(channel) as stream:
        await stream.send(action=pb.STAT, ref="large", total=len(data), expected=digest_of(data))
        for at in range(0, len(data), 5 << 20):
            piece = data[at : at + (5 << 20)]
            answer = await stream.send(action=pb.WRITE, offset=at, data=piece)
            assert answer.digest == digest_of(data[: at + len(piece)])
        committed = await stream.send(action=pb.COMMIT, offset=len(data), total=len(data), expected=digest_of(data))
    assert await got(channel, committed.digest) == data
    assert await got(channel, committed.digest, 1 << 20, 3 << 20) == data[1 << 20 : 4 << 20]
    await delete(channel, committed.digest)


async def test_a_write_goes_on_over_a_content_service_that_is_killed(channel: grpc.aio.Channel, node: TestNode) -> None:
    data = os.urandom(20 << 20)
    content = node.of("content")
    async with writing(channel) as stream:
        await stream.send(action=pb.WRITE, ref="killed", data=data[: 12 << 20])
        content.kill()
        await asyncio.to_thread(content.start)
        await stream.send(action=pb.WRITE, offset=12 << 20, data=data[12 << 20 :])
        committed = await stream.send(action=pb.COMMIT, offset=len(data))
    assert await got(channel, committed.digest) == data
    await delete(channel, committed.digest)


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ({"action": pb.STAT}, "INVALID_ARGUMENT"),
        ({"action": pb.STAT, "ref": "bad", "expected": "nonsense"}, "INVALID_ARGUMENT"),
        ({"action": pb.STAT, "ref": "x" * 5000}, "INVALID_ARGUMENT"),
        ({"action": pb.WRITE, "ref": "bad", "offset": 7, "data": b"x"}, "OUT_OF_RANGE"),
        ({"action": pb.COMMIT, "ref": "bad", "labels": {"k": "v" * 5000}}, "INVALID_ARGUMENT"),
    ],
)
async def test_what_cant_be_written_is_refused(
    channel: grpc.aio.Channel, request_: dict[str, object], code: str
) -> None:
    async with writing(channel) as stream:
        assert (await stream.refused(**request_))[0] == code


async def test_a_lease_holds_what_is_written_under_it(channel: grpc.aio.Channel) -> None:
    await rpc(channel, f"{LEASES}/Create", leases.CreateRequest(id="writes -1"), metadata=IN)
    async with writing(channel, ("containerd-lease", "writes -1")) as stream:
        await stream.send(action=pb.WRITE, ref="leased", data=b"leased")
        digest = (await stream.send(action=pb.COMMIT, offset=6)).digest
    resources = await rpc(
        channel, f"{LEASES}/ListResources", leases.ListResourcesRequest(id="writes -1"),
        reply=leases.ListResourcesResponse, metadata=IN,
    )  # fmt: skip
    assert [(one.type, one.id) for one in resources.resources] == [("content", digest)]
    await rpc(channel, f"{LEASES}/Delete", leases.DeleteRequest(id="writes -1", sync=True), metadata=IN)
    assert (await refusal(channel, f"{CONTENT}/Info", pb.InfoRequest(digest=digest), metadata=IN))[0] == "NOT_FOUND"
    async with writing(channel, ("containerd-lease", "gone")) as stream:
        assert (await stream.refused(action=pb.STAT, ref="leased"))[0] == "NOT_FOUND"


# ------------------------------------------------------------------------------------------------------------- reading


async def test_ranges_are_read_as_containerd_reads_them(channel: grpc.aio.Channel) -> None:
    data = os.urandom(3 << 20)
    digest = await put(channel, data)
    for offset, size in ((0, 0), (0, 10), (5, 100_000), (1 << 20, 2 << 20), (len(data) - 3, 100), (len(data), 0)):
        ends = offset + size if size else len(data)
        assert await got(channel, digest, offset, size) == data[offset:ends], (offset, size)
    assert await got(channel, digest, -5, 10) == data[:10]
    assert await got(channel, digest, 0, -1) == data
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await got(channel, digest, len(data) + 1)
    assert caught.value.code() is grpc.StatusCode.OUT_OF_RANGE
    await delete(channel, digest)


async def test_what_has_been_deleted_is_read_no_more_whoever_has_read_it(
    channel: grpc.aio.Channel, node: TestNode
) -> None:
    digest = await put(channel, b"read me")
    assert await got(channel, digest) == b"read me"
    await delete(channel, digest)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await got(channel, digest)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert caught.value.details() == f"content digest {digest}: not found"
    assert not any((node.root / "content" / "claims").iterdir())
    # It is another one's file now.
    assert await put(channel, b"read me") == digest
    assert await got(channel, digest) == b"read me"
    await delete(channel, digest)


async def test_another_namespace_has_nothing_of_it(channel: grpc.aio.Channel) -> None:
    digest = await put(channel, b"mine")
    other = (("containerd-namespace", "other"),)
    assert (await refusal(channel, f"{CONTENT}/Info", pb.InfoRequest(digest=digest), metadata=other))[0] == "NOT_FOUND"
    stream = channel.unary_stream(f"{CONTENT}/Read")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream(pb.ReadContentRequest(digest=digest).SerializeToString(), metadata=other).read()
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    await delete(channel, digest)


# ---------------------------------------------------------------------------------------------------------- records


async def test_labels_are_changed_by_masks(channel: grpc.aio.Channel) -> None:
    digest = await put(channel, b"labelled", a="1", b="2")

    async def update(labels: dict[str, str], *paths: str) -> dict[str, str]:
        request = pb.UpdateRequest(info=pb.Info(digest=digest, labels=labels))
        request.update_mask.paths.extend(paths)
        reply = await rpc(channel, f"{CONTENT}/Update", request, reply=pb.UpdateResponse, metadata=IN)
        return dict(reply.info.labels)

    assert await update({"a": "9", "b": "", "c": "no"}, "labels.a", "labels.b") == {"a": "9"}
    assert await update({"x.y/z": "1"}, "labels.x.y/z") == {"a": "9", "x.y/z": "1"}
    assert await update({"c": "3"}, "labels") == {"c": "3"}
    assert await update({"d": "4", "e": ""}) == {"d": "4"}
    request = pb.UpdateRequest(info=pb.Info(digest=digest))
    request.update_mask.paths.append("size")
    code, message = await refusal(channel, f"{CONTENT}/Update", request, metadata=IN)
    assert code == "INVALID_ARGUMENT"
    assert "size" in message
    await delete(channel, digest)


async def test_lists_come_by_the_hundred_and_are_filtered(channel: grpc.aio.Channel) -> None:
    async with asyncio.TaskGroup() as group:
        for number in range(101):
            group.create_task(put(channel, b"%d" % number, f"many-{number}", number=str(number)))
    assert [len(batch) for batch in await listed(channel)] == [100, 1]
    (one,) = await listed(channel, "labels.number==7", f"digest=={digest_of(b'8')}")
    assert {found.digest for found in one} == {digest_of(b"7"), digest_of(b"8")}
    assert await listed(channel, "labels.number==none") == []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await listed(channel, "digest==")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    async with asyncio.TaskGroup() as group:
        for number in range(101):
            group.create_task(delete(channel, digest_of(b"%d" % number)))


@pytest.mark.parametrize(
    ("method", "request_", "code"),
    [
        ("Info", pb.InfoRequest(digest="nonsense"), "INVALID_ARGUMENT"),
        ("Info", pb.InfoRequest(digest=NOTHING), "NOT_FOUND"),
        ("Update", pb.UpdateRequest(info=pb.Info(digest=NOTHING)), "NOT_FOUND"),
        ("Update", pb.UpdateRequest(), "INVALID_ARGUMENT"),
        ("Delete", pb.DeleteContentRequest(digest="sha256:1"), "INVALID_ARGUMENT"),
        ("Delete", pb.DeleteContentRequest(digest=NOTHING), "NOT_FOUND"),
        ("Status", pb.StatusRequest(ref="none"), "NOT_FOUND"),
        ("Status", pb.StatusRequest(), "NOT_FOUND"),
        ("Abort", pb.AbortRequest(ref="none"), "NOT_FOUND"),
        ("ListStatuses", pb.ListStatusesRequest(filters=["=="]), "INVALID_ARGUMENT"),
    ],
)
async def test_bad_requests_have_containerds_codes(
    channel: grpc.aio.Channel, method: str, request_: pb.InfoRequest, code: str
) -> None:
    assert (await refusal(channel, f"{CONTENT}/{method}", request_, metadata=IN))[0] == code


async def test_without_a_namespace_nothing_is_done(channel: grpc.aio.Channel) -> None:
    code, message = await refusal(channel, f"{CONTENT}/Info", pb.InfoRequest(digest=NOTHING))
    assert (code, message.partition(" (")[0]) == ("FAILED_PRECONDITION", "namespace is required")


async def test_clients_that_go_away_in_the_middle_leave_nothing_open(channel: grpc.aio.Channel, node: TestNode) -> None:
    digest = await put(channel, os.urandom(8 << 20))
    gateway = psutil.Process(node.of("gateway").pid)

    async def gone(number: int) -> None:
        async with grpc.aio.insecure_channel(f"unix:{socket_of(node)}") as own:
            if number % 2:
                stream = own.unary_stream(f"{CONTENT}/Read")(
                    pb.ReadContentRequest(digest=digest).SerializeToString(), metadata=IN
                )
                await stream.read()
            else:
                async with writing(own) as stream_:
                    await stream_.send(action=pb.WRITE, ref=f"gone-{number}", data=b"x" * 1000)

    await gone(0)
    await gone(1)
    await until(lambda: True)
    settled = gateway.num_fds()
    await asyncio.gather(*(gone(number) for number in range(2, 42)))
    await until(lambda: gateway.num_fds() <= settled + 1)
    for status in await statuses(channel):
        await rpc(channel, f"{CONTENT}/Abort", pb.AbortRequest(ref=status.ref), metadata=IN)
    await delete(channel, digest)
