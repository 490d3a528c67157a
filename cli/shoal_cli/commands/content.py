"""`content ls|get|put|label|rm|ingests|abort|scrub`: blobs, and those in the making."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal_cli.target import Target, client_command

if TYPE_CHECKING:
    from shoal_bus.api import content

app = typer.Typer(help="Blobs: what images are made of, by their digests.")

GC_ROOT = "containerd.io/gc.root"
"""containerd's label for what isn't collected, whatever refers to it."""
DIGEST = typer.Argument(help="A digest, or its first digits.", show_default=False)
FILTER = typer.Option("--filter", help="containerd's, as size==0 or labels.app~=^web; any of several matches.")


@app.command("ls")
@client_command
async def list_(
    target: Target,
    filter: Annotated[list[str] | None, FILTER] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only digests.")] = False,
) -> None:
    """List blobs."""
    from shoal_bus.api import content

    from shoal_cli.output import age, print_json, print_table, size

    async with target.client() as client:
        found = await client.collect(content.BLOB_LIST, content.ListBlobs(filters=filter or []))
    if target.json:
        print_json(found)
    elif quiet:
        for blob in found:
            print(blob.digest)
    else:
        rows = [(b.digest, size(b.size), age(b.created_at), b.rotten and "rotten", _labels(b.labels)) for b in found]
        print_table(("DIGEST", "SIZE", "CREATED", "STATE", "LABELS"), rows)


@app.command()
@client_command
async def get(
    target: Target,
    digest: Annotated[str, DIGEST],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A file, instead of standard output; one broken off is gone on with."),
    ] = None,
) -> None:
    """Read a blob, compared with its digest on the way."""
    from contextlib import aclosing

    from shoal_bus.blobs import download

    from shoal_cli.blobs import digest_of, save

    async with target.client() as client:
        wanted = await digest_of(client, digest)
        if output is not None:
            await save(client, wanted, output)
            return
        async with aclosing(download(client, wanted)) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()


@app.command()
@client_command
async def put(
    target: Target,
    file: Annotated[str, typer.Argument(help="A file; - is standard input.")] = "-",
    ref: Annotated[
        str, typer.Option(help="The ingest's name: one that was broken off is gone on with.", show_default=False)
    ] = "",
    expected: Annotated[str, typer.Option(help="The digest it must have.", show_default=False)] = "",
    label: Annotated[list[str] | None, typer.Option("--label", "-l", help="KEY=VALUE.")] = None,
    temporary: Annotated[
        bool, typer.Option("--temporary", help="Let it be collected as garbage unless something refers to it.")
    ] = False,
    lease: Annotated[
        str, typer.Option("--lease", help="A lease that holds it until it ends, instead.", show_default=False)
    ] = "",
) -> None:
    """Write a blob; prints its digest. It stays until it is removed, by the label containerd.io/gc.root."""
    from contextlib import ExitStack
    from datetime import UTC, datetime

    from shoal_bus.blobs import upload
    from shoal_bus.errors import InvalidArgument
    from shoal_bus.types import check_digest

    from shoal_cli.blobs import source
    from shoal_cli.output import print_json
    from shoal_cli.request import labels

    try:
        expected = expected and check_digest(expected)
    except ValueError as error:
        raise InvalidArgument(f"--expected: {error}") from None
    kept = {} if temporary or lease else {GC_ROOT: datetime.now(UTC).isoformat(timespec="seconds")}
    with ExitStack() as stack:
        bytes_ = stack.enter_context(source(file))
        async with target.client(lease=lease) as client:
            digest = await upload(client, bytes_, ref=ref, expected=expected, labels=kept | labels(label or []))
    if target.json:
        print_json({"digest": digest})
    else:
        print(digest)


@app.command()
@client_command
async def label(
    target: Target,
    digest: Annotated[str, DIGEST],
    label: Annotated[list[str], typer.Argument(help="KEY=VALUE; KEY= takes it away.", show_default=False)],
) -> None:
    """Change labels of a blob; prints those it has."""
    from shoal_bus.api import content
    from shoal_bus.errors import InvalidArgument

    from shoal_cli.blobs import digest_of
    from shoal_cli.output import print_json

    given = {}
    for entry in label:
        key, equals, value = entry.partition("=")
        if not key or not equals:
            raise InvalidArgument(f"{entry!r}: must be KEY=VALUE, or KEY= to take it away")
        given[key] = value
    async with target.client() as client:
        wanted = await digest_of(client, digest)
        request = content.UpdateBlob(digest=wanted, labels=given, fields=[f"labels.{key}" for key in given])
        changed = await client.call(content.BLOB_UPDATE, request)
    if target.json:
        print_json(changed)
    else:
        for key, value in sorted(changed.labels.items()):
            print(f"{key}={value}")


@app.command()
@client_command
async def rm(target: Target, digest: Annotated[list[str], DIGEST]) -> int:
    """Remove blobs from the namespace. What an image still needs is missing then: `shoal pull` brings it back."""
    from shoal_bus.api import content
    from shoal_bus.client import Client

    from shoal_cli.blobs import digest_of
    from shoal_cli.each import for_each

    async def remove(client: Client, given: str) -> None:
        await client.call(content.BLOB_DELETE, content.BlobRequest(digest=await digest_of(client, given)))

    async with target.client() as client:
        return await for_each(digest, lambda one: remove(client, one), quiet=target.json)


@app.command()
@client_command
async def ingests(target: Target, filter: Annotated[list[str] | None, FILTER] = None) -> None:
    """List blobs in the making."""
    from shoal_bus.api import content

    from shoal_cli.output import age, print_json, print_table, size

    async with target.client() as client:
        found = await client.collect(content.INGEST_LIST, content.ListBlobs(filters=filter or []))
    if target.json:
        print_json(found)
        return
    rows = [
        (i.ref, size(i.offset), size(i.total) if i.total else "", age(i.started_at), age(i.updated_at)) for i in found
    ]
    print_table(("REF", "SIZE", "OF", "STARTED", "UPDATED"), rows)


@app.command()
@client_command
async def abort(
    target: Target, ref: Annotated[list[str], typer.Argument(help="Ingests, by their refs.", show_default=False)]
) -> int:
    """Drop blobs in the making, with their bytes."""
    from shoal_bus.api import content

    from shoal_cli.each import for_each

    async with target.client() as client:
        return await for_each(
            ref,
            lambda one: client.call(content.INGEST_ABORT, content.IngestRequest.of({"ref": one})),
            quiet=target.json,
        )


@app.command()
@client_command
async def scrub(
    target: Target,
    digest: Annotated[list[str] | None, typer.Argument(help="Digests; else all blobs.", show_default=False)] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> int:
    """Read blobs and compare them with their digests; exits with 10 where some are damaged.

    Damaged ones are set aside, and not served until they are pulled or written again.
    """
    from contextlib import ExitStack

    from shoal_bus.api import content
    from shoal_bus.errors import Code

    from shoal_cli.blobs import digest_of
    from shoal_cli.errors import EXIT_CODES
    from shoal_cli.output import print_json, print_table, size

    with ExitStack() as stack:
        told = None if quiet or target.json or not sys.stderr.isatty() else stack.enter_context(_Bar())
        async with target.client() as client:
            wanted = [await digest_of(client, one) for one in digest or []]
            report = await client.operate(
                content.BLOB_SCRUB,
                content.ScrubBlobs(digests=wanted),
                on_progress=told.update if told is not None else None,
            )
    if target.json:
        print_json(report)
    elif report.rotten:
        print_table(("DIGEST", "SIZE", "PROBLEM"), [(one.digest, size(one.size), one.problem) for one in report.rotten])
    else:
        print(f"{report.blobs} blobs, {size(report.bytes)}: all sound")
    return EXIT_CODES[Code.DATA_LOSS] if report.rotten else 0


class _Bar:
    """One bar on standard error while the block lasts."""

    def __enter__(self) -> _Bar:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

        self._progress = Progress(
            BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), console=Console(stderr=True),
            transient=True,
        )  # fmt: skip
        self._progress.start()
        self._task = self._progress.add_task("", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, progress: content.ScrubProgress) -> None:
        self._progress.update(self._task, completed=progress.bytes_done, total=progress.bytes_total)


def _labels(labels: dict[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
