"""`oci-hook`: what an OCI runtime runs as a hook, with the container's state put into its arguments and environment.

The state is on standard input (runtime-spec, "POSIX-platform Hooks"). What is filled in are actions of Go's templates,
as in containerd's command of the same name: `{{id}}`, `{{pid}}`, `{{status}}`, `{{bundle}}`, `{{rootfs}}` and
`{{annotation "key"}}`, white space beside them cut by `{{-` and `-}}`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from shoal_bus.errors import InvalidArgument, NotFound, ShoalError

_ACTION = re.compile(r"(\s*\{\{-(?=\s)|\{\{)(.*?)((?<=\s)-\}\}\s*|\}\})", re.DOTALL)
_COMMENT = re.compile(r"/\*.*\*/", re.DOTALL)
_ANNOTATION = re.compile(r"""annotation\s+("(?:[^"\\\n]|\\.)*"|`[^`]*`)""")


def run(command: Sequence[str], state: str, environment: Mapping[str, str]) -> NoReturn:
    """Becomes the command. INVALID_ARGUMENT for a state or an action that isn't one, NOT_FOUND for what isn't there."""
    values = _values(state)
    arguments = [filled(one, values) for one in command]
    filled_environment = {key: filled(value, values) for key, value in environment.items()}
    try:
        os.execvpe(arguments[0], arguments, filled_environment)  # noqa: S606 (that is what it is for)
    except OSError as error:
        kind: type[ShoalError] = NotFound if isinstance(error, FileNotFoundError) else InvalidArgument
        raise kind(f"oci-hook: {arguments[0]}: {error.strerror}") from None


def filled(text: str, values: Mapping[str, Any]) -> str:
    """A text with what its actions stand for. INVALID_ARGUMENT for an action that isn't known, or has no end."""

    def value(found: re.Match[str]) -> str:
        action = found[2].strip()
        if _COMMENT.fullmatch(action):
            return ""
        if key := _ANNOTATION.fullmatch(action):
            return str(values["annotations"].get(_unquoted(key[1]), ""))
        if action not in values or action == "annotations":
            raise InvalidArgument(
                f"oci-hook: {{{{{action}}}}} is unknown",
                hint='there are id, pid, status, bundle, rootfs, and annotation "key"',
            )
        return str(values[action])

    left = _ACTION.sub("", text)
    if "{{" in left:
        raise InvalidArgument(f"oci-hook: {text!r}: an action has no end", hint="write it as {{pid}}")
    return _ACTION.sub(value, text)


def _unquoted(text: str) -> str:
    if text.startswith("`"):
        return text[1:-1]
    try:
        return str(json.loads(text))  # Go's strings have more escapes, which no annotation's name needs
    except ValueError:
        raise InvalidArgument(f"oci-hook: {text} is no string") from None


def _values(text: str) -> dict[str, Any]:
    state = _object(text, "the state on standard input")
    bundle = str(state.get("bundle", ""))
    path = Path(bundle, "config.json")
    try:
        root = str((_object(path.read_text(encoding="utf-8"), str(path)).get("root") or {}).get("path", ""))
    except OSError as error:
        raise NotFound(f"oci-hook: {path}: {error.strerror}") from None
    return {
        "id": state.get("id", ""), "pid": state.get("pid", 0), "status": state.get("status", ""), "bundle": bundle,
        "rootfs": os.path.normpath(os.path.join(bundle, root)),  # noqa: PTH118 (which an absolute one replaces)
        "annotations": state.get("annotations") or {},
    }  # fmt: skip


def _object(text: str, name: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InvalidArgument(f"oci-hook: {name} is no JSON object")
    return found
