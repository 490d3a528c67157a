"""Figures from the kernel's files: texts recorded on Linux 6.18 (v1, hybrid) and in the form of 6.1's cgroup v2."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from shoal_bus.api.runtime import BlockDevice, ContainerMetrics, HugePages, MemoryUse, PidsMetrics, RdmaDevice
from shoal_runtime.metrics import shared, v1, v2
from shoal_runtime.metrics.files import flat, nested, read, read_number
from shoal_runtime.metrics.places import Hierarchies, Places, own_cgroup
from shoal_runtime.metrics.reading import Job, measure

GIB, MIB = 1 << 30, 1 << 20
UNLIMITED = "9223372036854771712\n"
MEMORY_STAT_V1 = """cache 20975616
rss 53248
rss_huge 0
swap 4096
inactive_file 1024
hierarchical_memory_limit 67108864
hierarchical_memsw_limit 9223372036854771712
total_cache 20979712
total_rss 57344
total_swap 8192
total_inactive_file 20975616
total_active_file 0
"""
V1 = {
    "cpuacct/cpuacct.usage": "113350209\n",
    "cpuacct/cpuacct.usage_percpu": "1989526 111360683 \n",
    "cpuacct/cpuacct.stat": "user 9\nsystem 1\n",
    "cpu/cpu.stat": "nr_periods 4\nnr_throttled 1\nthrottled_time 51436651\nnr_bursts 0\nburst_time 0\n",
    "cpu/cpu.cfs_quota_us": "50000\n",
    "cpu/cpu.cfs_period_us": "100000\n",
    "memory/memory.usage_in_bytes": "22200320\n",
    "memory/memory.max_usage_in_bytes": "23408640\n",
    "memory/memory.limit_in_bytes": "67108864\n",
    "memory/memory.failcnt": "3\n",
    "memory/memory.memsw.usage_in_bytes": "22200321\n",
    "memory/memory.memsw.max_usage_in_bytes": "23408641\n",
    "memory/memory.memsw.limit_in_bytes": UNLIMITED,
    "memory/memory.memsw.failcnt": "0\n",
    "memory/memory.kmem.usage_in_bytes": "794624\n",
    "memory/memory.kmem.max_usage_in_bytes": "1146880\n",
    "memory/memory.kmem.limit_in_bytes": UNLIMITED,
    "memory/memory.kmem.failcnt": "0\n",
    "memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
    "memory/memory.stat": MEMORY_STAT_V1,
    "pids/pids.current": "1\n",
    "pids/pids.max": "32\n",
    "pids/pids.peak": "5\n",
    "pids/pids.events": "max 7\n",
    "blkio/blkio.throttle.io_service_bytes_recursive": (
        "254:0 Read 4096\n254:0 Write 8192\n254:0 Sync 12288\n254:0 Async 0\n254:0 Discard 16384\n254:0 Total 28672\n"
        "7:99 Read 512\n7:99 Total 512\nTotal 29184\n"
    ),
    "blkio/blkio.throttle.io_serviced_recursive": (
        "254:0 Read 1\n254:0 Write 2\n254:0 Sync 3\n254:0 Async 0\n254:0 Discard 4\n254:0 Total 7\nTotal 7\n"
    ),
    "hugetlb/hugetlb.2MB.usage_in_bytes": "4194304\n",
    "hugetlb/hugetlb.2MB.max_usage_in_bytes": "6291456\n",
    "hugetlb/hugetlb.2MB.limit_in_bytes": "9223372036852678656\n",
    "hugetlb/hugetlb.2MB.failcnt": "1\n",
    "hugetlb/hugetlb.1GB.usage_in_bytes": "0\n",
    "hugetlb/hugetlb.1GB.max_usage_in_bytes": "0\n",
    "hugetlb/hugetlb.1GB.limit_in_bytes": "1073741824\n",
    "hugetlb/hugetlb.1GB.failcnt": "0\n",
}
V2 = {
    "cpu.stat": (
        "usage_usec 113350\nuser_usec 98236\nsystem_usec 15113\nnr_periods 4\nnr_throttled 1\nthrottled_usec 51436\n"
        "nr_bursts 0\nburst_usec 0\n"
    ),
    "cpu.max": "50000 100000\n",
    "memory.current": "22200320\n",
    "memory.peak": "23408640\n",
    "memory.max": "67108864\n",
    "memory.high": "60000000\n",
    "memory.low": "0\n",
    "memory.min": "4096\n",
    "memory.stat": "anon 57344\nfile 20979712\nkernel 794624\ninactive_file 20975616\nactive_file 4096\n",
    "memory.events": "low 0\nhigh 1\nmax 3\noom 2\noom_kill 2\noom_group_kill 0\n",
    "memory.swap.current": "8192\n",
    "memory.swap.max": "max\n",
    "memory.swap.peak": "12288\n",
    "memory.swap.events": "high 0\nmax 5\nfail 0\n",
    "pids.current": "1\n",
    "pids.max": "max\n",
    "pids.peak": "5\n",
    "pids.events": "max 7\n",
    "io.stat": (
        "254:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=16384 dios=4\n"
        "253:1 254:16 rbytes=512 wbytes=0 rios=1 wios=0 dbytes=0 dios=0 cost.usage=7\n7:0 \n"
    ),
    "hugetlb.2MB.current": "4194304\n",
    "hugetlb.2MB.max": "max\n",
    "hugetlb.2MB.events": "max 1\n",
    "rdma.current": "mlx4_0 hca_handle=2 hca_object=2000\nocrdma1 hca_handle=0 hca_object=1\n",
    "rdma.max": "mlx4_0 hca_handle=3 hca_object=max\nocrdma1 hca_handle=max hca_object=max\n",
    "cpu.pressure": (
        "some avg10=0.36 avg60=0.06 avg300=0.01 total=55719\nfull avg10=0.25 avg60=0.00 avg300=0.00 total=53732\n"
    ),
    "memory.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
}


def lay_out(directory: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return directory


@pytest.fixture
def legacy(tmp_path: Path) -> Path:
    """A directory for each controller, as cgroup v1 has it."""
    return lay_out(tmp_path / "v1", V1)


@pytest.fixture
def unified(tmp_path: Path) -> str:
    """One directory with everything, as cgroup v2 has it."""
    return str(lay_out(tmp_path / "v2", V2))


# ------------------------------------------------------------------------------------------------------------ cgroup v1


def test_v1_cpu_time_is_nanoseconds(legacy: Path) -> None:
    cpu = v1.cpu(str(legacy / "cpuacct"), str(legacy / "cpu"))
    assert cpu is not None
    tick = 10**9 // os.sysconf("SC_CLK_TCK")
    assert (cpu.usage, cpu.user, cpu.system) == (113_350_209, 9 * tick, tick)
    assert (cpu.limit, cpu.periods, cpu.throttled_periods, cpu.throttled) == (0.5, 4, 1, 51_436_651)
    assert cpu.per_cpu == [1_989_526, 111_360_683]
    assert cpu.stat["nr_bursts"] == 0


def test_v1_cpu_without_a_quota_or_without_its_controller_has_no_limit(legacy: Path) -> None:
    (legacy / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    with_controller = v1.cpu(str(legacy / "cpuacct"), str(legacy / "cpu"))
    assert with_controller is not None
    assert (with_controller.limit, with_controller.periods) == (None, 4)
    without = v1.cpu(str(legacy / "cpuacct"))
    assert without is not None
    assert (without.usage, without.limit, without.periods) == (113_350_209, None, 0)


def test_v1_memory_is_that_of_the_whole_subtree(legacy: Path) -> None:
    memory = v1.memory(str(legacy / "memory"))
    assert memory is not None
    assert (memory.usage, memory.peak, memory.limit, memory.limit_hits) == (22_200_320, 23_408_640, 64 * MIB, 3)
    assert (memory.anon, memory.file, memory.swapped) == (57_344, 20_979_712, 8192)
    assert memory.working_set == 22_200_320 - 20_975_616
    assert memory.oom_kills == 2
    assert memory.memsw == MemoryUse(usage=22_200_321, peak=23_408_641, limit=None)
    assert memory.kernel == MemoryUse(usage=794_624, peak=1_146_880, limit=None)
    assert memory.kernel_tcp is None
    assert memory.stat["hierarchical_memsw_limit"] == int(UNLIMITED)
    assert memory.oom_control == {"oom_kill_disable": 0, "under_oom": 0, "oom_kill": 2}
    assert memory.host == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_v1_block_devices_come_with_the_kernels_own_lines(legacy: Path) -> None:
    blkio = v1.blkio(str(legacy / "blkio"))
    assert blkio is not None
    disk, loop = blkio.devices
    assert (disk.major, disk.minor) == (254, 0)
    assert (disk.read_bytes, disk.write_bytes, disk.discarded_bytes) == (4096, 8192, 16_384)
    assert (disk.reads, disk.writes, disk.discards) == (1, 2, 4)
    assert loop == BlockDevice(major=7, minor=99, device=shared.device_name(7, 99), read_bytes=512)
    assert [(e.op, e.value) for e in blkio.entries if e.file == "io_serviced_recursive"] == [
        ("Read", 1), ("Write", 2), ("Sync", 3), ("Async", 0), ("Discard", 4), ("Total", 7),
    ]  # fmt: skip
    (legacy / "blkio/blkio.throttle.io_service_bytes_recursive").rename(
        legacy / "blkio/blkio.throttle.io_service_bytes"
    )
    assert v1.blkio(str(legacy / "blkio")) == blkio  # an older kernel's name


def test_v1_huge_pages_without_a_limit_have_none_whatever_their_size(legacy: Path) -> None:
    assert v1.hugetlb(str(legacy / "hugetlb"), ("64KB", "2MB", "1GB")) == [
        HugePages(page_size="2MB", usage=4 * MIB, peak=6 * MIB, limit=None, limit_hits=1),
        HugePages(page_size="1GB", usage=0, limit=GIB),
    ]


# ------------------------------------------------------------------------------------------------------------ cgroup v2


def test_v2_cpu_time_is_nanoseconds_too(unified: str) -> None:
    cpu = v2.cpu(unified)
    assert cpu is not None
    assert (cpu.usage, cpu.user, cpu.system) == (113_350_000, 98_236_000, 15_113_000)
    assert (cpu.limit, cpu.periods, cpu.throttled_periods, cpu.throttled) == (0.5, 4, 1, 51_436_000)
    assert cpu.stat["usage_usec"] == 113_350
    Path(unified, "cpu.max").write_text("max 100000\n")
    unlimited = v2.cpu(unified)
    assert unlimited is not None
    assert unlimited.limit is None


def test_v2_memory_has_its_protections_events_and_swap(unified: str) -> None:
    memory = v2.memory(unified)
    assert memory is not None
    assert (memory.usage, memory.peak, memory.limit, memory.limit_hits) == (22_200_320, 23_408_640, 64 * MIB, 3)
    assert (memory.min, memory.low, memory.high) == (4096, 0, 60_000_000)
    assert (memory.anon, memory.file, memory.swapped) == (57_344, 20_979_712, 8192)
    assert memory.working_set == 22_200_320 - 20_975_616
    assert memory.oom_kills == 2
    assert memory.swap == MemoryUse(usage=8192, peak=12_288, limit=None, limit_hits=5)
    assert memory.events["high"] == 1
    Path(unified, "memory.min").write_text("max\n")
    everything = v2.memory(unified)
    assert everything is not None
    assert everything.min == everything.host


def test_v2_io_keeps_to_the_device_that_has_figures(unified: str) -> None:
    blkio = v2.blkio(unified)
    assert blkio is not None
    assert [(d.major, d.minor, d.read_bytes, d.write_bytes) for d in blkio.devices] == [
        (254, 0, 4096, 8192), (254, 16, 512, 0),
    ]  # fmt: skip
    disk = blkio.devices[0]
    assert (disk.reads, disk.writes, disk.discarded_bytes, disk.discards) == (1, 2, 16_384, 4)


def test_v2_pids_huge_pages_and_rdma(unified: str) -> None:
    assert shared.pids(unified) == PidsMetrics(current=1, limit=None, peak=5, limit_hits=7)
    assert v2.hugetlb(unified, ("2MB", "1GB")) == [HugePages(page_size="2MB", usage=4 * MIB, limit_hits=1)]
    assert shared.rdma(unified) == [
        RdmaDevice(device="mlx4_0", handles=2, objects=2000, handle_limit=3),
        RdmaDevice(device="ocrdma1", objects=1),
    ]


def test_pressure_is_per_cent_and_nanoseconds(unified: str) -> None:
    pressure = v2.pressure(unified)
    assert pressure.keys() == {"cpu", "memory"}
    assert pressure["cpu"].some.avg10 == 0.36
    assert pressure["cpu"].some.total == 55_719_000
    assert pressure["cpu"].full is not None
    assert pressure["cpu"].full.total == 53_732_000
    assert pressure["memory"].full is None


# ------------------------------------------------------------------------------------------------- one message for both


def job(tmp_path: Path) -> Job:
    return Job("default", "web", "request-1", 4711, str(tmp_path))


def test_the_same_container_reads_the_same_in_either_version(tmp_path: Path, legacy: Path, unified: str) -> None:
    names = ("cpu", "cpuacct", "memory", "pids", "blkio", "hugetlb")
    old = measure(job(tmp_path), Places("legacy", {name: str(legacy / name) for name in names}))
    new = measure(job(tmp_path), Places("unified", {}, unified))
    assert old is not None
    assert new is not None
    assert (old.cgroups, new.cgroups) == ("legacy", "unified")
    expected = {"cpu", "memory", "pids", "blkio"}
    assert {name for name, version in old.versions.items() if version == 1} >= expected
    assert {name for name, version in new.versions.items() if version == 2} >= expected | {"rdma"}
    for field in ("usage", "peak", "limit", "limit_hits", "working_set", "anon", "file", "swapped", "oom_kills"):
        assert getattr(old.memory, field) == getattr(new.memory, field), field
    assert old.blkio is not None
    assert new.blkio is not None
    assert old.blkio.devices[0] == new.blkio.devices[0]
    assert not old.pressure
    assert ContainerMetrics.unpack(old.pack()) == old
    assert ContainerMetrics.unpack(new.pack()) == new


def test_hybrid_takes_each_controller_from_where_it_is(tmp_path: Path, legacy: Path, unified: str) -> None:
    found = measure(job(tmp_path), Places("hybrid", {"memory": str(legacy / "memory")}, unified))
    assert found is not None
    assert found.versions["memory"] == 1
    assert found.versions["cpu"] == found.versions["pids"] == found.versions["blkio"] == 2
    assert found.pressure["cpu"].some.total == 55_719_000


def test_without_raw_the_named_figures_stay(tmp_path: Path, legacy: Path) -> None:
    names = ("cpu", "cpuacct", "memory", "pids", "blkio")
    places = Places("legacy", {name: str(legacy / name) for name in names})
    whole, slim = measure(job(tmp_path), places), measure(job(tmp_path), places, raw=False)
    assert whole is not None
    assert slim is not None
    dumped, expected = slim.model_dump(exclude={"at", "clock"}), whole.model_dump(exclude={"at", "clock"})
    expected["cpu"] |= {"stat": {}, "per_cpu": []}
    expected["memory"] |= {"stat": {}, "oom_control": {}, "memsw": None, "kernel": None, "kernel_tcp": None}
    expected["blkio"] |= {"entries": []}
    assert dumped == expected


def test_a_cgroup_that_goes_meanwhile_has_no_figures(tmp_path: Path, legacy: Path) -> None:
    places = Places("legacy", {"memory": str(legacy / "memory"), "pids": str(tmp_path / "gone")})
    assert measure(job(tmp_path), places) is None


def test_files_that_cant_be_read_or_understood_are_nothing(tmp_path: Path) -> None:
    assert read(str(tmp_path), "nowhere") is None
    assert read("", "etc/hostname") is None
    (tmp_path / "odd").write_text("some words\nkey 7\nkey2 8 9\n\nx=y\n")
    assert read_number(str(tmp_path), "odd") is None
    assert flat(read(str(tmp_path), "odd")) == {"key": 7}
    assert nested(read(str(tmp_path), "odd")) == {}
    (tmp_path / "long").write_text("1\n" * 100_000)
    assert read(str(tmp_path), "long") == "1\n" * 100_000
    for reading in (v1.memory, v2.memory, v1.cpu, v2.cpu, v1.blkio, v2.blkio, shared.pids):
        assert reading(str(tmp_path)) is None
    assert v2.pressure(str(tmp_path)) == {}


def test_sizes_of_huge_pages_are_named_as_the_controller_does(tmp_path: Path) -> None:
    for name in ("hugepages-1048576kB", "hugepages-2048kB", "hugepages-64kB"):
        (tmp_path / name).mkdir()
    assert shared.huge_page_sizes(str(tmp_path)) == ("64KB", "2MB", "1GB")
    assert shared.huge_page_sizes(str(tmp_path / "none")) == ()


# --------------------------------------------------------------------------------------------------- where cgroups are

MOUNTS_HYBRID = """\
23 1 254:0 / / rw,relatime - ext4 /dev/root rw
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 /docker/abc /mnt/part rw,relatime - cgroup cgroup rw,memory
36 31 0:32 / /sys/fs/cgroup/mem\\040ory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate
"""
MOUNTS_UNIFIED = "41 31 0:38 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n"
MOUNTS_LEGACY = MOUNTS_HYBRID[: MOUNTS_HYBRID.index("41 31")]


def test_the_mode_is_told_by_what_is_mounted() -> None:
    modes = [Hierarchies.parse(text).mode for text in (MOUNTS_LEGACY, MOUNTS_HYBRID, MOUNTS_UNIFIED)]
    assert modes == ["legacy", "hybrid", "unified"]


def test_each_controller_is_found_where_it_is_mounted() -> None:
    membership = "9:name=systemd:/ns/web\n4:memory:/ns/web\n2:cpu,cpuacct:/ns/web\n3:rdma:/ns/web\n0::/ns/web\n"
    places = Hierarchies.parse(MOUNTS_HYBRID).places(membership, ("ns", "web"))
    cpu = "/sys/fs/cgroup/cpu,cpuacct/ns/web"
    assert places == Places(
        "hybrid", {"memory": "/sys/fs/cgroup/mem ory/ns/web", "cpu": cpu, "cpuacct": cpu},
        "/sys/fs/cgroup/unified/ns/web",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("path", "directory"),
    [
        ("/ns/web", "/sys/fs/cgroup/ns/web"),
        ("/ns/web/init.scope", "/sys/fs/cgroup/ns/web"),  # a systemd in the container
        ("/outer/ns/web", "/sys/fs/cgroup/outer/ns/web"),  # a relative path, below the runtime's own
        ("/", ""),
        ("/ns", ""),
        ("/ns/web2", ""),
        ("/ns/other", ""),
        ("/user.slice/session-1.scope", ""),  # whoever has the pid now
    ],
)
def test_only_the_containers_own_cgroup_counts(path: str, directory: str) -> None:
    places = Hierarchies.parse(MOUNTS_UNIFIED).places(f"0::{path}\n", ("ns", "web"))
    assert places.v2 == directory
    assert bool(places) == bool(directory)


def test_what_is_outside_of_the_part_that_is_mounted_isnt_there() -> None:
    part = Hierarchies.parse("41 31 0:38 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    assert part.places("0::/docker/abc/ns/web\n", ("ns", "web")).v2 == "/sys/fs/cgroup/ns/web"
    assert not part.places("0::/docker/abcd/ns/web\n", ("ns", "web"))


@pytest.mark.parametrize(
    ("cgroups_path", "own"),
    [
        ("/default/web", ("default", "web")),
        ("default/web/", ("default", "web")),
        ("/a/../b//c", ("b", "c")),
        ("/../../etc", ("etc",)),
        ("machine.slice:shoal:web", ("shoal-web.scope",)),
        (":shoal:web", ("shoal-web.scope",)),
        ("machine.slice::web", ("web.scope",)),
        ("machine.slice:shoal:pod.slice", ("pod.slice",)),
        ("/kubepods/pod:1:2", ("kubepods", "pod:1:2")),
        ("", ("web",)),
    ],
)
def test_the_own_cgroup_is_the_one_the_specification_names(cgroups_path: str, own: tuple[str, ...]) -> None:
    assert own_cgroup(cgroups_path, "web") == own
