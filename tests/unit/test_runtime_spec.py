"""Specifications made from an image's configuration have containerd's defaults, and the user the image's files name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from shoal_bus.api.runtime import SpecOptions
from shoal_bus.errors import FailedPrecondition, InvalidArgument
from shoal_bus.types import Mount
from shoal_runtime.spec import check_spec, fit_to_host, generate_spec
from shoal_runtime.spec.layers import directories, read_file
from shoal_runtime.spec.users import User, find_groups, find_user

IMAGE: dict[str, Any] = {"config": {"Entrypoint": ["/bin/sh"], "Cmd": ["-c", "true"], "Env": ["A=1", "PATH=/bin"]}}


def layer(root: Path, name: str, files: dict[str, str]) -> Path:
    for path, text in files.items():
        (root / name / path).parent.mkdir(parents=True, exist_ok=True)
        (root / name / path).write_text(text)
    (root / name).mkdir(exist_ok=True)
    return root / name


def overlay(*layers: Path) -> list[Mount]:
    lower = ":".join(str(one).replace(":", "\\:") for one in layers[1:])
    return [
        Mount(type="overlay", source="overlay", options=[f"upperdir={layers[0]}", f"lowerdir={lower}", "workdir=/w"])
    ]


def spec_of(
    options: SpecOptions | None = None, image: dict[str, Any] = IMAGE, *, rootfs: list[Mount] | None = None, **more: Any
) -> dict[str, Any]:
    return generate_spec("team", "web-1", image, rootfs or [], options or SpecOptions(), **more)


def test_defaults_are_those_of_containerd() -> None:
    spec = spec_of()
    process = spec["process"]
    assert process["args"] == ["/bin/sh", "-c", "true"]
    assert process["env"] == ["A=1", "PATH=/bin"]
    assert process["cwd"] == "/"
    assert process["noNewPrivileges"] is True
    assert process["rlimits"] == [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}]
    assert len(process["capabilities"]["bounding"]) == 14
    assert "CAP_SYS_ADMIN" not in process["capabilities"]["effective"]
    assert spec["linux"]["cgroupsPath"] == "/team/web-1"
    assert spec["linux"]["resources"]["devices"][0] == {"allow": False, "access": "rwm"}
    assert {"/proc/kcore", "/sys/firmware"} <= set(spec["linux"]["maskedPaths"])
    assert "/proc/sys" in spec["linux"]["readonlyPaths"]
    assert [m["destination"] for m in spec["mounts"]][:6] == [
        "/proc", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue", "/sys",
    ]  # fmt: skip
    assert {"type": "network"} in spec["linux"]["namespaces"]
    check_spec(spec)


def test_arguments_replace_the_command_and_keep_the_entrypoint() -> None:
    assert spec_of(SpecOptions(args=["-c", "false"]))["process"]["args"] == ["/bin/sh", "-c", "false"]


def test_an_image_without_a_command_needs_one() -> None:
    with pytest.raises(InvalidArgument, match="no command"):
        spec_of(image={"config": {}})


def test_environment_has_a_path_a_terminal_and_the_later_of_two() -> None:
    spec = spec_of(SpecOptions(env=["A=2", "B"]), {"config": {"Cmd": ["x"], "Env": ["A=1", "B=1"]}}, terminal=True)
    env = spec["process"]["env"]
    assert env[0].startswith("PATH=/usr/local/sbin")
    assert "TERM=xterm" in env
    assert "A=2" in env
    assert not [one for one in env if one.startswith("B")]


def test_networks_are_joined_shared_or_made() -> None:
    joined = spec_of(netns="/run/netns/x", resolv_conf=True)
    assert {"type": "network", "path": "/run/netns/x"} in joined["linux"]["namespaces"]
    assert [m["destination"] for m in joined["mounts"] if m["type"] == "bind"] == ["/etc/resolv.conf"]
    host = spec_of(host_network=True)
    assert not [n for n in host["linux"]["namespaces"] if n["type"] == "network"]
    binds = [m for m in host["mounts"] if m["type"] == "bind"]
    assert {m["destination"] for m in binds} == {"/etc/resolv.conf", "/etc/hosts"}
    assert all("ro" in m["options"] for m in binds)


def test_users_are_numbers_or_names_of_the_image(tmp_path: Path) -> None:
    root = layer(
        tmp_path, "one",
        {"etc/passwd": "root:x:0:0::/:/bin/sh\nweb:x:33:44::/:\n#no\nbad\n", "etc/group": "web:x:44:\nlog:x:7:a,web\n"},
    )  # fmt: skip
    mounts = [Mount(type="bind", source=str(root), options=["rbind"])]
    assert find_user(mounts, "web") == User(33, 44, (44, 7))
    assert find_user(mounts, "33") == User(33, 44, (44, 7))
    assert find_user(mounts, "web:log") == User(33, 7, (7,))
    assert find_user(mounts, "1000") == User(1000, 0, (0,))
    assert find_user(mounts, "1000:1001") == User(1000, 1001, (1001,))
    assert find_user(mounts, "") == User(0, 0, (0,))
    for wrong in ("nobody-here", "web:none", ":1", "99999999999", "2147483648"):
        with pytest.raises(InvalidArgument):
            find_user(mounts, wrong)


def test_further_groups_are_numbers_or_names_of_the_image(tmp_path: Path) -> None:
    root = layer(tmp_path, "one", {"etc/group": "web:x:44:\nlog:x:7:a,web\n"})
    mounts = [Mount(type="bind", source=str(root), options=["rbind"])]
    assert find_groups(mounts, ["log", "9", "web"]) == [7, 9, 44]
    spec = spec_of(SpecOptions(user="5:7", group_add=["web", "log"]), rootfs=mounts)
    assert spec["process"]["user"] == {"uid": 5, "gid": 7, "additionalGids": [7, 44]}
    with pytest.raises(InvalidArgument, match="no group 'nobody-here'"):
        find_groups(mounts, ["nobody-here"])


def test_files_are_found_as_overlayfs_would_show_them(tmp_path: Path) -> None:
    base = layer(tmp_path, "base", {"etc/passwd": "base", "etc/group": "base", "opt/a/x": "base", "opt/a/y": "base"})
    middle = layer(tmp_path, "mid:dle", {"etc/group": "middle", "opt/a/x": "middle"})
    upper = layer(tmp_path, "upper", {"etc/empty": ""})
    os.mknod(upper / "etc/passwd", 0o600 | 0o020000, 0)
    os.setxattr(middle / "opt/a", "trusted.overlay.opaque", b"y")
    mounts = overlay(upper, middle, base)
    assert directories(mounts) == [str(upper), str(middle), str(base)]
    assert read_file(mounts, "etc/passwd") is None
    assert read_file(mounts, "etc/group") == b"middle"
    assert read_file(mounts, "opt/a/x") == b"middle"
    assert read_file(mounts, "opt/a/y") is None


def test_no_link_of_an_image_leads_out_of_it(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("host")
    base = layer(tmp_path, "base", {"real/passwd": "inside"})
    upper = layer(tmp_path, "upper", {})
    (upper / "etc").mkdir()
    (upper / "etc/passwd").symlink_to("../../../../../../real/passwd")
    (upper / "etc/group").symlink_to(str(tmp_path / "secret"))
    (upper / "loop").symlink_to("loop")
    (upper / "dir").symlink_to("/real")
    os.mkfifo(upper / "fifo")
    mounts = overlay(upper, base)
    assert read_file(mounts, "etc/passwd") == b"inside"
    assert read_file(mounts, "dir/passwd") == b"inside"
    for path in ("etc/group", "loop", "fifo", "real", "real/passwd/x"):
        assert read_file(mounts, path) is None


def test_a_huge_passwd_is_refused(tmp_path: Path) -> None:
    root = layer(tmp_path, "one", {})
    (root / "etc").mkdir()
    with (root / "etc/passwd").open("wb") as file:
        file.truncate(5 << 20)
    with pytest.raises(FailedPrecondition, match="5242880 bytes"):
        read_file([Mount(type="bind", source=str(root))], "etc/passwd")


def test_what_this_machine_forbids_is_fitted_to_it() -> None:
    spec = spec_of()
    spec["process"] |= {
        "oomScoreAdj": -999, "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 2**40, "soft": 2**40}],
    }  # fmt: skip
    fitted = fit_to_host(spec)["process"]
    effective = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff"))
    if int(effective.split()[1], 16) >> 24 & 1:
        assert fitted == spec["process"]
    else:
        assert fitted["oomScoreAdj"] == int(Path("/proc/self/oom_score_adj").read_text())
        assert fitted["rlimits"][0]["hard"] < 2**40
        assert spec["process"]["oomScoreAdj"] == -999
