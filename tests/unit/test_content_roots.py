"""The mark, on a database of its own: what is a root, what leads where, and what an epoch keeps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shoal_bus.api.runtime import CollectibleMount
from shoal_bus.collection import Holder, LabelledSnapshot, expiry, is_root
from shoal_bus.database import Database
from shoal_content.collection.roots import Elsewhere, Mark, Node, back_references, changed_since, mark, references
from shoal_content.schema import MIGRATIONS

NOW = 1_000_000.0
REF, BREF, ROOT, EXPIRE = (f"containerd.io/gc.{word}" for word in ("ref.", "bref.", "root", "expire"))

INGEST = "INSERT INTO ingests (namespace, ref, file, total, expected, pull, labels, started_at, updated_at) VALUES"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(tmp_path / "metadata.db", "n", MIGRATIONS)
    yield opened
    opened.close()


class Made:
    """Rows as the service writes them."""

    def __init__(self, database: Database) -> None:
        self.db = database

    def run(self, sql: str, *parameters: object) -> None:
        with self.db.write() as tx:
            tx.execute(sql, parameters)

    def blob(self, digest: str, *children: str, namespace: str = "ns", **labels: str) -> None:
        self.run("INSERT OR IGNORE INTO blobs VALUES (?, 1)", digest)
        self.run("INSERT INTO visible VALUES (?, ?, ?, 0, 0)", namespace, digest, json.dumps(labels))
        for child in children:
            self.run("INSERT OR IGNORE INTO blob_references VALUES (?, ?)", digest, child)

    def image(self, name: str, digest: str, namespace: str = "ns", **labels: str) -> None:
        target = json.dumps({"digest": digest})
        self.run("INSERT INTO images VALUES (?, ?, ?, ?, 0, 0, '')", namespace, name, target, json.dumps(labels))

    def lease(self, id: str, *resources: tuple[str, str], **labels: str) -> None:
        self.run("INSERT INTO leases VALUES ('ns', ?, ?, 0)", id, json.dumps(labels))
        for type, what in resources:
            self.run("INSERT INTO lease_resources VALUES ('ns', ?, ?, ?)", id, type, what)

    def open(self) -> None:
        self.run("DELETE FROM collection_kept")
        self.run("UPDATE collection SET open = 1")

    def marked(
        self,
        *holders: Holder,
        snapshots: tuple[LabelledSnapshot, ...] = (),
        mounts: tuple[CollectibleMount, ...] = (),
        asked: bool = True,
    ) -> Mark:
        return mark(self.db.read, Elsewhere(holders, snapshots, mounts), NOW, asked=asked)

    def garbage(self, *holders: Holder) -> set[str]:
        return {node.id for node in self.marked(*holders).garbage}


@pytest.fixture
def made(database: Database) -> Made:
    return Made(database)


def test_references_are_named_as_containerd_names_them() -> None:
    labels = {
        f"{REF}content": "1", f"{REF}content.l.0": "2", f"{REF}content/x": "3", f"{REF}contents": "no",
        f"{REF}snapshot.overlayfs": "4", f"{REF}snapshot.native/any/thing": "5", f"{REF}image": "6",
        f"{BREF}content": "7", "containerd.io/gc.reference": "no",
    }  # fmt: skip
    assert set(references("ns", labels)) == {
        Node("ns", "content", "1"), Node("ns", "content", "2"), Node("ns", "content", "3"),
        Node("ns", "snapshots/overlayfs", "4"), Node("ns", "snapshots/native", "5"), Node("ns", "images", "6"),
    }  # fmt: skip
    labels = {
        f"{BREF}container.x": "c",
        f"{BREF}snapshot.overlayfs/1": "s",
        f"{BREF}image/1": "i",
        f"{BREF}content": "d",
    }
    assert set(back_references("ns", labels)) == {
        Node("ns", "containers", "c"), Node("ns", "snapshots/overlayfs", "s"), Node("ns", "images", "i"),
        Node("ns", "content", "d"),
    }  # fmt: skip


@given(st.dictionaries(st.text(max_size=60) | st.text(max_size=8).map(lambda t: REF + t), st.text(max_size=20)))
def test_no_label_breaks_a_mark(labels: dict[str, str]) -> None:
    list(references("ns", labels))
    list(back_references("ns", labels))
    is_root(labels, NOW)


def test_an_expiry_is_a_time_and_anything_else_is_none() -> None:
    assert expiry({EXPIRE: "1970-01-01T00:01:40Z"}) == 100
    assert expiry({EXPIRE: "1970-01-01T01:01:40.5+01:00"}) == 100.5
    for text in "", "soon", "1", "99999-01-01T00:00:00Z":
        assert expiry({EXPIRE: text}) is None
        assert not is_root({EXPIRE: text}, NOW)


def test_cycles_of_labels_hold_nothing(made: Made) -> None:
    made.blob("a", **{f"{REF}content": "b"})
    made.blob("b", **{f"{REF}content": "a"})
    made.blob("self", "self")
    made.blob("config", **{f"{REF}snapshot.overlayfs": "top"})
    back = LabelledSnapshot(
        namespace="ns", snapshotter="overlayfs", key="top", labels={f"{REF}content": "config"}, held=False
    )
    found = made.marked(snapshots=(back,))
    assert {node.id for node in found.garbage} == {"a", "b", "self", "config"}
    assert Node("ns", "snapshots/overlayfs", "top") not in found.reached
    held = back.model_copy(update={"held": True})
    assert "config" not in {node.id for node in made.marked(snapshots=(held,)).garbage}


def test_documents_lead_to_what_they_name_in_their_own_namespace(made: Made) -> None:
    made.blob("index", "m1", "m2")
    made.blob("m1", "layer")
    made.blob("layer")
    made.blob("layer", namespace="other")
    made.image("i", "index")
    assert [(node.namespace, node.id) for node in made.marked().garbage] == [("other", "layer")]


def test_a_deep_tree_and_a_wide_one_are_walked(made: Made) -> None:
    with made.db.write() as tx:
        for number in range(3000):
            tx.execute("INSERT INTO blobs VALUES (?, 1)", (f"d{number}",))
            tx.execute("INSERT INTO visible VALUES ('ns', ?, '{{}}', 0, 0)", (f"d{number}",))
            tx.execute("INSERT INTO blob_references VALUES (?, ?)", (f"d{number}", f"d{number + 1}"))
    made.image("i", "d0")
    assert made.garbage() == set()
    made.run("DELETE FROM images")
    assert len(made.garbage()) == 3000


def test_who_holds_what(made: Made) -> None:
    for digest in "image", "lease", "expired", "flat", "hold", "ingest", "container", "companion", "loose":
        made.blob(digest, f"under {digest}")
        made.blob(f"under {digest}")
    made.image("i", "image")
    made.lease("living", ("content", "lease"), **{EXPIRE: "1970-01-12T13:46:41Z"})
    made.lease("over", ("content", "expired"), **{EXPIRE: "1970-01-12T13:46:40Z"})
    made.lease("flat", ("content", "flat"), **{"containerd.io/gc.flat": ""})
    made.run("INSERT INTO pulls VALUES ('p', 'ns', 'x')")
    made.run("INSERT INTO holds VALUES ('p', 'ns', '', 'hold')")
    made.run("INSERT INTO holds VALUES ('p', 'ns', 'overlayfs', 'chain')")
    made.run(
        f"{INGEST} ('ns', 'new', 'f1', 0, 'ingest', '', '{{}}', 0, ?)",
        NOW - 86_399,
    )
    made.run(
        f"{INGEST} ('ns', 'old', 'f2', 0, 'loose', '', '{{}}', 0, ?)",
        NOW - 86_401,
    )
    made.run(f"{INGEST} ('ns', 'pulled', 'f3', 0, '', 'p', '{{}}', 0, 0)")
    made.run("UPDATE visible SET labels = ? WHERE digest = 'companion'", json.dumps({f"{BREF}container": "c"}))
    holder = Holder(namespace="ns", id="c", snapshots=[("overlayfs", "c")], labels={f"{REF}content.0": "container"})
    found = made.marked(holder)
    assert {node.id for node in found.garbage} == {
        "over", "expired", "under expired", "under flat", "old", "loose", "under loose"
    }  # fmt: skip
    snapshots = {node.id for node in found.reached if node.type == "snapshots/overlayfs"}
    assert snapshots == {"chain", "c"}


def test_what_was_a_root_within_the_epoch_stays_for_this_once(made: Made) -> None:
    for digest in "deleted", "retagged", "leased", "held", "unlabelled", "reference", "untouched":
        made.blob(digest, f"under {digest}")
        made.blob(f"under {digest}")
    made.image("deleted", "deleted")
    made.image("retagged", "retagged")
    made.lease("l", ("content", "leased"), ("snapshots/overlayfs", "leased"))
    made.run("INSERT INTO pulls VALUES ('p', 'ns', 'x')")
    made.run("INSERT INTO holds VALUES ('p', 'ns', '', 'held')")
    made.run("INSERT INTO holds VALUES ('p', 'ns', 'native', 'held')")
    made.run(
        "UPDATE visible SET labels = ? WHERE digest = 'unlabelled'",
        json.dumps({ROOT: "", f"{REF}content": "reference"}),
    )
    made.open()
    made.run("DELETE FROM images WHERE name = 'deleted'")
    made.run("UPDATE images SET target = ? WHERE name = 'retagged'", json.dumps({"digest": "elsewhere"}))
    made.run("DELETE FROM leases")
    made.run("DELETE FROM holds")
    made.run("UPDATE visible SET labels = '{}' WHERE digest = 'unlabelled'")
    made.blob("made since", "under untouched")
    found = made.marked()
    assert {node.id for node in found.garbage} == {"untouched"}
    assert Node("ns", "snapshots/overlayfs", "leased") in found.reached
    assert Node("ns", "snapshots/native", "held") in found.reached
    made.open()  # the next one
    assert len(made.garbage()) == 15


def test_what_changes_between_mark_and_sweep_is_spared(made: Made) -> None:
    for digest in "imaged", "retargeted", "leased", "held", "labelled", "root", "named", "chosen", "loose":
        made.blob(digest, f"under {digest}")
        made.blob(f"under {digest}")
    made.image("there", "nowhere")
    made.image("expired", "chosen", **{EXPIRE: "1970-01-01T00:00:00Z"})
    made.lease("l")
    made.run("INSERT INTO pulls VALUES ('p', 'ns', 'x')")
    made.open()
    found = made.marked()
    everything = {node.id for node in found.garbage}
    assert len(everything) == 19
    made.image("new", "imaged", **{f"{REF}content": "named"})
    made.run("UPDATE images SET target = ? WHERE name = 'there'", json.dumps({"digest": "retargeted"}))
    made.run("INSERT INTO lease_resources VALUES ('ns', 'l', 'content', 'leased')")
    made.run("INSERT INTO lease_resources VALUES ('ns', 'l', 'images', 'expired')")
    made.run("INSERT INTO holds VALUES ('p', 'ns', '', 'held')")
    made.run("UPDATE visible SET labels = ? WHERE digest = 'root'", json.dumps({ROOT: "", f"{REF}content": "labelled"}))
    found.spare(changed_since(made.db.read, found.seen))
    assert {node.id for node in found.garbage} == {"loose", "under loose", "under root"}
    assert {node.id for node in made.marked().garbage} == {"loose", "under loose", "under root"}


def test_deletions_are_noted_and_additions_are_not(made: Made) -> None:
    def wanted() -> bool:
        row = made.db.read_one("SELECT wanted FROM collection")
        was = bool(row is not None and row["wanted"])
        made.run("UPDATE collection SET wanted = 0")
        return was

    assert wanted()  # at first
    made.blob("b")
    made.image("i", "b")
    made.lease("l", ("content", "b"))
    assert not wanted()
    for sql in (
        "UPDATE images SET target = '{\"digest\": \"c\"}'", "DELETE FROM images", "DELETE FROM lease_resources",
        "DELETE FROM leases",
    ):  # fmt: skip
        made.run(sql)
        assert wanted(), sql


def mounted(name: str, lease: str = "", *, age: float = 0.0, **labels: str) -> CollectibleMount:
    at = datetime.fromtimestamp(NOW - age, UTC)
    return CollectibleMount(namespace="ns", name=name, lease=lease, labels=labels, created_at=at)


def test_mounts_are_held_by_leases_and_by_what_they_refer_back_to(made: Made) -> None:
    made.lease("living", **{"containerd.io/gc.flat": ""})
    made.lease("expired", **{EXPIRE: "1970-01-01T00:00:00Z"})
    made.lease("of-blobs", ("content", "blob"))
    made.blob("blob", **{f"{REF}mount.a": "referred"})
    made.image("image", "nowhere")
    found = made.marked(
        Holder(namespace="ns", id="web", snapshots=[("overlayfs", "own")]),
        mounts=(
            mounted("leased", "living"),
            mounted("referred"),
            mounted("of-container", **{f"{BREF}container": "web"}),
            mounted("of-snapshot", "gone", **{f"{BREF}snapshot.overlayfs/x": "own"}),
            mounted("of-image", **{f"{BREF}image/a": "image"}),
            mounted("of-nobody", **{f"{BREF}container": "other"}),
            mounted("once-leased", "gone"),
            mounted("of-expired", "expired"),
            mounted("loose"),
        ),
    )
    assert [node.id for node in found.mounts] == ["of-nobody", "once-leased", "of-expired", "loose"]
    assert {node.type for node in found.mounts} == {"mounts"}


def test_mounts_made_of_late_under_no_lease_stay_where_nobody_asks(made: Made) -> None:
    mounts = (mounted("new"), mounted("old", age=90_000), mounted("once-leased", "gone"))
    assert [node.id for node in made.marked(mounts=mounts, asked=False).mounts] == ["old", "once-leased"]
    assert [node.id for node in made.marked(mounts=mounts).mounts] == ["new", "old", "once-leased"]
