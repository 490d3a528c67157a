"""A client of containerd's API in a process of its own: one channel for its life, grpc's synchronous calls.

    probe.py SOCKET NAMESPACE

Each line of standard input is a measurement, a JSON list of its name and its arguments; each line of standard output is
its result. Either side is measured by this very client.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.empty_pb2 import Empty
from shoal_gateway.proto.containerd.services.containers.v1 import containers_pb2 as containers
from shoal_gateway.proto.containerd.services.content.v1 import content_pb2 as content

_MESSAGE = 1 << 20
"""Bytes of a message of a write, as containerd's client has it when it copies."""
_RANGE = 32 << 10
"""Bytes that `ctr content get` asks for at a time: each is a call of its own."""
_AT_ONCE = 16


class Probe:
    """The measurements. Each waits for its own end, so that none is under way beside another."""

    def __init__(self, channel: grpc.Channel, namespace: str) -> None:
        self._channel, self._metadata = channel, (("containerd-namespace", namespace),)
        self._get = self._unary("containers", "Get", containers.GetContainerResponse)
        self._list = self._unary("containers", "List", containers.ListContainersResponse)
        self._create = self._unary("containers", "Create", containers.CreateContainerResponse)
        self._remove = self._unary("containers", "Delete", Empty)
        self._forget = self._unary("content", "Delete", Empty)
        self._read = self._method("unary_stream", "content", "Read", content.ReadContentResponse)
        self._write = self._method("stream_stream", "content", "Write", content.WriteContentResponse)

    def _method(self, kind: str, service: str, method: str, reply: type[Any]) -> Any:
        return getattr(self._channel, kind)(
            f"/containerd.services.{service}.v1.{service.capitalize()}/{method}",
            request_serializer=lambda request: request.SerializeToString(),
            response_deserializer=reply.FromString,
        )

    def _unary(self, service: str, method: str, reply: type[Any]) -> Any:
        return self._method("unary_unary", service, method, reply)

    # ------------------------------------------------------------------------------------------------------ containers

    def create(self, count: int, spec: dict[str, Any]) -> None:
        """Makes so many containers, without snapshot or task."""
        packed = AnyMessage(
            type_url="types.containerd.io/opencontainers/runtime-spec/1/Spec", value=json.dumps(spec).encode()
        )
        runtime = containers.Container.Runtime(name="io.containerd.runc.v2")
        self._each(
            self._create,
            [
                containers.CreateContainerRequest(
                    container=containers.Container(
                        id=f"probe{number}", image="bench", runtime=runtime, spec=packed, labels={"app": "bench"}
                    )
                )
                for number in range(count)
            ],
        )

    def remove(self, count: int) -> None:
        """Removes them."""
        self._each(self._remove, [containers.DeleteContainerRequest(id=f"probe{number}") for number in range(count)])

    def get(self, samples: int, count: int) -> list[float]:
        """Milliseconds of each of so many gets, of one container after another."""
        requests = [containers.GetContainerRequest(id=f"probe{number % count}") for number in range(samples)]
        return [self._timed(lambda one=one: self._get(one, metadata=self._metadata)) for one in requests]

    def list(self, samples: int, count: int) -> list[float]:
        """Milliseconds of each of so many lists."""

        def one() -> None:
            found = len(self._list(containers.ListContainersRequest(), metadata=self._metadata).containers)
            if found != count:
                raise RuntimeError(f"{found} containers are listed instead of {count}")

        return [self._timed(one) for _ in range(samples)]

    # --------------------------------------------------------------------------------------------------------- content

    def write(self, ref: str, size: int) -> tuple[str, float]:
        """Writes and commits a blob of `size` bytes, message by message, each after its answer: its digest, MB/s."""
        block = os.urandom(_MESSAGE)
        head = ref.encode().ljust(64)
        whole = hashlib.sha256()
        for at in range(0, size, _MESSAGE):
            whole.update(head + block[64:] if at == 0 else block)
        digest = f"sha256:{whole.hexdigest()}"
        requests: SimpleQueue[content.WriteContentRequest | None] = SimpleQueue()
        begun = time.perf_counter()
        answers = self._write(iter(requests.get, None), metadata=self._metadata)
        requests.put(content.WriteContentRequest(action=content.STAT, ref=ref, total=size, expected=digest))
        next(answers)
        for at in range(0, size, _MESSAGE):
            data = head + block[64:] if at == 0 else block
            requests.put(content.WriteContentRequest(action=content.WRITE, ref=ref, offset=at, data=data))
            answer = next(answers)
            if answer.offset != at + len(data):
                raise RuntimeError(f"{answer.offset} bytes are written instead of {at + len(data)}")
        requests.put(
            content.WriteContentRequest(
                action=content.COMMIT, ref=ref, offset=size, total=size, expected=digest,
                labels={"containerd.io/gc.root": "bench"},
            )
        )  # fmt: skip
        next(answers)
        took = time.perf_counter() - begun
        requests.put(None)
        for _ in answers:
            pass
        return digest, size / took / 1e6

    def read(self, digest: str, size: int) -> float:
        """MB/s of reading a blob in one call, in messages of whatever size its server gives them."""
        begun = time.perf_counter()
        found = self._length(content.ReadContentRequest(digest=digest))
        took = time.perf_counter() - begun
        _check(found, size)
        return size / took / 1e6

    def ranges(self, digest: str, size: int) -> float:
        """MB/s of reading a blob's first `size` bytes bit by bit, a call for each."""
        begun = time.perf_counter()
        found = sum(
            self._length(content.ReadContentRequest(digest=digest, offset=at, size=_RANGE))
            for at in range(0, size, _RANGE)
        )
        took = time.perf_counter() - begun
        _check(found, size)
        return size / took / 1e6

    def forget(self, digest: str) -> None:
        """Deletes a blob."""
        self._forget(content.DeleteContentRequest(digest=digest), metadata=self._metadata)

    def _length(self, request: content.ReadContentRequest) -> int:
        return sum(len(answer.data) for answer in self._read(request, metadata=self._metadata))

    # ---------------------------------------------------------------------------------------------------------- within

    def _each(self, call: Any, requests: list[Any]) -> None:
        for at in range(0, len(requests), _AT_ONCE):
            under_way = [call.future(one, metadata=self._metadata) for one in requests[at : at + _AT_ONCE]]
            for one in under_way:
                one.result()

    @staticmethod
    def _timed(one: Callable[[], object]) -> float:
        begun = time.perf_counter()
        one()
        return (time.perf_counter() - begun) * 1000


def _check(found: int, size: int) -> None:
    if found != size:
        raise RuntimeError(f"{found} bytes are read instead of {size}")


def _asked() -> Iterator[tuple[str, list[Any]]]:
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        yield name, arguments


def main() -> None:
    socket, namespace = sys.argv[1:]
    with grpc.insecure_channel(f"unix:{socket}", options=[("grpc.max_receive_message_length", -1)]) as channel:
        probe = Probe(channel, namespace)
        for name, arguments in _asked():
            print(json.dumps(getattr(probe, name)(*arguments)), flush=True)


if __name__ == "__main__":
    main()
