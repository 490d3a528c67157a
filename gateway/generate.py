"""Generates the Python modules of shoal_gateway/proto/ and their type stubs, beside the .proto files.

uv run python gateway/generate.py            writes them
uv run python gateway/generate.py --check    writes nothing, and exits 1 when what is there is stale
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import google.rpc  # type: ignore[import-untyped]
import grpc_tools  # type: ignore[import-untyped]
from grpc_tools import protoc

GATEWAY = Path(__file__).resolve().parent
PROTO = Path("shoal_gateway/proto")


def generate(target: Path) -> None:
    """Runs protoc over every .proto file, writing below `target`."""
    # Imports are written from the package's root, so that what is generated imports by its full name.
    includes = [GATEWAY, Path(grpc_tools.__path__[0]) / "_proto", Path(next(iter(google.rpc.__path__))).parent.parent]
    files = sorted(str(path.relative_to(GATEWAY)) for path in (GATEWAY / PROTO).rglob("*.proto"))
    arguments = [*(f"-I{include}" for include in includes), f"--python_out={target}", f"--pyi_out={target}", *files]
    if protoc.main(["protoc", *arguments]) != 0:
        raise SystemExit("protoc failed")


def generated(root: Path) -> dict[Path, bytes]:
    """Every generated file below `root`, by its path there."""
    files = [*(root / PROTO).rglob("*_pb2.py"), *(root / PROTO).rglob("*_pb2.pyi")]
    return {path.relative_to(root): path.read_bytes() for path in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail when the generated code is stale")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        generate(Path(directory))
        fresh, present = generated(Path(directory)), generated(GATEWAY)
    stale = sorted(path for path in fresh.keys() | present.keys() if fresh.get(path) != present.get(path))
    if args.check:
        for path in stale:
            sys.stderr.write(f"gateway/{path}: stale (run `make generate`)\n")
        raise SystemExit(1 if stale else 0)
    for path in stale:
        if path in fresh:
            (GATEWAY / path).write_bytes(fresh[path])
        else:
            (GATEWAY / path).unlink()


if __name__ == "__main__":
    main()
