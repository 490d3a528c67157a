"""Where a registry's images are gotten from and pushed to: containerd's `hosts.toml` (docs/hosts.md of containerd).

For `registry.example:5000` it is looked for in the first of these directories that is there, below the one given by
`--registry-config`: `registry.example_5000_`, `registry.example:5000`, `_default`.

    server = "https://registry.example:5000"       # the last one asked; else the registry's own name, over TLS

    [host."https://mirror.example"]                # asked before it, in the order of the file
    capabilities = ["pull", "resolve"]             # "push" besides; all three if left out
    ca = "mirror.pem"                              # or a list; paths are relative to this directory
    client = [["client.pem", "client.key"]]        # or one file that holds both
    skip_verify = false
    dial_timeout = "15s"
    override_path = false                          # true: the URL's path already is what stands for /v2
    [host."https://mirror.example".header]
    x-team = "blue"
    [host."https://mirror.example".rewrite]        # shoal's own, as k3s has it: what the repository is called there
    "^library/(.*)$" = "hub/$1"

The keys under a host are good for the server, too, at the top of the file. A mirror is told whose images are wanted by
`?ns=<registry>`. The files are read anew for each pull and push.

A directory without a `hosts.toml`, or with an empty one, is read as Docker reads its own: each `*.crt` is a CA, and
each `<name>.cert` a client certificate, with its key in `<name>.key` or in the same file.
"""

from __future__ import annotations

import ipaddress
import re
import ssl
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shoal_bus.errors import FailedPrecondition, InvalidArgument
from shoal_bus.image_reference import DEFAULT_DOMAIN, Reference, is_repository
from yarl import URL

DEFAULT_DIRECTORY = Path("/etc/shoal/certs.d")
PULL, RESOLVE, PUSH = "pull", "resolve", "push"
ALL = frozenset({PULL, RESOLVE, PUSH})
_DOCKER_HUB = "registry-1.docker.io"
_MAX_BYTES = 1 << 20
_KNOWN = frozenset(
    {"capabilities", "ca", "client", "skip_verify", "header", "override_path", "rewrite", "dial_timeout"}
)
_DURATION = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)(ms|s|m)")
_WHO_ONE_IS = frozenset({"authorization", "cookie", "proxy-authorization"})
_OURS = frozenset({
    "accept-encoding", "connection", "content-length", "content-range", "content-type", "host", "if-range", "range",
    "te", "trailer", "transfer-encoding", "upgrade",
})  # fmt: skip
"""Headers that say what a request is about."""
_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


@dataclass(frozen=True)
class Host:
    """One place that answers for a registry."""

    url: URL
    """Up to and with `/v2`, or what stands for it; without a slash at its end."""
    capabilities: frozenset[str] = ALL
    headers: tuple[tuple[str, str], ...] = ()
    rewrites: tuple[tuple[re.Pattern[str], str], ...] = ()
    mirrors: str = ""
    """The registry whose images it has; empty for the registry itself."""
    server: bool = False
    """It stands for the registry: what a caller may know it by is given to it."""
    connect_seconds: float = 15.0
    given: bool = True
    """That it is spoken to as it is (without TLS, for one) is the node's own word, or goes without saying."""
    tls: ssl.SSLContext | None = field(default=None, repr=False, compare=False)
    """For this host alone; None where the system's is good."""
    tls_elsewhere: ssl.SSLContext | None = field(default=None, repr=False, compare=False)
    """For where it redirects to: its CA, and neither its client certificate nor its `skip_verify`."""

    def __str__(self) -> str:
        return f"{self.url.host}:{self.url.port}"

    @property
    def domain(self) -> str:
        """What its credentials are found under."""
        return self.url.authority if self.url.explicit_port else self.url.host or ""

    @property
    def trusted(self) -> bool:
        """Whether the node's own credentials may be sent there."""
        return self.given or self.url.scheme == "https" or is_loopback(self.url.host or "")

    def repository(self, path: str) -> str:
        """What a repository is called there."""
        for pattern, replacement in self.rewrites:
            found = pattern.search(path)
            if found is not None:
                try:
                    renamed = path[: found.start()] + found.expand(replacement) + path[found.end() :]
                except (re.error, IndexError):  # of a group that the pattern doesn't have
                    renamed = ""
                if not is_repository(renamed):
                    raise FailedPrecondition(
                        f"registry {self}: repository {path} is rewritten to {renamed!r}, which is none",
                        hint="mend the rewrite of its hosts.toml",
                    )
                return renamed
        return path

    def tls_for(self, url: URL) -> ssl.SSLContext | bool:
        """What a connection to `url` is secured with, on this host's behalf."""
        mine = url.origin() == self.url.origin()
        return (self.tls if mine else self.tls_elsewhere) or True


def hosts_of(reference: Reference, directory: Path, *, plain_http: bool = False, tls: bool = False) -> list[Host]:
    """The hosts to ask for a reference's registry, in their order. FAILED_PRECONDITION for a file that makes no sense.

    Reads files, and certificates: not for the event loop's thread.
    """
    own = _own(reference.domain, plain_http=plain_http, tls=tls)
    found = _directory(directory, reference.domain)
    if found is None:
        return [own]
    place = found / "hosts.toml"
    try:
        document = _document(place)
        if document is None:
            place = found
            return [_with_certificates(own, found, plain_http=plain_http)]
        return _read(found, document, reference.domain, own)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, re.error) as error:
        problem = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise FailedPrecondition(f"{place}: {problem}", hint="see hosts.toml in containerd's documentation") from None


def with_headers(host: Host, headers: Mapping[str, str]) -> Host:
    """A host to whose requests a caller has added headers; its configuration's own count more.

    A mirror isn't told who the caller is.
    """
    own = {key.lower() for key, _ in host.headers}
    own |= _WHO_ONE_IS if host.mirrors and not host.server else set()
    return replace(host, headers=host.headers + tuple((k, v) for k, v in headers.items() if k.lower() not in own))


def check_headers(headers: Mapping[str, str]) -> None:
    """INVALID_ARGUMENT for a header that can't be sent, or isn't a caller's to say. No value is told."""
    for key, value in headers.items():
        if not _HEADER.fullmatch(key) or not value.isprintable():
            raise InvalidArgument(f"header {key[:100]!r}: can't be sent to a registry")
        if key.lower() in _OURS:
            raise InvalidArgument(f"header {key}: isn't a client's to say")


def is_loopback(name: str) -> bool:
    """Whether a host's name or address stands for this machine."""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _own(domain: str, *, plain_http: bool, tls: bool) -> Host:
    name = _DOCKER_HUB if domain == DEFAULT_DOMAIN else domain
    try:
        url = URL(f"https://{name}/v2", encoded=True)
        loopback = is_loopback(url.host or "")
        sensible = bool(url.host and url.port)
    except ValueError:
        sensible = False
    if not sensible:
        raise FailedPrecondition(f"registry {domain[:255]}: not a host and a port")
    if tls or not (plain_http or loopback):
        return Host(url, server=True)
    return Host(URL(f"http://{name}/v2", encoded=True), given=not plain_http, server=True)


def _directory(directory: Path, domain: str) -> Path | None:
    name, colon, port = domain.rpartition(":")
    names = [f"{name}_{port}_"] if colon and port.isdigit() else []
    return next((place for one in [*names, domain, "_default"] if (place := directory / one).is_dir()), None)


def _document(place: Path) -> dict[str, Any] | None:
    """A hosts.toml; None where there is none, or nothing in it."""
    try:
        with place.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    if len(data) > _MAX_BYTES:
        raise ValueError(f"more than {_MAX_BYTES} bytes")
    return tomllib.loads(data.decode()) if data else None


def _with_certificates(own: Host, directory: Path, *, plain_http: bool) -> Host:
    """The registry itself, with the certificates in its directory: TLS, then, also where it is on loopback."""
    authorities, pairs = [], []
    for one in sorted(directory.iterdir()):
        if one.suffix == ".crt" and one.is_file():
            authorities.append(one.name)
        elif one.suffix == ".cert" and one.is_file():
            key = one.with_suffix(".key")
            pairs.append([one.name, key.name] if key.exists() else [one.name])
    mine, elsewhere = _tls(directory, {"ca": authorities, "client": pairs})
    if mine is None or plain_http:
        return own
    return replace(own, url=own.url.with_scheme("https"), tls=mine, tls_elsewhere=elsewhere)


def _read(directory: Path, document: dict[str, Any], domain: str, own: Host) -> list[Host]:
    found = []
    for name, table in _table(document.pop("host", {}), "host").items():
        found.append(_host(directory, name, _table(table, f"host.{name}"), domain, own))
    server = document.pop("server", "")
    if not isinstance(server, str):
        raise ValueError("server: must be text")
    if server:
        last = _host(directory, server, document, domain, own)
    else:
        last = _configured(own, directory, document, "the server's keys")
    return [*found, replace(last, server=True)]


def _host(directory: Path, name: str, table: Mapping[str, Any], domain: str, own: Host) -> Host:
    url = URL(name if "://" in name else f"https://{name}", encoded=True)
    if url.scheme not in ("http", "https") or not url.host or not url.port or url.query_string or url.user is not None:
        raise ValueError(f"{name[:200]!r}: not the URL of a registry")
    path = url.path.rstrip("/")
    if not table.get("override_path") and not path.endswith("/v2"):
        path += "/v2"
    is_own = (url.host, url.explicit_port) == (own.url.host, own.url.explicit_port)
    host = Host(url.with_path(path, encoded=True), mirrors="" if is_own else domain)
    return _configured(host, directory, table, name)


def _configured(host: Host, directory: Path, table: Mapping[str, Any], name: str) -> Host:
    unknown = sorted(set(table) - _KNOWN)
    if unknown:
        raise ValueError(f"{name}: {unknown[0]!r} isn't known")
    capabilities = ALL if "capabilities" not in table else frozenset(_texts(table["capabilities"], "capabilities"))
    rewrites = tuple(
        (re.compile(pattern), re.sub(r"\$(?:(\w+)|\{(\w+)\})", r"\\g<\1\2>", str(replacement).replace("\\", "\\\\")))
        for pattern, replacement in _table(table.get("rewrite", {}), "rewrite").items()
    )
    headers = tuple(
        (key, value)
        for key, values in _table(table.get("header", {}), "header").items()
        for value in _texts(values, f"header.{key}")
    )
    for key, value in headers:
        if not _HEADER.fullmatch(key) or not value.isprintable():
            raise ValueError(f"header {key!r}: can't be sent")
    tls, elsewhere = _tls(directory, table)
    return replace(
        host, capabilities=capabilities, headers=headers, rewrites=rewrites, tls=tls, tls_elsewhere=elsewhere,
        connect_seconds=_seconds(table.get("dial_timeout", "15s")),
    )  # fmt: skip


def _tls(directory: Path, table: Mapping[str, Any]) -> tuple[ssl.SSLContext | None, ssl.SSLContext | None]:
    skip = table.get("skip_verify", False)
    if not isinstance(skip, bool):
        raise ValueError("skip_verify: must be true or false")
    authorities = [directory / one for one in _texts(table.get("ca", []), "ca")]
    pairs = _pairs(directory, table.get("client", []))
    if not authorities and not pairs and not skip:
        return None, None
    mine, elsewhere = ssl.create_default_context(), ssl.create_default_context() if authorities else None
    for authority in authorities:
        for context in (mine, elsewhere):
            if context is not None:
                with _named(authority, "no certificates in PEM form"):
                    context.load_verify_locations(authority)
    for certificate, key in pairs:
        with _named(certificate, "not a certificate in PEM form with its own key"):
            mine.load_cert_chain(certificate, key)
    if skip:
        mine.check_hostname, mine.verify_mode = False, ssl.CERT_NONE
    return mine, elsewhere


@contextmanager
def _named(file: Path, problem: str) -> Iterator[None]:
    """Says which file it is that can't be used."""
    try:
        yield
    except ssl.SSLError:
        raise ValueError(f"{file.name}: {problem}") from None
    except OSError as error:
        raise ValueError(f"{file.name}: {error.strerror}") from None


def _pairs(directory: Path, value: Any) -> list[tuple[Path, Path | None]]:
    """Client certificates with their keys: `"both"`, `["both", …]`, or `[["certificate", "key"], …]`."""
    found: list[tuple[Path, Path | None]] = []
    for entry in [value] if isinstance(value, str) else value:
        names = _texts(entry, "client")
        if not 1 <= len(names) <= 2:
            raise ValueError("client: must be files, or pairs of a certificate and its key")
        key = directory / names[1] if len(names) == 2 and names[1] else None
        found.append((directory / names[0], key))
    return found


def _seconds(duration: Any) -> float:
    found = _DURATION.fullmatch(duration) if isinstance(duration, str) else None
    if found is None:
        raise ValueError("dial_timeout: must be a duration, as 10s")
    return max(0.001, float(found[1]) * {"ms": 0.001, "s": 1, "m": 60}[found[2]])


def _texts(value: Any, what: str) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        raise ValueError(f"{what}: must be text, or a list of texts")
    return values


def _table(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what}: must be a table")
    return value
