"""`python -m shoal_bus.reference` prints docs/subjects.md: every subject, its request, reply, errors and events.

It is made from the API modules alone, so that it can't say anything else than the code does.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from shoal_bus import api, streams, subjects, wire
from shoal_bus.events import Topic
from shoal_bus.message import Message
from shoal_bus.verb import AnyVerb, OperationVerb, StreamVerb, Verb, verbs_of

_HEAD = f"""# Subjects

<!-- Made by `python -m shoal_bus.reference > docs/subjects.md`; a test compares them. -->

Every subject shoal answers or publishes, with what goes in and what comes out.

| what | subject |
| --- | --- |
| request | `{subjects.ROOT}.<node>.<namespace>.<service>.<resource>.<verb>` |
| durable command | `{subjects.ROOT}.<node>.<namespace>.{subjects.COMMAND}.<service>.<resource>.<verb>` |
| event | `{subjects.ROOT}.<node>.<namespace>.{subjects.EVENT}.<service>.<topic…>.<id>` |

A node name is `[a-z0-9-]{{1,63}}`; `{subjects.ALL_NODES}` as node addresses every node, each of which answers once.
`{subjects.WHOLE_NODE}` as namespace stands for verbs that concern the whole node, as id for an event without one. What
another token can't hold is percent-encoded: all but letters, digits, `-`, and `_` where it isn't the first character.

Payloads are msgpack maps; times are msgpack's timestamp extension. A request with a field that isn't listed is refused;
a reader of replies and events ignores what it doesn't know.

| header of a request | |
| --- | --- |
| `{wire.REQUEST_ID}` | printable ASCII; what changes something is done once under it, however often it comes |
| `{wire.TIMEOUT}` | milliseconds the caller still waits |
| `{wire.TRACEPARENT}` | W3C trace context |
| `{wire.LEASE}` | the lease, percent-encoded, that holds what this request makes |
| `{wire.EXPIRES}` | of a durable command: seconds from when its stream stored it, after which it is no longer begun |
| `{wire.SEEN}` | of an operation: the version of its progress that the caller has; `cancel` ends it |

| header of a reply | |
| --- | --- |
| `{wire.ERROR_CODE}`, `{wire.ERROR}`, `{wire.HINT}` | gRPC's code, one sentence, and the mend if there is one |
| `{wire.AGAIN}` | not finished: ask again with the same id; its value is the version of the progress in the payload |
| `{wire.PART}` | number of a part; its reply subject takes an empty acknowledgement, or `stop`; 0 is a sign of life |
| `{wire.END}` | the last part |

Any verb may answer INVALID_ARGUMENT, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNAVAILABLE and INTERNAL besides its own
errors. Events are kept in the JetStream stream `{streams.EVENTS}`; their `Nats-Msg-Id` is unique for each. Durable
commands wait in `{streams.COMMANDS}`: their payload is the request of their verb, which must be one that changes
something, and how one ended is an [event](#commands).
"""


def modules() -> Iterator[types.ModuleType]:
    """The API modules, by name."""
    for found in sorted(pkgutil.iter_modules(api.__path__), key=lambda m: m.name):
        yield importlib.import_module(f"{api.__name__}.{found.name}")


def reference() -> str:
    """The whole page."""
    return "\n".join([_HEAD, *(section for module in modules() for section in _module(module))])


def _module(module: types.ModuleType) -> Iterator[str]:
    verbs = list(verbs_of(module))
    topics = [value for value in vars(module).values() if isinstance(value, Topic)]
    if not verbs and not topics:
        return
    yield f"## {module.__name__.rpartition('.')[2]}\n"
    yield f"{(module.__doc__ or '').strip()}\n"
    for verb in verbs:
        yield from _verb(verb)
    if topics:
        yield "### Events\n"
        yield "| topic | subject | payload |\n| --- | --- | --- |"
        for topic in topics:
            subject = f"….{subjects.EVENT}.{topic.service}.{topic.name.strip('/').replace('/', '.')}"
            identity = f"<{topic.id_field}>" if topic.id_field else subjects.WHOLE_NODE
            yield f"| `{topic.name}` | `{subject}.{identity}` | {_fields_inline(topic.payload)} |"
        yield ""
    models: dict[str, type[BaseModel]] = {model.__name__: model for verb in verbs for model in _models_of(verb)}
    nested = {name: model for model in list(models.values()) for name, model in _nested(model).items()}
    shown = {name: model for name, model in sorted((nested | models).items()) if model.model_fields}
    if shown:
        yield "### Messages\n"
        for name, model in shown.items():
            yield from _model(name, model)


def _verb(verb: AnyVerb) -> Iterator[str]:
    namespace = subjects.WHOLE_NODE if verb.behaviour.whole_node else "<namespace>"
    yield f"### {verb.name}\n"
    yield f"{verb.behaviour.doc}\n"
    yield "| | |\n| --- | --- |"
    yield f"| subject | `{subjects.ROOT}.<node>.{namespace}.{verb.name}` |"
    yield f"| request | {_link(verb.request)} |"
    if isinstance(verb, StreamVerb):
        yield f"| reply | any number of {_link(verb.item)}, in parts |"
    elif isinstance(verb, OperationVerb):
        yield f"| reply | {_link(verb.reply)}; until then `{wire.AGAIN}` with {_link(verb.progress)} |"
    elif isinstance(verb, Verb):
        yield f"| reply | {_link(verb.reply)}{' (waits; asked again in polls)' if verb.waits else ''} |"
    once = isinstance(verb, OperationVerb) or (isinstance(verb, Verb) and verb.mutates)
    yield f"| changes something | {'yes, once by its id' if once else 'no'} |"
    if verb.behaviour.errors:
        yield f"| errors | {', '.join(verb.behaviour.errors)} |"
    yield ""


def _models_of(verb: AnyVerb) -> Iterator[type[Message]]:
    yield verb.request
    if isinstance(verb, StreamVerb):
        yield verb.item
    if isinstance(verb, Verb | OperationVerb):
        yield verb.reply
    if isinstance(verb, OperationVerb):
        yield verb.progress


def _nested(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    found: dict[str, type[BaseModel]] = {}
    waiting: list[Any] = [field.annotation for field in model.model_fields.values()]
    while waiting:
        kind = waiting.pop()
        if isinstance(kind, type) and issubclass(kind, BaseModel) and get_origin(kind) is None:
            if kind.__name__ not in found:
                found[kind.__name__] = kind
                waiting += [field.annotation for field in kind.model_fields.values()]
        else:
            waiting += get_args(kind)
    return found


def _model(name: str, model: type[BaseModel]) -> Iterator[str]:
    yield f"#### {name}\n"
    own = model.__doc__ if "__doc__" in vars(model) else ""
    if own:
        yield " ".join(own.split()) + "\n"
    yield "| field | type | default |\n| --- | --- | --- |"
    for field, info in model.model_fields.items():
        yield f"| `{field}` | {_type(info.annotation)}{_limits(info)} | {_default(info)} |"
    yield ""


def _link(model: type[Message]) -> str:
    if not model.model_fields:
        return "empty"
    return f"[{model.__name__}](#{model.__name__.lower()})"


def _fields_inline(model: type[BaseModel]) -> str:
    return ", ".join(f"`{field}` {_type(info.annotation)}" for field, info in model.model_fields.items()) or "empty"


def _type(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(argument) for argument in arguments if argument is not type(None))
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"map of {_type(arguments[1])}" if arguments[1] is not Any else "map"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"[{kind.__name__}](#{kind.__name__.lower()})"
    names = {"str": "text", "int": "integer", "float": "number", "bool": "boolean", "datetime": "time"}
    return names.get(getattr(kind, "__name__", ""), getattr(kind, "__name__", str(kind)))


def _limits(info: FieldInfo) -> str:
    words = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "length ≥", "max_length": "length ≤"}
    told = [f"{words[key]} {getattr(m, key)}" for m in info.metadata for key in words if hasattr(m, key)]
    return f" ({', '.join(told)})" if told else ""


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, BaseModel):
        return "its defaults"
    return "none" if value in (None, "", [], {}, b"") and value is not False and value != 0 else f"`{value}`"


if __name__ == "__main__":
    sys.stdout.write(reference())
