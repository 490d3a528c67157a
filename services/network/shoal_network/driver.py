"""What a network driver is: how a namespace is joined to something outside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path

from shoal_bus.api.network import AttachLink, Attachment


class Driver(ABC):
    """One way of attaching an interface to a network namespace.

    A life cycle, as the service drives it (`netns` is mounted on a file, `host` names the host's end):

        attachment = driver.attach(netns, request, host="sh3k2…")   # the interface is up, with addresses and routes
        driver.present(attachment.host_interface)                   # True
        driver.unplug(attachment.host_interface)                    # no packet passes any more
        driver.detach(attachment)                                   # as if it had never been
        driver.detach(attachment)                                   # again: no error

    Every method blocks, and is called from a worker thread; `attach` and `detach` under a lock for that bridge. A
    method may have been killed at any instruction and is then called again with the same arguments: `attach` replaces
    what a killed one left under the same `host` name. An `attach` that raises has undone its work. Nothing here turns
    on forwarding or address translation: that changes what the whole host does, and is its administrator's to decide.
    """

    @abstractmethod
    def attach(self, netns: Path, request: AttachLink, host: str) -> Attachment:
        """Attaches. ALREADY_EXISTS: that interface is there; FAILED_PRECONDITION: the host isn't fit for it."""

    @abstractmethod
    def unplug(self, host: str) -> None:
        """Removes the link alone: the slow part of `detach`, which may come before it without the bridge's lock."""

    @abstractmethod
    def detach(self, attachment: Attachment, *, drop_address: bool = False) -> None:
        """Undoes `attach`. `drop_address`: nobody else asked for the bridge address that it put there."""

    @abstractmethod
    def present(self, host: str) -> bool:
        """Whether the host's end of an attachment is still there."""

    @abstractmethod
    def has_address(self, bridge: str, address: str) -> bool:
        """Whether the bridge is there and has this address."""

    @abstractmethod
    def sweep(self, prefix: str, keep: Collection[str]) -> list[str]:
        """Removes every host's end whose name begins with `prefix` and isn't in `keep`, and whatever served only them.

        Returns the names of what it removed.
        """
