"""Images mounted for a look into them, and what is left of that when something dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from shoal_bus.mount import is_mounted, unmount

from tests.e2e.shoal import COMMAND, Shoal, eventually, refused, unique
from tests.support.archives import layout, tar
from tests.support.images import Image, Layer, directory, file, symlink, whiteout


@pytest.fixture
def name(node: Shoal, tmp_path: Path) -> Iterator[str]:
    """An image of many layers, so that the options of its overlay don't fit a page."""
    name = f"registry.example/{unique('app')}:v1"
    layers = [Layer([directory("etc"), file("etc/gone"), symlink("etc/link", "motd")])]
    layers += [Layer([file("etc/motd", str(number).encode())]) for number in range(60)]
    layers.append(Layer([whiteout("etc/gone"), file("su", b"#!", 0o4755)]))
    (tmp_path / "a.tar").write_bytes(tar(layout({name: Image.build(layers)})))
    node.ok("load", "-i", str(tmp_path / "a.tar"))
    yield name
    node.ok("rmi", "--force", name)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "look here"
    place.mkdir()
    yield place
    while unmount(place):
        pass


def mounted(node: Shoal) -> list[str]:
    return [one["directory"] for one in node.json("image", "mounts")]


def snapshots(node: Shoal) -> list[Path]:
    return sorted((node.root / "snapshot" / "overlayfs" / "snapshots").iterdir())


def test_image_is_mounted_read_only_and_unmounted(node: Shoal, name: str, place: Path) -> None:
    before = snapshots(node)
    assert node.ok("image", "mount", name, str(place)) == f"{place}\n"
    assert (place / "etc" / "motd").read_text() == "59"
    assert (place / "etc" / "link").read_text() == "59"
    assert not (place / "etc" / "gone").exists()
    with pytest.raises(OSError, match=r"[Rr]ead-only"):
        (place / "new").touch()
    assert os.statvfs(place).f_flag & os.ST_NOSUID
    assert mounted(node) == [str(place)]
    refused(node.run("image", "mount", name, str(place)), 7, "FAILED_PRECONDITION", "mounted there already")
    # Its snapshots stay as long as somebody looks at them.
    node.ok("rmi", name)
    assert (place / "etc" / "motd").read_text() == "59"
    node.ok("image", "unmount", str(place))
    assert not is_mounted(place)
    assert mounted(node) == []
    assert len(snapshots(node)) <= len(before)
    refused(node.run("image", "unmount", str(place)), 4, "NOT_FOUND", "no image is mounted there")


def test_image_of_one_layer_is_mounted_read_only(node: Shoal, image: str, place: Path) -> None:
    node.ok("image", "mount", image, str(place))
    assert (place / "bin" / "busybox").stat().st_size > 0
    with pytest.raises(OSError, match=r"[Rr]ead-only"):
        (place / "new").touch()
    assert os.statvfs(place).f_flag & os.ST_NOSUID
    node.ok("image", "unmount", str(place))


def test_mount_that_somebody_else_took_away_leaves_no_view(node: Shoal, name: str, place: Path) -> None:
    before = snapshots(node)
    node.ok("image", "mount", name, str(place))
    assert len(snapshots(node)) == len(before) + 1
    subprocess.run(["umount", str(place)], check=True)
    refused(node.run("image", "unmount", str(place)), 4, "NOT_FOUND")
    assert snapshots(node) == before


def test_what_cant_be_mounted_is_told(node: Shoal, name: str, place: Path, tmp_path: Path) -> None:
    before = snapshots(node)
    refused(node.run("image", "mount", name, str(tmp_path / "missing")), 2, "INVALID_ARGUMENT", "isn't a directory")
    refused(node.run("image", "mount", "no-such", str(place)), 4, "NOT_FOUND", "no-such")
    assert snapshots(node) == before
    assert mounted(node) == []


def test_mount_elsewhere_than_on_the_node_is_refused_and_leaves_no_view(node: Shoal, name: str, place: Path) -> None:
    """Where the node's files aren't to be seen: in a mount namespace with something else in their place."""
    before = snapshots(node)
    script = f'mount -t tmpfs none {node.root} && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", script, "sh", *COMMAND, "image", "mount", name, str(place)]
    done = subprocess.run(command, env=node.environment, capture_output=True, text=True, timeout=60, check=False)
    refused(done, 7, "FAILED_PRECONDITION", "isn't on this machine")
    assert snapshots(node) == before


def test_command_that_is_killed_before_it_has_mounted_leaves_nothing_for_long(
    node: Shoal, name: str, place: Path
) -> None:
    before = snapshots(node)
    mounting = node.spawn("image", "mount", name, str(place), stdout=subprocess.DEVNULL)
    while len(snapshots(node)) == len(before) and mounting.poll() is None:
        pass
    mounting.send_signal(signal.SIGKILL)
    mounting.wait(10)
    if is_mounted(place):
        node.ok("image", "unmount", str(place))
    else:
        refused(node.run("image", "unmount", str(place)), 4, "NOT_FOUND")
    assert snapshots(node) == before


def test_views_from_before_a_reboot_go_when_the_node_comes_up(tmp_path: Path) -> None:
    """As a reboot leaves it: the view is there, its mount and the node aren't."""
    name = "registry.example/app:v1"
    place = tmp_path / "place"
    place.mkdir()
    (tmp_path / "a.tar").write_bytes(tar(layout({name: Image.build([Layer([file("a")])])})))
    (tmp_path / "node").mkdir()
    with Shoal(tmp_path / "node", node=unique("reboot")) as node:
        node.up()
        node.ok("load", "-i", str(tmp_path / "a.tar"))
        node.ok("image", "mount", name, str(place))
        assert len(snapshots(node)) == 2
        unmount(place)
        assert node.stop() == 0
        node.up()
        eventually(lambda: len(snapshots(node)) == 1)
        assert json.loads(node.ok("image", "mounts", "--json")) == []
