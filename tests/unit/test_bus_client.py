"""What a program that is a client of the bus and nothing else loads, and what it prints: as little as can be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HEAVY = {"aiohttp.client", "structlog", "rich", "grpc", "pyroute2"}


def python(program: str, *path: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *path], capture_output=True, text=True, check=False, timeout=60
    )


def test_a_command_loads_nothing_that_only_others_need() -> None:
    done = python("import shoal_cli.run, shoal_cli.exec, shoal_cli.attach, shoal_cli.app, sys; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    assert "nats.aio.client" in done.stdout.split()
    assert HEAVY & set(done.stdout.split()) == set()


def test_what_is_loaded_later_is_there_when_it_is_used() -> None:
    done = python(
        "import shoal_bus.client, nats.aio.transport as transport, sys\n"
        "assert 'aiohttp.client' not in sys.modules\n"
        "import aiohttp\n"
        "assert issubclass(aiohttp.ClientError, Exception)\n"
        "assert transport.aiohttp.ClientSession is sys.modules['aiohttp'].ClientSession\n"
        "import aiohttp.web\n"
    )
    assert done.returncode == 0, done.stderr


def test_a_module_loaded_later_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise ValueError('it is broken')")
    done = python(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from shoal_bus.lazy import lazily\n"
        "lazily('broken'), lazily('not_installed')\n"
        "import broken\n"
        "try:\n    import not_installed\nexcept ModuleNotFoundError:\n    print('not there')\n"
        "broken.anything",
        str(tmp_path),
    )
    assert done.stdout == "not there\n"
    assert done.stderr.endswith("ValueError: it is broken\n")


def test_only_a_process_that_has_set_up_a_log_writes_one() -> None:
    log = "from shoal_bus import logs; log = logs.get_logger('x'); log.warning('bus.lost', error='EOF')"
    silent = python(log)
    assert (silent.returncode, silent.stdout, silent.stderr) == (0, "", "")
    told = python(f"from shoal_bus import logs; logs.configure('content'); {log}")
    assert (told.returncode, told.stdout) == (0, "")
    assert '"event": "bus.lost"' in told.stderr
    assert '"service": "content"' in told.stderr
