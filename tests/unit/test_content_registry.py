"""What registries and configurations say, read without a bus: headers, tokens, hosts.toml, helpers, sealed secrets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shoal_bus import sealing
from shoal_bus.errors import FailedPrecondition, InvalidArgument
from shoal_bus.image_reference import Reference, parse
from shoal_content.registry import credentials, headers, referrers
from shoal_content.registry.auth import _merged
from shoal_content.registry.credentials import Credential
from shoal_content.registry.hosts import PUSH, Host, hosts_of
from shoal_content.registry.tokens import Tokens, lifetime
from yarl import URL

# -------------------------------------------------------------------------------------------------------------- headers


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("5", 5.0), (" 7 ", 7.0), ("0", 0.0), ("", 0.0), ("²", 0.0), ("-1", 0.0), ("1.5", 0.0), ("9" * 5000, 0.0),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 60.0), ("Thu, 01 Jan 1970 00:00:01 GMT", 0.0), ("Thu, 99 Foo 1970", 0.0),
        ("Thu, 01 Jan 99999999 00:00:00 GMT", 0.0), ("\0", 0.0),
    ],
)  # fmt: skip
def test_retry_after_is_seconds_or_a_date(value: str, seconds: float) -> None:
    assert headers.retry_after(value, now=40.0) == seconds


@given(st.text(max_size=60))
def test_no_header_makes_its_reader_fail(text: str) -> None:
    assert headers.retry_after(text) >= 0
    headers.first_byte(text)
    headers.first_byte(f"bytes {text}")
    headers.bytes_taken(text)
    headers.next_page(text)
    try:
        found = headers.target(URL("https://r.example/v2/"), text)
    except ValueError:
        return
    assert found.scheme == "https"
    assert found.host


@pytest.mark.parametrize(
    ("value", "first"),
    [("bytes 5-9/10", 5), ("bytes 0-0/*", 0), ("bytes */10", None), ("bytes ²-3/4", None), ("items 1-2/3", None),
     (f"bytes {'9' * 5000}-/1", None), ("", None)],
)  # fmt: skip
def test_content_range_says_where_a_body_begins(value: str, first: int | None) -> None:
    assert headers.first_byte(value) == first


@pytest.mark.parametrize(
    ("value", "taken"),
    [("0-0", 0), ("0-99", 100), ("bytes=0-99", 100), ("1-99", None), ("0-", None), ("0-²", None), ("", None)],
)
def test_range_says_how_much_of_an_upload_was_taken(value: str, taken: int | None) -> None:
    assert headers.bytes_taken(value) == taken


@pytest.mark.parametrize(
    "location",
    ["", "http://[bad", "https://r.example:99999/", "ftp://r.example/", "https://user:pw@r.example/", "http:///",
     "http://r.example/x", "/a b", "/é", "/\x00", "https://r.example:0/"],
)  # fmt: skip
def test_location_that_leads_nowhere_or_out_of_tls_is_a_value_error(location: str) -> None:
    with pytest.raises(ValueError, match=r"it |IPv6|Port"):
        headers.target(URL("https://r.example/v2/app/"), location)


def test_location_stays_as_it_was_written() -> None:
    signed = "https://cdn.example/b%2Flob?X-Sig=a%2Bb%3D=&x=%e2"
    assert str(headers.target(URL("https://r.example/v2/"), signed)) == signed
    assert str(headers.with_query(URL(signed, encoded=True), "digest", "sha256:0")) == f"{signed}&digest=sha256:0"
    assert str(headers.target(URL("http://r.example/v2/a/"), "?_state=x==")) == "http://r.example/v2/a/?_state=x=="


def test_link_to_the_next_page_is_found_among_others() -> None:
    assert headers.next_page('</first>; rel="first", </v2/x?n=2>; rel="next"') == "/v2/x?n=2"
    assert headers.next_page("</v2/x>; rel=next") == "/v2/x"
    assert headers.next_page('</v2/x>; rel="prev"') == ""


# --------------------------------------------------------------------------------------------------------------- tokens


def test_token_is_kept_for_its_credential_alone_and_until_it_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    tokens, mine = Tokens(), Credential("me", "secret")
    tokens.put("https://r.example", ("repository:a:pull",), mine, "Bearer mine", 50)
    assert tokens.get("https://r.example", ("repository:a:pull",), Credential("me", "secret")) == "Bearer mine"
    for other in (None, Credential("me", "other"), Credential("mes", "ecret"), Credential(identity_token="secret")):
        assert tokens.get("https://r.example", ("repository:a:pull",), other) == ""
    assert tokens.get("https://r.example", ("repository:a:pull,push",), mine) == ""
    assert tokens.get("https://other.example", ("repository:a:pull",), mine) == ""
    now = 1050.0
    assert tokens.get("https://r.example", ("repository:a:pull",), mine) == ""
    for number in range(5000):
        tokens.put("https://r.example", (str(number),), None, "x", 1e9)
    assert len(tokens._kept) <= 1024


@pytest.mark.parametrize(
    "said", [None, "300", True, -5, 0, float("nan"), float("inf"), -float("inf"), 10**400, [], 1e308]
)
def test_lifetime_of_a_token_is_bounded_whatever_its_service_says(said: object) -> None:
    assert 0 < lifetime(said) <= 6 * 3600


def test_scopes_are_asked_for_together() -> None:
    wanted = ("repository:a:pull,push", "repository:b:pull")
    assert _merged(wanted, "repository:a:pull") == ["repository:a:pull,push", "repository:b:pull"]
    assert _merged(wanted, "registry:catalog:*") == [*wanted, "registry:catalog:*"]
    assert _merged(("repository:a:pull",), "repository:a:delete") == ["repository:a:pull,delete"]


# ----------------------------------------------------------------------------------------------------------- hosts.toml


def hosts(
    directory: Path, name: str, text: str | None = None, *, place: str = "", plain_http: bool = False
) -> list[Host]:
    reference = parse(name)
    if text is not None:
        (directory / (place or reference.domain)).mkdir(parents=True, exist_ok=True)
        (directory / (place or reference.domain) / "hosts.toml").write_text(text)
    return hosts_of(reference, directory, plain_http=plain_http)


def test_without_a_file_it_is_the_registry_itself_over_tls(tmp_path: Path) -> None:
    [hub] = hosts(tmp_path, "busybox")
    assert (str(hub.url), hub.mirrors, hub.server) == ("https://registry-1.docker.io/v2", "", True)
    [local] = hosts(tmp_path, "localhost:5000/app")
    assert (str(local.url), local.trusted) == ("http://localhost:5000/v2", True)
    [asked] = hosts(tmp_path, "r.example:5000/app", plain_http=True)
    assert (str(asked.url), asked.trusted) == ("http://r.example:5000/v2", False)


def test_mirrors_come_before_the_server_in_the_order_of_the_file(tmp_path: Path) -> None:
    found = hosts(
        tmp_path,
        "busybox",
        """
        server = "https://registry-1.docker.io"
        [host."https://b.example"]
        capabilities = ["pull", "resolve"]
        [host."http://a.example:5000/some/path"]
        override_path = true
        dial_timeout = "1500ms"
        [host."c.example".header]
        x-team = ["blue", "green"]
        """,
    )
    assert [str(one.url) for one in found] == [
        "https://b.example/v2", "http://a.example:5000/some/path", "https://c.example/v2", "https://registry-1.docker.io/v2",
    ]  # fmt: skip
    assert [one.mirrors for one in found] == ["docker.io"] * 3 + [""]
    assert [one.server for one in found] == [False, False, False, True]
    assert PUSH not in found[0].capabilities
    assert found[1].connect_seconds == 1.5
    assert found[1].trusted
    assert found[2].headers == (("x-team", "blue"), ("x-team", "green"))


@pytest.mark.parametrize("place", ["r.example_5000_", "r.example:5000", "_default"])
def test_file_is_found_by_each_of_its_names(tmp_path: Path, place: str) -> None:
    found = hosts(tmp_path, "r.example:5000/app", '[host."https://mirror.example"]', place=place)
    assert [one.domain for one in found] == ["mirror.example", "r.example:5000"]
    if place == "_default":
        assert [one.domain for one in hosts(tmp_path, "other.example/app")] == ["mirror.example", "other.example"]


def test_file_is_read_anew(tmp_path: Path) -> None:
    assert len(hosts(tmp_path, "r.example/app", '[host."https://a.example"]')) == 2
    assert len(hosts(tmp_path, "r.example/app", '[host."https://a.example"]\n[host."https://b.example"]')) == 3


def test_repositories_are_rewritten(tmp_path: Path) -> None:
    mirror, server = hosts(
        tmp_path,
        "busybox",
        """
        [host."https://mirror.example".rewrite]
        "^library/(.*)$" = "hub/$1"
        "^team/" = "${0}x/"
        "^bad" = "../../etc"
        "^worse" = "$7/x"
        "^worst" = "${name}"
        """,
    )
    assert mirror.repository("library/busybox") == "hub/busybox"
    assert mirror.repository("other/app") == "other/app"
    assert server.repository("library/busybox") == "library/busybox"
    assert mirror.repository("team/app") == "team/x/app"
    for path in ("bad/app", "worse/app", "worst/app"):
        with pytest.raises(FailedPrecondition, match="rewritten"):
            mirror.repository(path)


@pytest.mark.parametrize(
    "text",
    [
        "not toml", "server = 5", "host = 5", '[host."ftp://x"]', '[host."https://x:99999"]', '[host."https://u:p@x"]',
        '[host."https://x?y=1"]', '[host."https://x"]\nca = "missing.pem"', '[host."https://x"]\nca = 5',
        '[host."https://x"]\nclient = [["a", "b", "c"]]', '[host."https://x"]\nskip_verify = "yes"',
        '[host."https://x"]\nmisspelt = true', '[host."https://x".header]\n"a b" = "c"',
        '[host."https://x".header]\na = "b\\r\\nEvil: 1"', '[host."https://x".rewrite]\n"(" = "x"',
        '[host."https://x"]\ndial_timeout = "soon"', '[host."https://x"]\nclient = "missing.pem"', "\0",
        "server = 1e400",
        "server = " + "[" * 5000,
    ],
)  # fmt: skip
def test_file_that_makes_no_sense_says_where_it_is(tmp_path: Path, text: str) -> None:
    with pytest.raises(FailedPrecondition, match=r"r\.example/hosts\.toml"):
        hosts(tmp_path, "r.example/app", text)


def test_directory_or_name_that_leads_elsewhere_is_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "r.example").mkdir()
    assert len(hosts(tmp_path, "r.example/app")) == 1
    assert len(hosts(tmp_path / "nowhere", "r.example/app")) == 1
    with pytest.raises(FailedPrecondition, match="not a host"):
        hosts_of(Reference("r.example:99999", "app", "v1"), tmp_path)


# -------------------------------------------------------------------------------------------------------------- helpers


def helper(directory: Path, name: str, script: str) -> None:
    path = directory / f"docker-credential-{name}"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def config(directory: Path, document: object) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(document))
    return path


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "programs"
    place.mkdir()
    monkeypatch.setenv("PATH", f"{place}:/usr/bin:/bin")
    return place


async def test_helper_is_asked_for_the_registry(programs: Path, tmp_path: Path) -> None:
    helper(programs, "own", 'read host; printf \'{"Username": "%s", "Secret": "s1"}\' "$1-$host"')
    helper(programs, "all", 'printf \'{"Username": "<token>", "Secret": "s2"}\'')
    path = config(tmp_path, {"credHelpers": {"r.example": "own"}, "credsStore": "all"})
    found = await credentials.find("r.example", path)
    assert found == Credential("get-r.example", "s1")
    assert "s1" not in repr(found)
    assert await credentials.find("t.example", path) == Credential(identity_token="s2")
    assert await credentials.find("docker.io", path) == Credential(identity_token="s2")


@pytest.mark.parametrize(
    "script",
    ["exit 1", "echo 'credentials not found in native keychain'; exit 1", "echo not json", "echo '[]'", "kill -9 $$",
     "echo '{}'", "exec cat /dev/zero"],
)  # fmt: skip
async def test_helper_that_has_nothing_leaves_it_to_the_rest(programs: Path, tmp_path: Path, script: str) -> None:
    helper(programs, "broken", script)
    auths = {"r.example": {"username": "u", "password": "p"}}
    path = config(tmp_path, {"credsStore": "broken", "auths": auths})
    assert await credentials.find("r.example", path) == Credential("u", "p")


async def test_helper_that_hangs_is_ended(programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "_HELPER_SECONDS", 0.3)
    marker = tmp_path / "pid"
    helper(programs, "slow", f"echo $$ > {marker}; exec sleep 1000")
    assert await credentials.find("r.example", config(tmp_path, {"credsStore": "slow"})) is None
    assert not Path(f"/proc/{marker.read_text().strip()}").exists()


@pytest.mark.parametrize("name", ["../../bin/sh", "a b", "", "x;y", "é", "none-such"])
async def test_helper_whose_name_is_no_program_is_none(programs: Path, tmp_path: Path, name: str) -> None:
    path = config(tmp_path, {"credHelpers": {"r.example": name}})
    assert await credentials.find("r.example", path) is None


@pytest.mark.parametrize(
    ("key", "entry", "found"),
    [
        ("https://r.example/v1/", {"auth": "dTpw"}, Credential("u", "p")),
        ("r.example", {"registrytoken": "t"}, Credential(token="t")),
        ("http://r.example", {"auth": "dTpw"}, Credential("u", "p")),
        ("r.example", {"auth": "!"}, None),
        ("r.example", {}, None),
        ("r.example", 5, None),
        ("r.example:5000", {"auth": "dTpw"}, None),
    ],
)
async def test_entry_is_found_however_docker_wrote_it(
    tmp_path: Path, key: str, entry: object, found: Credential | None
) -> None:
    assert await credentials.find("r.example", config(tmp_path, {"auths": {key: entry}})) == found


# -------------------------------------------------------------------------------------------------------------- sealing


def test_sealed_secret_is_for_one_key_alone(tmp_path: Path) -> None:
    key, other = sealing.private_key(tmp_path / "key"), sealing.private_key(tmp_path / "other")
    assert sealing.private_key(tmp_path / "key") == key
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    sealed = sealing.seal(sealing.public_key(key), b"secret")
    assert b"secret" not in sealed
    assert sealing.unseal(key, sealed) == b"secret"
    for wrong in (sealed[:-1], sealed + b"x", b"", b"x" * 1000, bytes([sealed[0] ^ 1]) + sealed[1:]):
        with pytest.raises(InvalidArgument):
            sealing.unseal(key, wrong)
    with pytest.raises(InvalidArgument):
        sealing.unseal(other, sealed)
    with pytest.raises(InvalidArgument):
        sealing.seal(b"short", b"secret")
    (tmp_path / "key").write_bytes(b"short")
    with pytest.raises(FailedPrecondition, match="key"):
        sealing.private_key(tmp_path / "key")
    assert {path.name for path in tmp_path.iterdir()} == {"key", "other"}


# ------------------------------------------------------------------------------------------------------------ referrers


def test_tag_of_referrers_is_the_specifications() -> None:
    assert referrers.tag_of("sha256:" + "a" * 64) == "sha256-" + "a" * 64
    assert referrers.tag_of("sha512:" + "a" * 128) == "sha512-" + "a" * 64


@pytest.mark.parametrize("data", [b"", b"[]", b"5", b'{"subject": 5}', b'{"subject": {"digest": "x"}}', b"[" * 10**5])
def test_what_has_no_subject_refers_to_nothing(data: bytes) -> None:
    assert referrers.subject_of(data) == ""


@pytest.mark.parametrize(
    "data", [b"", b"[]", b'{"manifests": 5}', b'{"manifests": [5]}', b'{"manifests": [{"digest": "x"}]}']
)
def test_index_of_referrers_that_is_none_is_failed_precondition(data: bytes) -> None:
    with pytest.raises(FailedPrecondition):
        referrers.read(data)
