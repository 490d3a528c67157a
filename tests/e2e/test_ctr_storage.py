"""Debian's ctr on images, content, snapshots and leases, against the gateway and against Debian's containerd.

What it prints and how it ends is the same, command for command, in one run.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import containerd, images
from tests.support.gateway import socket_of
from tests.support.leaks import Leaks
from tests.support.natsd import NatsServer
from tests.support.node import TestNode
from tests.support.registry import Registry, running

HELLO = "sha256:5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
"""Of `hello` and a newline."""
NOTHING = "sha256:" + 64 * "0"
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
_AGE = re.compile(r"Less than a second|\d+ seconds?|About a minute")
_PLACE = re.compile(r"/[^ =:\"]*/snapshots/\d+")
_RATE = re.compile(r"elapsed: .*|done: [\d.]+m?s\s*")


class Both:
    """The two sockets, and a directory for what commands write."""

    def __init__(self, ours: Path, theirs: Path, directory: Path) -> None:
        self.ours, self.theirs, self.directory = ours, theirs, directory

    def at(self, socket: Path, command: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """One command on one side; `DIR` in it is that side's directory."""
        directory = self.directory / ("ours" if socket == self.ours else "theirs")
        directory.mkdir(exist_ok=True)
        arguments = [one.replace("DIR", str(directory)) for one in shlex.split(command)]
        return subprocess.run(
            ["ctr", "--address", socket, *arguments], input=stdin, capture_output=True, timeout=60, check=False
        )

    def same(self, command: str, stdin: bytes = b"", *, ordered: bool = True) -> str:
        """Runs it on both: status, output and errors are the same but for times and places. Ours."""
        theirs, ours = self.at(self.theirs, command, stdin), self.at(self.ours, command, stdin)
        assert self._shown(ours, ordered) == self._shown(theirs, ordered), command
        return ours.stdout.decode()

    def refused(self, command: str) -> None:
        """Runs it on both: they end alike, with errors of one code."""
        theirs, ours = self.at(self.theirs, command), self.at(self.ours, command)
        told = [(done.returncode, done.stdout, done.stderr.strip().rpartition(b": ")[2]) for done in (ours, theirs)]
        assert told[0] == told[1], (command, ours.stderr, theirs.stderr)
        assert told[0][0] == 1

    def ok(self, command: str, stdin: bytes = b"") -> None:
        """Runs it on both, where what is shown on the way is a matter of speed."""
        for socket in (self.theirs, self.ours):
            done = self.at(socket, command, stdin)
            assert done.returncode == 0, (command, done.stderr)

    def collected(self) -> None:
        """Garbage is gone from both sides, and none of them is about to look for more."""
        for socket in (self.theirs, self.ours):
            for command in "leases create --id sweep", "leases rm --sync sweep":
                done = self.at(socket, command)
                assert done.returncode == 0, done.stderr

    def _shown(self, done: subprocess.CompletedProcess[bytes], ordered: bool) -> tuple[int, object, str]:
        def plain(data: bytes) -> str:
            text = data.decode(errors="backslashreplace")
            for side in ("ours", "theirs"):
                text = text.replace(str(self.directory / side), "DIR")
            for pattern, word in (_TIME, "TIME"), (_AGE, "AGE"), (_PLACE, "PLACE"), (_RATE, "RATE"):
                text = pattern.sub(word, text)
            # Labels come in any order.
            text = re.sub(r"\S+=\S+,\S+", lambda found: ",".join(sorted(found[0].split(","))), text)
            return re.sub(r"[ \t]+", " ", text)

        lines = plain(done.stdout).splitlines()
        return done.returncode, lines if ordered else sorted(lines), plain(done.stderr)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running(tmp_path_factory.mktemp("registry")) as started:
        yield started


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestNode]:
    directory = tmp_path_factory.mktemp("n")
    leaks = Leaks(str(directory))
    with NatsServer(directory / "nats") as natsd, TestNode(directory, natsd) as made:
        made.start("content", "snapshot", "gateway")
        yield made
        assert "Traceback" not in made.of("gateway").log.read_text()
    leaks.check()


@pytest.fixture(scope="module")
def both(node: TestNode, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    with containerd.running() as theirs:
        yield Both(socket_of(node), theirs.socket, tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def image(registry: Registry) -> str:
    """A reference in the registry: two layers."""
    layers = [
        images.Layer([images.directory("bin"), images.file("bin/tool", b"#!/bin/sh\n", 0o755)], compression="gzip"),
        images.Layer([images.directory("etc"), images.file("etc/motd", b"hi\n")], compression="gzip"),
    ]
    return images.push(images.Image.build(layers), registry.host, "layered", "latest")


@pytest.fixture
def pulled(both: Both, image: str) -> Iterator[str]:
    """That image, pulled on both sides, and gone from them afterwards."""
    both.ok(f"images pull --plain-http {image}")
    both.collected()
    yield image
    for socket in (both.ours, both.theirs):
        names = both.at(socket, "images ls -q").stdout.decode().split()
        both.at(socket, f"images rm --sync {shlex.join(names)}")
    assert both.same("content ls -q") == ""
    both.same("snapshots ls")


def test_a_pulled_image_is_unpacked_labelled_and_whole(both: Both, pulled: str) -> None:
    both.same("images ls")
    both.same(f"images ls -q name=={pulled}")
    both.same("images ls name==nothing")
    both.refused("images ls labels.x==")
    shown = both.same("content ls")
    assert "containerd.io/gc.ref.snapshot.overlayfs" in shown
    both.same("snapshots ls")
    both.same("snapshots tree")
    assert "complete (3/3)" in both.same("images check")
    both.same("images check -q")
    both.same("leases ls")


def test_images_are_labelled_tagged_and_removed(both: Both, pulled: str) -> None:
    both.same(f"images label {pulled} team=blue stage=test")
    both.same(f"images label {pulled} stage=")
    both.same("images ls")
    both.same("images ls labels.team==blue")
    both.same(f"images tag {pulled} other:1")
    both.same(f"images tag {pulled} other:1")
    both.same(f"images tag --force {pulled} other:1")
    both.same("images tag nothing other:2")
    both.same(f"images rm --sync {pulled}")
    assert "sha256:" in both.same("content ls -q"), "the other name still holds it"
    both.same("images rm nothing")
    both.same("images label nothing a=b")


def test_images_are_exported_imported_and_pushed(both: Both, pulled: str) -> None:
    both.same(f"images export DIR/image.tar {pulled}")
    both.same(f"images rm --sync {pulled}")
    assert both.same("content ls -q") == ""
    both.ok("images import DIR/image.tar")
    both.collected()
    both.same("images ls")
    both.same("content ls -q")
    again = f"{pulled.rpartition(':')[0]}:again"
    both.ok(f"images push --plain-http {again} {pulled}")
    both.same(f"images rm --sync {pulled}")
    both.ok(f"images pull --plain-http {again}")
    both.same("images ls")
    assert both.at(both.ours, f"images pull --plain-http {pulled}-not").returncode == 1


def test_images_are_converted(both: Both, pulled: str) -> None:
    both.same(f"images convert --uncompress {pulled} plain:1")
    both.same(f"images convert --oci {pulled} oci:1")
    both.collected()
    both.same("images ls")
    both.same("content ls -q")


def test_an_image_is_mounted_changed_and_compared(both: Both, pulled: str) -> None:
    for socket in (both.ours, both.theirs):
        both.at(socket, "version")
        directory = both.directory / ("ours" if socket == both.ours else "theirs") / "mount"
        directory.mkdir(parents=True)
        for flags in ("", "--rw"):
            assert both.at(socket, f"images mount {flags} {pulled} {directory}").returncode == 0
            try:
                assert (directory / "etc" / "motd").read_text() == "hi\n"
                if flags:
                    (directory / "etc" / "more").write_text("more\n")
            finally:
                ending = both.at(socket, f"images unmount {'--rm' if not flags else ''} {directory}")
            assert ending.returncode == 0, ending.stderr
            assert not any(directory.iterdir())
    both.same("snapshots ls")
    names = {}
    for socket in (both.ours, both.theirs):
        key = both.directory / ("ours" if socket == both.ours else "theirs") / "mount"
        layer = both.at(socket, f"snapshots diff {key}")
        assert layer.returncode == 0, layer.stderr
        names[socket] = subprocess.run(["tar", "tz"], input=layer.stdout, capture_output=True, check=True).stdout
        both.at(socket, f"snapshots rm {key}")
        both.at(socket, f"leases rm {key}")
    assert names[both.ours] == names[both.theirs] == b"etc/\netc/more\n"


def test_content_is_ingested_read_labelled_and_removed(both: Both) -> None:
    both.collected()
    both.same("content ingest --expected-size 7 wrong-size", b"hello\n")
    both.same(f"content ingest --expected-digest {NOTHING} wrong-digest", b"hello\n")
    both.same("content active", ordered=False)
    both.same(f"content ingest --expected-digest {HELLO} --expected-size 6 right", b"hello\n")
    both.same("content ingest again", b"hello\n")
    both.same(f"content ingest --expected-digest {HELLO} again", b"hello\n")
    both.same("content ls")
    both.same(f"content ls digest=={HELLO}")
    assert both.same(f"content get {HELLO}") == "hello\n"
    both.same(f"content label {HELLO} a=b c=d")
    both.same(f"content label {HELLO} a=")
    both.same("content ls")
    both.same("content ls labels.c==d")
    both.same("content ls labels.c")
    both.same(f"content label {NOTHING} a=b")
    both.same(f"content get {NOTHING}")
    both.same("content get nonsense")
    both.same(f"content rm {HELLO}")
    both.same(f"content rm {HELLO}")
    both.same("content rm nonsense")
    both.same(f"content get {HELLO}")


def test_a_blob_of_many_messages_comes_back_as_it_was(both: Both) -> None:
    both.collected()
    data = b"".join(number.to_bytes(8, "big") for number in range(1 << 20))
    both.same("content ingest large", data)
    digest = both.same("content ls -q").strip()
    for socket in (both.ours, both.theirs):
        assert both.at(socket, f"content get {digest}").stdout == data
    both.same(f"content rm {digest}")


def test_content_is_fetched_pruned_and_pushed_as_objects(both: Both, image: str) -> None:
    both.ok(f"content fetch --plain-http {image}")
    both.collected()
    both.same("images ls")
    both.same("content ls -q")
    both.same("snapshots ls")
    both.same(f"content fetch-object --plain-http {image}")
    digest = both.same("content ls -q").split()[0]
    for socket, tag in (both.theirs, "theirs"), (both.ours, "ours"):
        name = f"{image.rpartition(':')[0]}:{tag}"
        pushed = both.at(socket, f"content push-object --plain-http {name} {digest} {images.OCI}.manifest.v1+json")
        assert pushed.returncode == 0, pushed.stderr
    both.same("content prune references")
    both.same(f"images rm --sync {image}")
    assert both.same("content ls -q") == ""


def test_snapshots_live_and_die(both: Both) -> None:
    both.collected()
    both.same("snapshots prepare active-1")
    both.same("snapshots prepare active-1")
    both.same("snapshots prepare active-2 nothing")
    both.same("snapshots mounts /target active-1")
    both.same("snapshots mounts /target nothing")
    both.same("snapshots commit base active-1")
    both.same("snapshots commit other nothing")
    both.refused("snapshots mounts /target base")
    both.same("snapshots prepare active-3 base")
    both.same("snapshots mounts /target active-3")
    both.same("snapshots rm base")
    both.same("snapshots tree")
    both.same("snapshots ls")
    both.same("snapshots info base")
    both.same("snapshots info nothing")
    both.same("snapshots label base a=b")
    both.same("snapshots label base a=")
    both.same("snapshots label nothing a=b")
    both.same("snapshots info base")
    both.same("snapshots usage base active-3")
    both.same("snapshots rm active-3 base")
    both.same("snapshots rm base")
    both.same("snapshots ls")


def test_a_view_is_of_a_committed_snapshot_and_cant_be_committed(both: Both) -> None:
    both.collected()
    both.same("snapshots prepare writable")
    both.refused("snapshots view view-1 writable")
    both.same("snapshots commit below writable")
    both.same("snapshots view view-1 below")
    both.same("snapshots mounts /target view-1")
    both.same("snapshots commit below view-1")
    both.refused("snapshots commit other view-1")
    both.same("snapshots rm view-1 below")


def test_other_snapshotters_are_asked_by_their_names(both: Both) -> None:
    both.same("snapshots --snapshotter native prepare one")
    both.same("snapshots --snapshotter native ls")
    both.same("snapshots ls")
    both.same("snapshots --snapshotter native rm one")
    both.same("snapshots --snapshotter nothing ls")
    both.same("snapshots --snapshotter nothing prepare one")


def test_an_image_is_unpacked_into_another_snapshotter(both: Both, pulled: str) -> None:
    digest = both.same("images ls name==" + pulled).splitlines()[1].split()[2]
    both.same(f"snapshots --snapshotter native unpack {digest}")
    both.collected()
    both.same("snapshots --snapshotter native ls")
    both.same("content ls")


def test_leases_are_made_listed_and_ended(both: Both) -> None:
    both.same("leases create --id one -x 1h a=b")
    both.same("leases create --id one")
    both.same("leases create --id two")
    both.same("leases ls")
    both.same("leases ls -q")
    both.same("leases ls id==two")
    both.same("leases ls labels.a==b")
    both.same("leases rm one")
    both.same("leases rm one")
    both.same("leases rm --sync two")
    assert both.same("leases ls -q") == ""


def test_namespaces_see_their_own_alone(both: Both) -> None:
    both.collected()
    both.same("--namespace elsewhere content ingest mine", b"hello\n")
    both.same("--namespace elsewhere content ls -q")
    assert both.same("content ls -q") == ""
    both.same(f"content get {HELLO}")
    both.same("namespaces ls -q", ordered=False)
    both.same(f"--namespace elsewhere content rm {HELLO}")
