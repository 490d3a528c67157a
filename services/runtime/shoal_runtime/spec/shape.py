"""The shape of an OCI specification: what the runtime-spec's JSON schema says of each field that concerns Linux.

Where the text is stricter than the schema (a hook's path is absolute, a weight is from 10 to 1000), so is this.
"""

from __future__ import annotations

from shoal_runtime.spec.schema import (
    INT64,
    Check,
    absolute_path,
    any_text,
    boolean,
    int32,
    int64,
    integer,
    many,
    map_of,
    matching,
    one_of,
    plain_text,
    record,
    some_text,
    uint32,
    uint64,
)


def _named(prefix: str, names: str) -> Check:
    """One of the constants that begin with `prefix`."""
    return one_of(*(f"{prefix}{name}" for name in names.split()))


_rlimit = _named(
    "RLIMIT_",
    "AS CORE CPU DATA FSIZE LOCKS MEMLOCK MSGQUEUE NICE NOFILE NPROC RSS RTPRIO RTTIME SIGPENDING STACK",
)
"""getrlimit(2): one that the kernel doesn't have is an error, says the specification."""

_texts = many(plain_text)
_strings = map_of(any_text)
_limit = integer(-1, INT64)
"""Bytes or a count; -1 for none."""
_numbers = matching(r"[0-9, \-]*", "a list of numbers and ranges, as 0-2,4")

_id_maps = many(
    record(
        {"containerID": uint32, "hostID": uint32, "size": integer(1, 2**32 - 1)},
        required=("containerID", "hostID", "size"),
    )
)
_hook = record({"path": absolute_path, "args": _texts, "env": _texts, "timeout": integer(1, INT64)}, required=("path",))
_capabilities = many(matching(r"CAP_[A-Z0-9_]+", "a capability, as CAP_NET_ADMIN"))

check_process: Check = record(
    {
        "terminal": boolean,
        "consoleSize": record({"height": uint64, "width": uint64}, required=("height", "width")),
        "user": record(
            {"uid": uint32, "gid": uint32, "umask": uint32, "additionalGids": many(uint32), "username": any_text}
        ),
        "args": _texts,
        "env": _texts,
        "cwd": absolute_path,
        "capabilities": record(
            dict.fromkeys(("bounding", "permitted", "effective", "inheritable", "ambient"), _capabilities)
        ),
        "rlimits": many(
            record(
                {"type": _rlimit, "soft": uint64, "hard": uint64}, required=("type", "soft", "hard")
            )
        ),
        "noNewPrivileges": boolean,
        "oomScoreAdj": integer(-1000, 1000),
        "apparmorProfile": any_text,
        "selinuxLabel": any_text,
        "ioPriority": record(
            {"class": one_of("IOPRIO_CLASS_RT", "IOPRIO_CLASS_BE", "IOPRIO_CLASS_IDLE"), "priority": integer(0, 7)},
            required=("class",),
        ),
        "scheduler": record(
            {
                "policy": _named("SCHED_", "OTHER FIFO RR BATCH ISO IDLE DEADLINE"),
                "nice": int32,
                "priority": int32,
                "flags": many(matching(r"SCHED_FLAG_[A-Z_]+", "a scheduler's flag")),
                "runtime": uint64,
                "deadline": uint64,
                "period": uint64,
            },
            required=("policy",),
        ),
        "execCPUAffinity": record({"initial": _numbers, "final": _numbers}),
    },
    required=("args", "cwd"),
)  # fmt: skip
"""`process`, in a specification or of an exec."""

_block_device = {"major": int64, "minor": int64}
_weight = integer(0, 1000)
"""0 is none; else from 10 on, which the kernel checks."""
_throttles = many(record({**_block_device, "rate": uint64}, required=("major", "minor")))

check_resources: Check = record(
    {
        "unified": _strings,
        "devices": many(
            record(
                {
                    "allow": boolean,
                    "type": one_of("", "a", "b", "c", "u", "p"),
                    "major": int64,
                    "minor": int64,
                    "access": matching(r"[rwm]*", "any of r, w and m"),
                },
                required=("allow",),
            )
        ),
        "memory": record(
            {
                **dict.fromkeys(("limit", "reservation", "swap", "kernel", "kernelTCP"), _limit),
                "swappiness": integer(0, 200),
                **dict.fromkeys(("disableOOMKiller", "useHierarchy", "checkBeforeUpdate"), boolean),
            }
        ),
        "cpu": record(
            {
                "shares": uint64,
                "quota": int64,
                "burst": uint64,
                "period": uint64,
                "realtimeRuntime": int64,
                "realtimePeriod": uint64,
                "cpus": _numbers,
                "mems": _numbers,
                "idle": integer(0, 1),
            }
        ),
        "pids": record({"limit": int64}, required=("limit",)),
        "blockIO": record(
            {
                "weight": _weight,
                "leafWeight": _weight,
                "weightDevice": many(
                    record(
                        {**_block_device, "weight": _weight, "leafWeight": _weight}, required=("major", "minor")
                    )
                ),
                **{
                    f"throttle{way}{unit}Device": _throttles for way in ("Read", "Write") for unit in ("Bps", "IOPS")
                },
            }
        ),
        "hugepageLimits": many(
            record(
                {"pageSize": matching(r"[1-9][0-9]*[KMG]B", "a page size, as 2MB"), "limit": uint64},
                required=("pageSize", "limit"),
            )
        ),
        "network": record(
            {
                "classID": uint32,
                "priorities": many(record({"name": some_text, "priority": uint32}, required=("name", "priority"))),
            }
        ),
        "rdma": map_of(record({"hcaHandles": uint32, "hcaObjects": uint32})),
    }
)  # fmt: skip
"""`linux.resources`, in a specification or as an update of it."""

_action = _named("SCMP_ACT_", "KILL KILL_PROCESS KILL_THREAD TRAP ERRNO TRACE ALLOW LOG NOTIFY")
check_seccomp_profile: Check = record(
    {
        "defaultAction": _action,
        "defaultErrnoRet": uint32,
        "flags": many(_named("SECCOMP_FILTER_FLAG_", "TSYNC LOG SPEC_ALLOW WAIT_KILLABLE_RECV")),
        "listenerPath": plain_text,
        "listenerMetadata": any_text,
        "architectures": many(matching(r"SCMP_ARCH_[A-Z0-9_]+", "an architecture, as SCMP_ARCH_X86_64")),
        "syscalls": many(
            record(
                {
                    "names": many(some_text, least=1),
                    "action": _action,
                    "errnoRet": uint32,
                    "args": many(
                        record(
                            {
                                "index": integer(0, 5),
                                "value": uint64,
                                "valueTwo": uint64,
                                "op": _named("SCMP_CMP_", "NE LT LE EQ GE GT MASKED_EQ"),
                            },
                            required=("index", "value", "op"),
                        )
                    ),
                },
                required=("names", "action"),
            )
        ),
    },
    required=("defaultAction",),
)
"""`linux.seccomp`."""

_offsets = record({"secs": int64, "nanosecs": uint32})
_propagations = ("private", "slave", "shared", "unbindable")

_linux = record(
    {
        "namespaces": many(
            record(
                {
                    "type": one_of("mount", "pid", "network", "uts", "ipc", "user", "cgroup", "time"),
                    "path": matching(r"(/[^\0]*)?", "an absolute path"),
                },
                required=("type",),
            )
        ),
        "uidMappings": _id_maps,
        "gidMappings": _id_maps,
        "devices": many(
            record(
                {
                    "type": one_of("c", "b", "u", "p"),
                    "path": absolute_path,
                    "major": int64,
                    "minor": int64,
                    "fileMode": integer(0, 0o7777),
                    "uid": uint32,
                    "gid": uint32,
                },
                required=("type", "path"),
            )
        ),
        "netDevices": map_of(record({"name": any_text})),
        "cgroupsPath": plain_text,
        "resources": check_resources,
        "rootfsPropagation": one_of("", *_propagations, *(f"r{name}" for name in _propagations)),
        "seccomp": check_seccomp_profile,
        "sysctl": _strings,
        "maskedPaths": _texts,
        "readonlyPaths": _texts,
        "mountLabel": any_text,
        "intelRdt": record(
            {
                "closID": any_text,
                "schemata": many(any_text),
                "l3CacheSchema": any_text,
                "memBwSchema": matching(r"(MB:[^\n]*)?", "a schema that begins with MB:"),
                "enableMonitoring": boolean,
            }
        ),
        "memoryPolicy": record(
            {
                "mode": matching(r"MPOL_[A-Z_]+", "a policy, as MPOL_BIND"),
                "nodes": _numbers,
                "flags": many(matching(r"MPOL_F_[A-Z_]+", "a policy's flag")),
            }
        ),
        "personality": record({"domain": one_of("LINUX", "LINUX32"), "flags": many(any_text)}),
        "timeOffsets": record({"boottime": _offsets, "monotonic": _offsets}),
    }
)

check_shape: Check = record(
    {
        "ociVersion": matching(r"[0-9]+\.[0-9]+\.[0-9]+([-+].*)?", "a version, as 1.0.2"),
        "process": check_process,
        "root": record({"path": some_text, "readonly": boolean}, required=("path",)),
        "hostname": plain_text,
        "domainname": plain_text,
        "mounts": many(
            record(
                {
                    "destination": some_text,
                    "type": plain_text,
                    "source": plain_text,
                    "options": _texts,
                    "uidMappings": _id_maps,
                    "gidMappings": _id_maps,
                },
                required=("destination",),
            )
        ),
        "hooks": record(
            dict.fromkeys(
                ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"),
                many(_hook),
            )
        ),
        "annotations": _strings,
        "linux": _linux,
    },
    required=("ociVersion", "process", "root"),
)
"""A whole specification of a Linux container that is to be started."""
