"""References, platforms and manifests, without a bus."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shoal_bus import image_reference as reference
from shoal_bus.errors import FailedPrecondition, InvalidArgument, NotFound, ShoalError
from shoal_bus.types import Descriptor, Platform
from shoal_content import media
from shoal_content.images import platforms
from shoal_content.images.tree import choose_manifest
from shoal_content.registry import credentials
from shoal_content.registry.auth import _parameters
from shoal_content.transfer.progress import Rate

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("short", "whole"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("busybox:1.36", "docker.io/library/busybox:1.36"),
        ("team/app", "docker.io/team/app:latest"),
        ("docker.io/busybox", "docker.io/library/busybox:latest"),
        ("index.docker.io/team/app", "docker.io/team/app:latest"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app", "localhost:5000/app:latest"),
        ("[::1]:5000/app:1", "[::1]:5000/app:1"),
        ("ghcr.io/a/b__c/d-e.f:v1.0_x-y", "ghcr.io/a/b__c/d-e.f:v1.0_x-y"),
        (f"busybox@{DIGEST}", f"docker.io/library/busybox@{DIGEST}"),
        (f"r.example/x:1@{DIGEST}", f"r.example/x:1@{DIGEST}"),
    ],
)
def test_reference_gets_dockers_defaults(short: str, whole: str) -> None:
    assert str(reference.parse(short)) == whole
    assert str(reference.parse(whole)) == whole


@pytest.mark.parametrize(
    "text",
    ["", ":", "a:", "a:b:c", "a//b", "/a", "a/", "team/APP", "a@sha256:12", "a@", "-a", "a b", "a\nb", "é", "a" * 64,
     "x/" + "y" * 300, "r.example:port/x", "a:" + "t" * 129, "../../etc", "a/../b"],
)  # fmt: skip
def test_what_is_no_reference_is_invalid_argument(text: str) -> None:
    with pytest.raises(InvalidArgument):
        reference.parse(text)


@given(st.text(max_size=80))
def test_parsing_a_reference_twice_changes_nothing(text: str) -> None:
    try:
        once = str(reference.parse(text))
    except InvalidArgument:
        return
    assert str(reference.parse(once)) == once


def test_platform_spellings_are_one() -> None:
    assert str(platforms.parse("linux/x86_64")) == "linux/amd64"
    assert str(platforms.parse("aarch64")) == "linux/arm64"
    assert str(platforms.parse("linux/arm64/v8")) == "linux/arm64"
    assert str(platforms.parse("linux/armhf")) == "linux/arm/v7"
    for bad in ("", "/", "linux/", "a/b/c/d", "lin ux/amd64"):
        with pytest.raises(InvalidArgument):
            platforms.parse(bad)


def _offer(*texts: str) -> list[Descriptor]:
    made = []
    for number, text in enumerate(texts):
        os, architecture, *variant = text.split("/")
        platform = Platform(os=os, architecture=architecture, variant="".join(variant))
        digest = f"sha256:{number:064x}"
        made.append(Descriptor(media_type=media.OCI_MANIFEST, digest=digest, size=1, platform=platform))
    return made


def test_best_variant_is_chosen_and_a_later_one_never() -> None:
    offered = _offer("linux/arm/v5", "linux/arm/v7", "linux/arm/v6", "linux/arm64")
    assert choose_manifest("x", offered, "linux/arm/v7") is offered[1]
    assert choose_manifest("x", offered, "linux/arm/v6") is offered[2]
    assert choose_manifest("x", offered, "linux/arm64") is offered[3]
    levels = _offer("linux/amd64/v3", "linux/amd64")
    assert choose_manifest("x", levels, "linux/amd64") is levels[1]
    assert choose_manifest("x", levels, "linux/amd64/v4") is levels[0]
    with pytest.raises(NotFound, match=r"linux/amd64/v3"):
        choose_manifest("x", levels[:1], "linux/amd64/v2")


def test_chain_ids_follow_the_specification() -> None:
    one, two = ("sha256:" + hashlib.sha256(text).hexdigest() for text in (b"1", b"2"))
    chain = media.chain_ids([one, two])
    assert chain == [one, "sha256:" + hashlib.sha256(f"{one} {two}".encode()).hexdigest()]
    assert media.chain_ids([]) == []


def test_schema_1_and_other_artifacts_are_refused() -> None:
    with pytest.raises(FailedPrecondition, match="schema 1"):
        media.kind_of(b'{"schemaVersion": 1}', "application/vnd.docker.distribution.manifest.v1+prettyjws")
    with pytest.raises(FailedPrecondition, match="isn't an image's"):
        media.kind_of(b'{"schemaVersion": 2}', "text/html")
    with pytest.raises(FailedPrecondition, match="isn't JSON"):
        media.kind_of(b"<html>", "text/html")
    assert media.kind_of(b'{"schemaVersion": 2, "manifests": []}', "application/json") == media.OCI_INDEX


def test_a_document_that_is_index_and_manifest_at_once_is_refused() -> None:
    one = {"mediaType": media.OCI_MANIFEST, "digest": DIGEST, "size": 1}
    for more in {"layers": [one]}, {"config": one}, {"layers": [one], "config": one}:
        for media_type in media.OCI_INDEX, media.OCI_MANIFEST, "":
            document = {"schemaVersion": 2, "mediaType": media_type, "manifests": [one], **more}
            data = json.dumps(document).encode()
            for read in (media.read_index, media.read_manifest, lambda d, m=media_type: media.kind_of(d, m)):
                with pytest.raises(FailedPrecondition, match="at once"):
                    read(data)


def test_a_document_leads_where_it_says_whatever_it_is_called() -> None:
    digests = [f"sha256:{number:064x}" for number in range(5)]
    entries = [{"mediaType": "application/octet-stream", "digest": one} for one in digests]
    document = {"mediaType": "text/html", "manifests": entries[:2], "layers": [*entries[2:4], "x", {"digest": "bad"}],
                "config": entries[4], "subject": {"digest": DIGEST}}  # fmt: skip
    assert set(media.references(json.dumps(document).encode())) == set(digests)
    for other in (b"", b"[]", b"{", b"[" * 100_000, b"\xff", b'{"manifests": {"digest": 1}, "config": []}'):
        assert media.references(other) == []


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["layers", "config", "manifests", "digest", "size", "mediaType", "platform", "rootfs",
                         "diff_ids", "annotations", "os", "architecture"]), inner, max_size=5),
    max_leaves=12,
)  # fmt: skip


@given(_JSON)
def test_hostile_documents_are_refused_and_never_crash(document: object) -> None:
    data = json.dumps(document).encode()
    for read in (
        media.read_index,
        media.read_manifest,
        media.read_config,
        lambda d: media.kind_of(d, ""),
        media.references,
    ):
        try:
            read(data)
        except ShoalError:
            continue


def test_challenge_parameters_may_be_quoted_or_not() -> None:
    text = 'realm="https://auth.example/token?a=1,b",service=registry,scope="repository:x:pull"'
    assert _parameters(text) == {
        "realm": "https://auth.example/token?a=1,b", "service": "registry", "scope": "repository:x:pull",
    }  # fmt: skip


async def test_credentials_come_from_dockers_configuration_and_stay_out_of_sight(tmp_path: object) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / "config.json"
    path.write_text(
        json.dumps({"auths": {"r.example": {"auth": "dTpzZWNyZXQ="}, "https://t.example/": {"identitytoken": "tok"}}})
    )
    found = await credentials.find("r.example", path)
    assert found is not None
    assert (found.user, found.password) == ("u", "secret")
    assert "secret" not in repr(found)
    token = await credentials.find("t.example", path)
    assert token is not None
    assert token.identity_token == "tok"
    assert await credentials.find("other.example", path) is None
    path.write_text("not json")
    assert await credentials.find("r.example", path) is None


def test_the_rate_is_that_of_the_last_seconds() -> None:
    rate = Rate()
    assert rate.of(0, 100.0) == 0.0
    assert rate.of(5_000, 101.0) == 5_000.0
    for tenth in range(1, 100):
        rate.of(5_000, 101.0 + tenth / 10)
    assert rate.of(5_000, 111.0) == 0.0
    for tenth in range(1, 50):
        rate.of(5_000 + tenth * 200, 111.0 + tenth / 10)
    assert rate.of(15_000, 116.0) == pytest.approx(2_000.0, rel=0.2)
