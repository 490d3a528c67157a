"""Requests that are right, for `hostile` to make wrong, and what they are about, made on any containerd."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from shoal_gateway.proto.containerd.services.containers.v1 import containers_pb2 as containers
from shoal_gateway.proto.containerd.services.content.v1 import content_pb2 as content
from shoal_gateway.proto.containerd.services.diff.v1 import diff_pb2 as diff
from shoal_gateway.proto.containerd.services.events.v1 import events_pb2 as events
from shoal_gateway.proto.containerd.services.images.v1 import images_pb2 as images
from shoal_gateway.proto.containerd.services.leases.v1 import leases_pb2 as leases
from shoal_gateway.proto.containerd.services.mounts.v1 import mounts_pb2 as mounts
from shoal_gateway.proto.containerd.services.namespaces.v1 import namespace_pb2 as namespaces
from shoal_gateway.proto.containerd.services.sandbox.v1 import sandbox_pb2 as sandboxes
from shoal_gateway.proto.containerd.services.snapshots.v1 import snapshots_pb2 as snapshots
from shoal_gateway.proto.containerd.services.tasks.v1 import tasks_pb2 as tasks
from shoal_gateway.proto.containerd.services.transfer.v1 import transfer_pb2 as transfer
from shoal_gateway.proto.containerd.types.descriptor_pb2 import Descriptor
from shoal_gateway.proto.containerd.types.mount_pb2 import Mount
from shoal_gateway.proto.containerd.types.sandbox_pb2 import Sandbox
from shoal_gateway.proto.containerd.types.transfer.imagestore_pb2 import ImageStore
from shoal_gateway.proto.containerd.types.transfer.registry_pb2 import OCIRegistry

from tests.support.gateway import rpc
from tests.support.gateway_tasks import PROCESS, RESOURCES, RUNC_V2, SPEC, document

SERVICES = "containerd.services"
BLOB = b"a blob that stays"
DIGEST = f"sha256:{hashlib.sha256(BLOB).hexdigest()}"
CONTAINER, STOPPED, IMAGE, LEASE, COMMITTED, ACTIVE = (
    "runs",
    "still",
    "example.com/there:1",
    "kept",
    "committed",
    "active",
)
target = Descriptor(media_type="application/vnd.oci.image.manifest.v1+json", digest=DIGEST, size=len(BLOB))
_PROCESS = {"args": ["true"], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}}


def packed(message: Message) -> AnyMessage:
    return AnyMessage(type_url=message.DESCRIPTOR.full_name, value=message.SerializeToString())


def bases(spec: dict[str, Any]) -> dict[str, Message]:
    """A request for each method, by `Service/Method`: of what `furnish` makes, where nothing happens to that."""
    made = document(SPEC, spec)
    wanted: dict[str, Message] = {
        "containers.v1.Containers/Get": containers.GetContainerRequest(id=CONTAINER),
        "containers.v1.Containers/List": containers.ListContainersRequest(filters=[f"id=={CONTAINER}"]),
        "containers.v1.Containers/ListStream": containers.ListContainersRequest(filters=[f"id=={CONTAINER}"]),
        "containers.v1.Containers/Create": containers.CreateContainerRequest(
            container=containers.Container(
                id=CONTAINER,
                image=IMAGE,
                runtime={"name": RUNC_V2},
                spec=made,
                snapshotter="overlayfs",
                snapshot_key=ACTIVE,
            )
        ),
        "containers.v1.Containers/Update": containers.UpdateContainerRequest(
            container=containers.Container(id=STOPPED, runtime={"name": RUNC_V2}, spec=made),
            update_mask={"paths": ["labels"]},
        ),
        "containers.v1.Containers/Delete": containers.DeleteContainerRequest(id="missing"),
        "content.v1.Content/Info": content.InfoRequest(digest=DIGEST),
        "content.v1.Content/Update": content.UpdateRequest(
            info=content.Info(digest=DIGEST), update_mask={"paths": ["labels.a"]}
        ),
        "content.v1.Content/List": content.ListContentRequest(filters=["labels.a==b"]),
        "content.v1.Content/Delete": content.DeleteContentRequest(digest=DIGEST[:-4] + "0000"),
        "content.v1.Content/Read": content.ReadContentRequest(digest=DIGEST),
        "content.v1.Content/Status": content.StatusRequest(ref="missing"),
        "content.v1.Content/ListStatuses": content.ListStatusesRequest(filters=["ref==x"]),
        "content.v1.Content/Write": content.WriteContentRequest(
            action=content.WRITE, ref="hostile", total=9, offset=0, data=b"123"
        ),
        "content.v1.Content/Abort": content.AbortRequest(ref="missing"),
        "diff.v1.Diff/Apply": diff.ApplyRequest(diff=target, mounts=[Mount(type="bind", source="/nothing/there")]),
        "diff.v1.Diff/Diff": diff.DiffRequest(
            left=[Mount(type="bind", source="/nothing/left")],
            right=[Mount(type="bind", source="/nothing/right")],
            media_type="application/vnd.oci.image.layer.v1.tar+gzip",
            ref="hostile-diff",
        ),
        "events.v1.Events/Publish": events.PublishRequest(topic="/hostile", event=packed(target)),
        "events.v1.Events/Forward": events.ForwardRequest(
            envelope={"namespace": "default", "topic": "/hostile", "event": packed(target), "timestamp": {"seconds": 1}}
        ),
        "events.v1.Events/Subscribe": events.SubscribeRequest(filters=["topic==/nothing"]),
        "images.v1.Images/Get": images.GetImageRequest(name=IMAGE),
        "images.v1.Images/List": images.ListImagesRequest(filters=["name==x"]),
        "images.v1.Images/Create": images.CreateImageRequest(image=images.Image(name=IMAGE, target=target)),
        "images.v1.Images/Update": images.UpdateImageRequest(
            image=images.Image(name=IMAGE, target=target), update_mask={"paths": ["labels.a"]}
        ),
        "images.v1.Images/Delete": images.DeleteImageRequest(name="missing"),
        "leases.v1.Leases/Create": leases.CreateRequest(id=LEASE),
        "leases.v1.Leases/Delete": leases.DeleteRequest(id="missing"),
        "leases.v1.Leases/List": leases.ListRequest(filters=["id==x"]),
        "leases.v1.Leases/AddResource": leases.AddResourceRequest(id=LEASE, resource={"id": DIGEST, "type": "content"}),
        "leases.v1.Leases/DeleteResource": leases.DeleteResourceRequest(
            id=LEASE, resource={"id": "missing", "type": "ingests"}
        ),
        "leases.v1.Leases/ListResources": leases.ListResourcesRequest(id=LEASE),
        "mounts.v1.Mounts/Activate": mounts.ActivateRequest(name="m", mounts=[Mount(type="bind", source="/x")]),
        "mounts.v1.Mounts/Deactivate": mounts.DeactivateRequest(name="m"),
        "mounts.v1.Mounts/Info": mounts.InfoRequest(name="m"),
        "mounts.v1.Mounts/Update": mounts.UpdateRequest(info={"name": "m"}, update_mask={"paths": ["labels.a"]}),
        "mounts.v1.Mounts/List": mounts.ListRequest(filters=["name==m"]),
        "namespaces.v1.Namespaces/Get": namespaces.GetNamespaceRequest(name="default"),
        "namespaces.v1.Namespaces/List": namespaces.ListNamespacesRequest(filter="name==x"),
        "namespaces.v1.Namespaces/Create": namespaces.CreateNamespaceRequest(namespace={"name": "hostile"}),
        "namespaces.v1.Namespaces/Update": namespaces.UpdateNamespaceRequest(
            namespace={"name": "hostile-changed"}, update_mask={"paths": ["labels.a"]}
        ),
        "namespaces.v1.Namespaces/Delete": namespaces.DeleteNamespaceRequest(name="missing"),
        "snapshots.v1.Snapshots/Prepare": snapshots.PrepareSnapshotRequest(snapshotter="overlayfs", key=ACTIVE),
        "snapshots.v1.Snapshots/View": snapshots.ViewSnapshotRequest(snapshotter="overlayfs", key=ACTIVE),
        "snapshots.v1.Snapshots/Mounts": snapshots.MountsRequest(snapshotter="overlayfs", key=ACTIVE),
        "snapshots.v1.Snapshots/Commit": snapshots.CommitSnapshotRequest(
            snapshotter="overlayfs", name="missing-name", key="missing"
        ),
        "snapshots.v1.Snapshots/Remove": snapshots.RemoveSnapshotRequest(snapshotter="overlayfs", key="missing"),
        "snapshots.v1.Snapshots/Stat": snapshots.StatSnapshotRequest(snapshotter="overlayfs", key=ACTIVE),
        "snapshots.v1.Snapshots/Update": snapshots.UpdateSnapshotRequest(
            snapshotter="overlayfs", info=snapshots.Info(name=ACTIVE), update_mask={"paths": ["labels.a"]}
        ),
        "snapshots.v1.Snapshots/List": snapshots.ListSnapshotsRequest(snapshotter="overlayfs", filters=["name==x"]),
        "snapshots.v1.Snapshots/Usage": snapshots.UsageRequest(snapshotter="overlayfs", key=ACTIVE),
        "snapshots.v1.Snapshots/Cleanup": snapshots.CleanupRequest(snapshotter="overlayfs"),
        "tasks.v1.Tasks/Create": tasks.CreateTaskRequest(container_id=CONTAINER),
        "tasks.v1.Tasks/Start": tasks.StartRequest(container_id="missing"),
        "tasks.v1.Tasks/Delete": tasks.DeleteTaskRequest(container_id="missing"),
        "tasks.v1.Tasks/DeleteProcess": tasks.DeleteProcessRequest(container_id=CONTAINER, exec_id="missing"),
        "tasks.v1.Tasks/Get": tasks.GetRequest(container_id=CONTAINER),
        "tasks.v1.Tasks/List": tasks.ListTasksRequest(filter="x"),
        "tasks.v1.Tasks/Kill": tasks.KillRequest(container_id=CONTAINER, signal=28),
        "tasks.v1.Tasks/Exec": tasks.ExecProcessRequest(
            container_id=CONTAINER, exec_id="tried", spec=document(PROCESS, _PROCESS)
        ),
        "tasks.v1.Tasks/ResizePty": tasks.ResizePtyRequest(container_id=CONTAINER, width=80, height=24),
        "tasks.v1.Tasks/CloseIO": tasks.CloseIORequest(container_id=CONTAINER, stdin=True),
        "tasks.v1.Tasks/Pause": tasks.PauseTaskRequest(container_id="missing"),
        "tasks.v1.Tasks/Resume": tasks.ResumeTaskRequest(container_id="missing"),
        "tasks.v1.Tasks/ListPids": tasks.ListPidsRequest(container_id=CONTAINER),
        "tasks.v1.Tasks/Checkpoint": tasks.CheckpointTaskRequest(container_id="missing"),
        "tasks.v1.Tasks/Update": tasks.UpdateTaskRequest(
            container_id=CONTAINER, resources=document(RESOURCES, {"cpu": {"shares": 512}})
        ),
        "tasks.v1.Tasks/Metrics": tasks.MetricsRequest(filters=[f"id=={CONTAINER}"]),
        "tasks.v1.Tasks/Wait": tasks.WaitRequest(container_id="missing"),
        "transfer.v1.Transfer/Transfer": transfer.TransferRequest(
            source=packed(OCIRegistry(reference="127.0.0.1:1/nothing:1")), destination=packed(ImageStore(name=IMAGE))
        ),
        "sandbox.v1.Store/Create": sandboxes.StoreCreateRequest(sandbox=_sandbox()),
        "sandbox.v1.Store/Update": sandboxes.StoreUpdateRequest(sandbox=_sandbox(), fields=["labels.a"]),
        "sandbox.v1.Store/Delete": sandboxes.StoreDeleteRequest(sandbox_id="missing"),
        "sandbox.v1.Store/List": sandboxes.StoreListRequest(filters=["id==x"]),
        "sandbox.v1.Store/Get": sandboxes.StoreGetRequest(sandbox_id="box"),
    }
    return {f"{SERVICES}.{name}": message for name, message in wanted.items()}


def _sandbox() -> Sandbox:
    return Sandbox(sandbox_id="box", runtime={"name": RUNC_V2}, sandboxer="shim")


async def furnish(
    channel: grpc.aio.Channel, namespace: str, spec: dict[str, Any], still: dict[str, Any], rootfs: list[Mount]
) -> None:
    """What the requests are about: an image and its blob, a lease, snapshots, and a container with a task and one
    without."""
    metadata = (("containerd-namespace", namespace), ("containerd-lease", LEASE))

    async def ask(method: str, request: Message, **more: Any) -> Any:
        return await rpc(channel, f"/{SERVICES}.{method}", request, metadata=metadata, **more)

    await rpc(channel, f"/{SERVICES}.leases.v1.Leases/Create", leases.CreateRequest(id=LEASE), metadata=metadata[:1])
    write = content.WriteContentRequest(action=content.COMMIT, ref="there", total=len(BLOB), expected=DIGEST, data=BLOB)
    writing = channel.stream_stream(f"/{SERVICES}.content.v1.Content/Write")(
        _once(write.SerializeToString()), metadata=metadata
    )
    assert [data async for data in writing]
    await ask("images.v1.Images/Create", images.CreateImageRequest(image=images.Image(name=IMAGE, target=target)))
    prepare, commit = "snapshots.v1.Snapshots/Prepare", "snapshots.v1.Snapshots/Commit"
    await ask(prepare, snapshots.PrepareSnapshotRequest(snapshotter="overlayfs", key="first"))
    await ask(commit, snapshots.CommitSnapshotRequest(snapshotter="overlayfs", key="first", name=COMMITTED))
    await ask(prepare, snapshots.PrepareSnapshotRequest(snapshotter="overlayfs", key=ACTIVE, parent=COMMITTED))
    for id, document_of in ((CONTAINER, spec), (STOPPED, still)):
        one = containers.Container(id=id, runtime={"name": RUNC_V2}, spec=document(SPEC, document_of))
        await ask("containers.v1.Containers/Create", containers.CreateContainerRequest(container=one))
    await ask("tasks.v1.Tasks/Create", tasks.CreateTaskRequest(container_id=CONTAINER, rootfs=rootfs))
    await ask("tasks.v1.Tasks/Start", tasks.StartRequest(container_id=CONTAINER))


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data
