"""What a shim removes of a stopped container itself: its own, and never what is everybody's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from shoal_runtime.shim import cgroups, shortcuts
from shoal_runtime.shim.loop import Loop
from shoal_runtime.shim.oci import OciRuntime


@pytest.fixture
def below() -> list[Path]:
    """The cgroups that are there, of every hierarchy."""
    return sorted(path for point in cgroups.points() for path in Path(point).glob("*") if path.is_dir())


def forget(place: Path, runtime: str, record: object) -> bool:
    name = {"runc": "state.json", "crun": "status"}[runtime]
    (place / "it").mkdir()
    (place / "it" / name).write_text(record if isinstance(record, str) else json.dumps(record))
    loop = Loop()
    try:
        return shortcuts.forget(OciRuntime(loop, f"/usr/bin/{runtime}", str(place), str(place), "it", {}))
    finally:
        loop.close()


@pytest.mark.parametrize("path", ["/", "", "//", "..", "/a/../..", "a/../../b"])
def test_a_crun_container_in_everybody_s_cgroup_is_crun_s(path: str, tmp_path: Path, below: list[Path]) -> None:
    assert not forget(tmp_path, "crun", {"cgroup-path": path})
    assert (tmp_path / "it").is_dir()
    assert all(cgroup.is_dir() for cgroup in below)


def test_a_runc_container_in_everybody_s_cgroup_is_runc_s(tmp_path: Path, below: list[Path]) -> None:
    assert not forget(tmp_path, "runc", {"cgroup_paths": {"cpu": cgroups.points()[0]}})
    assert all(cgroup.is_dir() for cgroup in below)


@pytest.mark.parametrize("record", ["", "{", "[]", "{}", {"scope": "x.scope", "cgroup-path": "/shoal-none"}])
def test_a_record_that_says_something_else_is_the_runtime_s(record: object, tmp_path: Path) -> None:
    assert not forget(tmp_path, "crun", record)
    assert (tmp_path / "it").is_dir()


@pytest.mark.parametrize(("runtime", "record"), [
    ("crun", {"cgroup-path": "/shoal-none"}),
    ("runc", {"cgroup_paths": {"cpu": "/sys/fs/cgroup/shoal-none"}}),
])  # fmt: skip
def test_what_is_gone_already_is_forgotten(runtime: str, record: object, tmp_path: Path) -> None:
    assert forget(tmp_path, runtime, record)
    assert not (tmp_path / "it").exists()
