"""Network namespaces that last, and the directory they are mounted in."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from shoal_network import netns

from tests.support.netns import ip, mounts_below, no_mounts_left


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    with no_mounts_left(tmp_path):
        yield


def test_namespace_lasts_until_it_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "netns" / "a"
    netns.create(path)
    assert netns.identity(path) not in (None, netns.identity(Path("/proc/self/ns/net")))
    (loopback,) = json.loads(ip(path, "-json", "link"))
    assert "UP" in loopback["flags"]
    netns.remove(path)
    netns.remove(path)
    assert netns.identity(path) is None


def test_creating_again_after_a_kill_replaces_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "netns" / "a"
    netns.create(path)
    ip(path, "link", "add", "left", "type", "bridge")
    netns.create(path)
    assert "left" not in ip(path, "link")
    netns.remove(path)
    path.parent.mkdir()
    path.touch()  # killed between the file and the mount
    assert netns.identity(path) is None
    netns.create(path)
    netns.remove(path)


def test_directory_goes_with_the_last_namespace(tmp_path: Path) -> None:
    directory = tmp_path / "netns"
    for name in ("a", "b"):
        netns.create(directory / name)
    assert (
        "shared"
        in subprocess.run(
            ["findmnt", "-n", "-o", "PROPAGATION", directory], check=True, capture_output=True, text=True
        ).stdout
    )
    netns.remove(directory / "a")
    assert str(directory) in mounts_below(tmp_path)
    netns.remove(directory / "b")
    assert mounts_below(tmp_path) == []
    assert not directory.exists()


def test_directory_half_made_by_a_kill_is_no_hindrance(tmp_path: Path) -> None:
    tmp_path.joinpath(".netns.shoal").mkdir()
    netns.create(tmp_path / "netns" / "a")
    netns.remove(tmp_path / "netns" / "a")
    assert list(tmp_path.iterdir()) == []


def test_directory_that_was_there_stays(tmp_path: Path) -> None:
    tmp_path.joinpath("netns").mkdir()
    for _ in range(2):
        netns.create(tmp_path / "netns" / "a")
        netns.remove(tmp_path / "netns" / "a")
        assert mounts_below(tmp_path) == []
        assert tmp_path.joinpath("netns").is_dir()


def test_mount_of_somebody_else_stays(tmp_path: Path) -> None:
    directory = tmp_path / "netns"
    directory.mkdir()
    subprocess.run(["mount", "--bind", directory, directory], check=True)
    subprocess.run(["mount", "--make-shared", directory], check=True)
    try:
        netns.create(directory / "a")
        netns.remove(directory / "a")
        assert mounts_below(tmp_path) == [str(directory)]
    finally:
        subprocess.run(["umount", directory], check=True)


def test_namespace_that_ip_netns_made_keeps_the_directory(tmp_path: Path) -> None:
    directory = tmp_path / "netns"
    netns.create(directory / "a")
    (directory / "admins").touch()
    netns.remove(directory / "a")
    assert str(directory) in mounts_below(tmp_path)
    netns.remove(directory / "admins")
    assert mounts_below(tmp_path) == []


def test_last_one_leaving_and_first_one_coming_do_not_trip_over_each_other(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def churn(name: str) -> None:
        try:
            for _ in range(30):
                netns.create(tmp_path / "netns" / name)
                assert netns.identity(tmp_path / "netns" / name) is not None
                netns.remove(tmp_path / "netns" / name)
        except BaseException as error:  # noqa: BLE001 (told by the test's own thread)
            errors.append(error)

    threads = [threading.Thread(target=churn, args=(f"n{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert mounts_below(tmp_path) == []
    assert not tmp_path.joinpath("netns").exists()


def test_service_itself_never_changes_its_namespace(tmp_path: Path) -> None:
    own = netns.identity(Path("/proc/self/ns/net"))
    netns.create(tmp_path / "netns" / "a")
    inside = netns.run_in(tmp_path / "netns" / "a", lambda: netns.identity(Path("/proc/thread-self/ns/net")))
    netns.remove(tmp_path / "netns" / "a")
    assert inside != own
    assert netns.identity(Path("/proc/thread-self/ns/net")) == own


def test_what_fails_inside_is_raised_outside(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        netns.run_in(tmp_path / "missing", lambda: None)
