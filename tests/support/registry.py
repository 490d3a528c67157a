"""A real docker-registry (Debian's) on a loopback port of its own, with a directory of its own."""

from __future__ import annotations

import shutil
import signal
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.natsd import free_port

_START_SECONDS = 10


class Registry:
    """One running registry; `host` is what stands before the repository in an image's name.

    `htpasswd` is a file of bcrypt'd users (`htpasswd -B`): with it, the registry asks for basic authentication. With
    `tls` (its certificate and key) it speaks TLS, and with `clients` besides (a CA's certificate) to those alone whose
    certificate that CA has signed.
    """

    def __init__(
        self,
        directory: Path,
        *,
        htpasswd: Path | None = None,
        tls: tuple[Path, Path] | None = None,
        clients: Path | None = None,
    ) -> None:
        self.directory, self.port = directory, free_port()
        self._htpasswd, self._tls, self._clients = htpasswd, tls, clients
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://{self.host}"

    def start(self) -> None:
        """Starts it, and returns when it answers."""
        binary = shutil.which("docker-registry")
        assert binary, "docker-registry isn't installed: apt-get install docker-registry"
        config = self.directory / "config.yml"
        auth = f"auth: {{htpasswd: {{realm: test, path: {self._htpasswd}}}}}\n" if self._htpasswd else ""
        tls = ""
        if self._tls is not None:
            clients = f", clientcas: ['{self._clients}']" if self._clients else ""
            tls = f", tls: {{certificate: '{self._tls[0]}', key: '{self._tls[1]}'{clients}}}"
        config.write_text(
            "version: 0.1\n"
            "log: {level: error, accesslog: {disabled: true}}\n"
            f"storage: {{filesystem: {{rootdirectory: {self.directory / 'data'}}}, delete: {{enabled: true}}}}\n"
            f"http: {{addr: '{self.host}', secret: test{tls}}}\n{auth}"
        )
        with (self.directory / "registry.log").open("ab") as log:
            self._process = subprocess.Popen([binary, "serve", str(config)], stdout=log, stderr=log)
        ends = time.monotonic() + _START_SECONDS
        while time.monotonic() < ends:
            if self._answers():
                return
            time.sleep(0.02)
        self.stop()
        raise AssertionError(f"docker-registry didn't start: {(self.directory / 'registry.log').read_text()[-2000:]}")

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/v2/", timeout=1):
                return True
        except urllib.error.HTTPError as error:
            return bool(error.code == 401)
        except urllib.error.URLError as error:
            return isinstance(error.reason, ssl.SSLError)
        except OSError:
            return False

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(10)
            self._process = None


@contextmanager
def running(
    directory: Path,
    *,
    htpasswd: Path | None = None,
    tls: tuple[Path, Path] | None = None,
    clients: Path | None = None,
) -> Iterator[Registry]:
    """A registry for the length of a block."""
    registry = Registry(directory, htpasswd=htpasswd, tls=tls, clients=clients)
    registry.start()
    try:
        yield registry
    finally:
        registry.stop()
