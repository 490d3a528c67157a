"""One of the two that are compared, as a client sees it: the steps of a container's life, one request each."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Exited:
    """An exit as a subscriber was told of it; `received` by CLOCK_MONOTONIC, in seconds."""

    container_id: str
    exec_id: str
    received: float


class Side(ABC):
    """containerd or shoal. A container's snapshot has the container's id; its streams are /dev/null."""

    name: str
    runtime: str = "runc"
    """The OCI runtime of containers made from now on, by name."""
    template: dict[str, Any]
    """The OCI specification every container is made from."""
    cgroup: str
    """The cgroup above those of all containers."""

    def spec(self, id: str, args: list[str]) -> dict[str, Any]:
        """The specification of one container: the template, with its command and a cgroup of its own."""
        spec = copy.copy(self.template)
        spec["process"] = self.template["process"] | {"args": args}
        spec["linux"] = self.template["linux"] | {"cgroupsPath": f"/{self.cgroup}/{id}"}
        return spec

    @abstractmethod
    async def snapshot_prepare(self, id: str) -> Any:
        """A snapshot on top of the image's; returns its mounts, as `task_create` takes them."""

    @abstractmethod
    async def container_create(self, id: str, args: list[str]) -> None: ...

    @abstractmethod
    async def task_create(self, id: str, mounts: Any) -> int:
        """Returns the process id of the container's first process."""

    @abstractmethod
    async def task_start(self, id: str) -> None: ...

    @abstractmethod
    async def task_wait(self, id: str) -> int: ...

    @abstractmethod
    async def task_kill(self, id: str) -> None: ...

    @abstractmethod
    async def task_delete(self, id: str) -> None: ...

    @abstractmethod
    async def container_delete(self, id: str) -> None: ...

    @abstractmethod
    async def snapshot_remove(self, id: str) -> None: ...

    @abstractmethod
    async def exec_create(self, id: str, exec_id: str, args: list[str]) -> None: ...

    @abstractmethod
    async def exec_start(self, id: str, exec_id: str) -> None: ...

    @abstractmethod
    async def exec_wait(self, id: str, exec_id: str) -> int: ...

    @abstractmethod
    async def exec_delete(self, id: str, exec_id: str) -> None: ...

    @abstractmethod
    def exits(self) -> AbstractAsyncContextManager[AsyncIterator[Exited]]:
        """A subscription to the exits from now on; it stands when the block is entered."""

    @abstractmethod
    def supervisors(self) -> list[int]:
        """The processes that are there because containers are: shims, and what they are forked from."""

    @abstractmethod
    def services(self) -> list[int]:
        """The processes that are there without any container."""
