"""Containerd's configuration files: what applies to a node of shoal's, and what is named as not applying."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

import pytest
from shoal_bus.errors import InvalidArgument, NotFound
from shoal_cli.containerd import hooks
from shoal_cli.containerd.configuration import Configuration, load
from shoal_cli.containerd.durations import duration_of, seconds_of
from shoal_cli.containerd.printing import dump, dump_processors
from shoal_snapshot import processors


def read(directory: Path, text: str) -> Configuration:
    path = directory / "config.toml"
    path.write_text(text)
    return load(path, asked_for=True)


def test_version_2(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        """
        version = 2
        root = "/srv/root"
        state = "/run/srv"
        [grpc]
        address = "/run/srv/c.sock"
        uid = 7
        gid = 8
        max_recv_message_size = 16777216
        [debug]
        level = "warn"
        [plugins."io.containerd.grpc.v1.cri".registry]
        config_path = "/etc/hosts.d:/etc/docker/certs.d"
        [plugins."io.containerd.grpc.v1.cri".containerd]
        snapshotter = "native"
        default_runtime_name = "mine"
        [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.mine]
        runtime_type = "io.containerd.runc.v2"
        [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.mine.options]
        BinaryName = "/usr/bin/crun"
        """,
    )
    assert (found.root, found.state, found.address) == (Path("/srv/root"), Path("/run/srv"), Path("/run/srv/c.sock"))
    assert (found.uid, found.gid, found.level) == (7, 8, "warning")
    assert (found.snapshotter, found.runtime) == ("native", "/usr/bin/crun")
    assert found.registry_config == Path("/etc/hosts.d")
    assert found.warnings == [
        'plugins."io.containerd.grpc.v1.cri".registry.config_path: only /etc/hosts.d is looked at'
    ]


def test_version_3(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        """
        version = 3
        [plugins."io.containerd.cri.v1.images"]
        snapshotter = "btrfs"
        [plugins."io.containerd.cri.v1.images".registry]
        config_path = "/etc/containerd/certs.d"
        [plugins."io.containerd.cri.v1.runtime".containerd]
        default_runtime_name = "crun"
        [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.crun]
        runtime_type = "io.containerd.crun.v2"
        [plugins."io.containerd.transfer.v1.local"]
        config_path = "/etc/transfer"
        """,
    )
    assert (found.snapshotter, found.runtime) == ("btrfs", "crun")
    assert found.registry_config == Path("/etc/transfer")
    assert found.warnings == []


def test_since_version_4_the_sockets_are_plugins(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        """
        version = 4
        [plugins."io.containerd.server.v1.grpc"]
        address = "/run/c.sock"
        uid = 3
        gid = 4
        max_recv_message_size = 16777216
        [plugins."io.containerd.server.v1.grpc-tcp"]
        address = "127.0.0.1:7"
        [plugins."io.containerd.server.v1.ttrpc"]
        address = "/run/t.sock"
        uid = 3
        gid = 4
        """,
    )
    assert (found.address, found.uid, found.gid) == (Path("/run/c.sock"), 3, 4)
    assert found.ttrpc == Path("/run/t.sock")
    assert [one.partition(": ")[0] for one in found.warnings] == ['plugins."io.containerd.server.v1.grpc-tcp"']


def test_what_does_not_apply_is_named(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        """
        version = 2
        temp = "/tmp"
        disabled_plugins = ["io.containerd.grpc.v1.cri"]
        colour = "red"
        [grpc]
        tcp_address = "127.0.0.1:7"
        adress = "/misspelt"
        [debug]
        address = "/run/debug.sock"
        [metrics]
        address = "127.0.0.1:1338"
        [ttrpc]
        address = "/run/own.ttrpc"
        uid = 8
        [plugins.opt]
        path = "/opt"
        """,
    )
    assert [one.partition(": ")[0] for one in found.warnings] == [
        "ttrpc.uid", "grpc.tcp_address", "grpc.adress", "debug.address", "metrics.address", "disabled_plugins",
        "temp", "plugins.opt", "colour",
    ]  # fmt: skip
    assert "grpc.adress: unknown" in found.warnings
    assert found.ttrpc == Path("/run/own.ttrpc")


def test_what_containerd_itself_prints_can_be_read(tmp_path: Path) -> None:
    printed = subprocess.run(["containerd", "config", "default"], capture_output=True, text=True, check=True).stdout
    found = read(tmp_path, printed)
    assert (found.root, found.state) == (Path("/var/lib/containerd"), Path("/run/containerd"))
    assert found.address == Path("/run/containerd/containerd.sock")
    assert (found.runtime, found.snapshotter) == ("runc", "overlayfs")
    assert not [one for one in found.warnings if "unknown" in one]


def test_imports_are_read_behind_the_file(tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "a.toml").write_text('version = 2\nroot = "/a"\nimports = ["../config.toml"]\n')
    (tmp_path / "conf.d" / "b.toml").write_text("version = 2\n[grpc]\ngid = 5\n")
    found = read(tmp_path, 'version = 2\nimports = ["conf.d/*.toml"]\nroot = "/first"\nstate = "/s"\n')
    assert (found.root, found.state, found.gid) == (Path("/a"), Path("/s"), 5)
    with pytest.raises(NotFound, match=r"none\.toml"):
        read(tmp_path, 'version = 2\nimports = ["none.toml"]\n')


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("version = ", "not TOML"),
        ("version = 9", "version: 9"),
        ('version = 2\nroot = "relative"', "root"),
        ("version = 2\nroot = 7", "root: must be text"),
        ('version = 2\n[grpc]\nuid = "root"', "grpc.uid: must be an integer"),
        ("version = 2\n[grpc]\nuid = true", "grpc.uid"),
        ("version = 2\n[grpc]\ngid = -1", "grpc.gid: -1"),
        ("version = 2\ngrpc = 1", "grpc: must be a table"),
        ('version = 2\n[debug]\nlevel = "loud"', "debug.level: 'loud'"),
        ('version = 2\n[plugins]\n"io.containerd.grpc.v1.cri" = 1', 'plugins."io.containerd.grpc.v1.cri"'),
        ("version = 2\nimports = 3", "imports"),
    ],
)
def test_what_is_wrong_is_said_with_the_file_and_the_key(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read(tmp_path, text)
    assert str(tmp_path / "config.toml") in caught.value.message
    assert words in caught.value.message


def test_a_file_that_is_not_there_matters_only_where_it_was_asked_for(tmp_path: Path) -> None:
    assert load(tmp_path / "none", asked_for=False) == Configuration()
    with pytest.raises(NotFound):
        load(tmp_path / "none", asked_for=True)


def test_plugins_of_the_first_version_are_not_read(tmp_path: Path) -> None:
    found = read(tmp_path, "[plugins.cri]\nx = 1\n")
    assert [one.partition(": ")[0] for one in found.warnings] == ["plugins"]


def test_a_dump_reads_as_what_was_dumped(tmp_path: Path) -> None:
    configuration = Configuration(
        root=Path('/a "b"\\'), gid=7, level="warning", runtime="crun", snapshotter="native",
        registry_config=Path("/hosts"), ttrpc=Path("/own.ttrpc"),
    )  # fmt: skip
    assert read(tmp_path, dump(configuration)) == configuration
    assert tomllib.loads(dump(Configuration()))["version"] == 4


def test_stream_processors_are_handed_on(tmp_path: Path) -> None:
    text = """
        version = 2
        [stream_processors."io.test.xz \\"1\\""]
        accepts = ["a+xz", "b+xz"]
        returns = "application/vnd.oci.image.layer.v1.tar"
        path = "/usr/bin/xz"
        args = ["-dc"]
        env = ["A=b"]
        colour = "red"
        """
    found = read(tmp_path, text)
    assert found.warnings == ['stream_processors."io.test.xz "1"".colour: unknown']
    handed = tmp_path / "processors.toml"
    handed.write_text(dump_processors(found))
    programs = processors.load(handed)
    assert {accepted: (one.name, one.path, one.args, one.env) for accepted, one in programs.items()} == dict.fromkeys(
        ("a+xz", "b+xz"), ('io.test.xz "1"', "/usr/bin/xz", ["-dc"], ["A=b"])
    )
    assert read(tmp_path, dump(found)).stream_processors == found.stream_processors
    with pytest.raises(InvalidArgument, match=r"stream_processors\.x\.path: must be given"):
        read(tmp_path, 'version = 2\n[stream_processors.x]\naccepts = ["a"]\nreturns = "b"\n')
    own = subprocess.run(["containerd", "config", "default"], capture_output=True, text=True, check=True).stdout
    handed.write_text(dump_processors(read(tmp_path, own)))
    assert processors.load(handed)


def test_what_is_said_of_the_daemon_s_own_processes(tmp_path: Path) -> None:
    found = read(tmp_path, 'version = 2\noom_score = -999\n[cgroup]\npath = "/system/containerd/"\n')
    assert (found.oom_score, found.cgroup, found.warnings) == (-999, "system/containerd", [])
    for text, words in (
        ("oom_score = 1001", "oom_score"), ('[cgroup]\npath = "a/../b"', "cgroup.path"),
        ("disabled_plugins = [1]", "disabled_plugins"),
    ):  # fmt: skip
        with pytest.raises(InvalidArgument, match=words):
            read(tmp_path, f"version = 2\n{text}\n")


@pytest.mark.parametrize("plugin", ["io.containerd.internal.v1.restart", "io.containerd.monitor.container.v1.restart"])
def test_the_restart_monitor(tmp_path: Path, plugin: str) -> None:
    found = read(tmp_path, f'version = 3\n[plugins."{plugin}"]\ninterval = "1m2.5s"\n')
    assert (found.restart_interval, found.restarts, found.warnings) == (62.5, True, [])
    assert not read(tmp_path, f'version = 3\ndisabled_plugins = ["{plugin}"]\n').restarts
    with pytest.raises(InvalidArgument, match="interval"):
        read(tmp_path, f'version = 3\n[plugins."{plugin}"]\ninterval = "soon"\n')


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10s", 10), ("1h2m3s", 3723), ("1.5m", 90), ("500ms", 0.5), (".5s", 0.5), ("2000us", 0.002), ("1m", 60)],
)
def test_durations_are_go_s(text: str, seconds: float) -> None:
    assert seconds_of(text, "key") == pytest.approx(seconds)
    assert seconds_of(duration_of(seconds), "key") == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "10", "s", "10 s", "-1s", "0s", "1ns", "1d", "1s2"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="key"):
        seconds_of(text, "key")


def test_a_file_alone_keeps_what_it_imports_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "more.toml").write_text('version = 2\nroot = "/more"\n')
    text = 'version = 2\nimports = ["more.toml"]\nstate = "/s"\noom_score = 5\n[grpc]\ngid = 7\n'
    path = tmp_path / "config.toml"
    path.write_text(text)
    alone = load(path, asked_for=True, alone=True)
    assert (alone.root, alone.state, alone.imports) == (Path("/var/lib/containerd"), Path("/s"), ["more.toml"])
    assert load(path, asked_for=True).root == Path("/more")
    # Printed, and read again, and printed: the same.
    migrated = dump(alone)
    path.write_text(migrated)
    assert dump(load(path, asked_for=True, alone=True)) == migrated
    assert tomllib.loads(migrated)["plugins"]["io.containerd.server.v1.grpc"]["gid"] == 7


VALUES = {
    "id": "one", "pid": 7, "status": "created", "bundle": "/b", "rootfs": "/b/rootfs",
    "annotations": {"a.b/c": "said", 'q"': "quoted"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("plain", "plain"),
        ("{{pid}}", "7"),
        ("--pid={{ pid }}/{{id}}", "--pid=7/one"),
        ("{{bundle}} {{rootfs}} {{status}}", "/b /b/rootfs created"),
        ('{{annotation "a.b/c"}}', "said"),
        ("{{annotation `a.b/c`}}", "said"),
        (r'{{annotation "q\""}}', "quoted"),
        ('{{annotation "none"}}', ""),
        ("a {{- pid -}} b", "a7b"),
        ("{{/* nothing */}}x", "x"),
        ("}} {", "}} {"),
    ],
)
def test_a_hook_s_actions_are_filled_in(text: str, filled: str) -> None:
    assert hooks.filled(text, VALUES) == filled


@pytest.mark.parametrize("text", ["{{pid", "{{}}", "{{PID}}", "{{annotations}}", "{{annotation}}", "{{pid | id}}"])
def test_a_hook_s_action_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="oci-hook"):
        hooks.filled(text, VALUES)
