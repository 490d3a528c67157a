"""Containerd's filter language, as `ctr … ls` and every List request speak it (containerd, pkg/filters).

    filter    = selector *("," selector)           all of them match
    selector  = fieldpath [operator value]          without an operator: the field is there
    fieldpath = field *("." field)                  a field may be quoted: labels."io.kubernetes.pod"
    operator  = "==" | "!=" | "~="                  equal, not equal, matches a regular expression
    value     = word | quoted                       quoted by ", or (a regular expression) by | or /

An item is listed when any filter of a list matches it; an empty list matches everything. Regular expressions are RE2's,
as Go's are: matching one takes time in proportion to the text, whatever the expression.

    matches = compile_filters(request.filters)
    [image for image in images if matches(lambda path: field_of(image, path))]
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from shoal_bus.errors import InvalidArgument

Field = Callable[[Sequence[str]], str | None]
"""What an item has at a field path (`["labels", "app"]`): its text, or None where it has no such field."""
Match = Callable[[Field], bool]

MAX_FILTERS = 256
MAX_LENGTH = 4096
MAX_TOTAL = 32 * 1024
"""Characters of all filters of one request: they are read, and matched, on the event loop."""
MAX_PATTERNS = 64
"""Regular expressions in one request."""
_PATTERN_MEMORY = 1 << 20
"""Bytes that a compiled expression may take; a larger one is refused."""
_FIELD = re.compile(r"[A-Za-z0-9_\-/]+")
_VALUE = re.compile(r"[^\s,\"|]+")
_OPERATOR = re.compile(r"==|!=|~=")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}
_HEX_LENGTHS = {"x": 2, "u": 4, "U": 8}


class _Pattern(Protocol):
    def search(self, text: str) -> object | None: ...


@dataclass(frozen=True)
class _Selector:
    path: tuple[str, ...]
    operator: str
    value: str
    pattern: _Pattern | None = None

    def matches(self, field: Field) -> bool:
        found = field(self.path)
        match self.operator:
            case "":
                return found is not None
            case "==":
                return found is not None and found == self.value
            case "!=":
                return found is None or found != self.value
            case _:
                return found is not None and self.pattern is not None and self.pattern.search(found) is not None


def compile_filters(filters: Sequence[str]) -> Match:
    """A predicate for `filters`; INVALID_ARGUMENT names the place where one of them can't be read."""
    if len(filters) > MAX_FILTERS:
        raise InvalidArgument(f"{len(filters)} filters: at most {MAX_FILTERS} are allowed")
    if (total := sum(map(len, filters))) > MAX_TOTAL:
        raise InvalidArgument(f"filters of {total} characters: at most {MAX_TOTAL} are allowed")
    alternatives = [_Parser(text).parse() for text in filters]
    if sum(one.operator == "~=" for selectors in alternatives for one in selectors) > MAX_PATTERNS:
        raise InvalidArgument(f"more than {MAX_PATTERNS} regular expressions in the filters of one request")
    if not alternatives or not all(alternatives):
        return lambda _: True
    return lambda field: any(all(one.matches(field) for one in selectors) for selectors in alternatives)


def label_field(labels: Mapping[str, str], path: Sequence[str]) -> str | None:
    """The field `labels.<key>` of anything that has labels; unquoted dots in the key are part of it."""
    return labels.get(".".join(path[1:])) if len(path) > 1 and path[0] == "labels" else None


class _Parser:
    def __init__(self, text: str) -> None:
        if len(text) > MAX_LENGTH:
            raise InvalidArgument(f"filter {text[:40]!r}…: {len(text)} characters, at most {MAX_LENGTH} are allowed")
        self._text, self._at = text, 0

    def parse(self) -> list[_Selector]:
        """The selectors of one filter; none for an empty one, which matches everything."""
        self._blanks()
        selectors = []
        while self._at < len(self._text):
            selectors.append(self._selector())
            self._blanks()
            if self._at == len(self._text):
                break
            self._expect(",")
            self._blanks()
            if self._at == len(self._text):
                raise self._error("a selector must follow the comma")
        return selectors

    def _selector(self) -> _Selector:
        path = [self._field()]
        while self._peek() == ".":
            self._at += 1
            path.append(self._field())
        self._blanks()
        operator = _OPERATOR.match(self._text, self._at)
        if operator is None:
            return _Selector(tuple(path), "", "")
        self._at = operator.end()
        self._blanks()
        value = self._value(regex=operator.group() == "~=")
        if operator.group() != "~=":
            return _Selector(tuple(path), operator.group(), value)
        return _Selector(tuple(path), "~=", value, self._pattern(value))

    def _pattern(self, value: str) -> _Pattern:
        import re2  # few requests have one, and few processes need the library

        options = re2.Options()
        options.max_mem, options.log_errors = _PATTERN_MEMORY, False
        try:
            return re2.compile(value, options)  # type: ignore[no-any-return]
        except (re2.error, UnicodeEncodeError) as error:
            reason = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else error
            raise self._error(f"{value!r} is no regular expression ({reason})") from None

    def _field(self) -> str:
        if self._peek() == '"':
            return self._quoted('"')
        found = _FIELD.match(self._text, self._at)
        if found is None:
            raise self._error("a field name was expected")
        self._at = found.end()
        return found.group()

    def _value(self, *, regex: bool) -> str:
        quote = self._peek()
        if quote == '"' or (regex and quote in ("|", "/")):
            return self._quoted(quote)
        found = _VALUE.match(self._text, self._at)
        if found is None or not found.group():
            raise self._error("a value was expected")
        self._at = found.end()
        return found.group()

    def _quoted(self, quote: str) -> str:
        self._at += 1
        out = []
        while (char := self._peek()) != quote:
            if not char:
                raise self._error(f"the closing {quote} is missing")
            self._at += 1
            # Between | or / a backslash is the regular expression's, except before the quote itself.
            out.append(self._escape(quote) if char == "\\" else char)
        self._at += 1
        return "".join(out)

    def _escape(self, quote: str) -> str:
        char = self._peek()
        if not char:
            raise self._error("nothing follows the backslash")
        self._at += 1
        if quote != '"':
            return char if char == quote else f"\\{char}"
        if char in _HEX_LENGTHS:
            digits = self._text[self._at : self._at + _HEX_LENGTHS[char]]
            self._at += len(digits)
            try:
                return chr(int(digits, 16))
            except (ValueError, OverflowError):
                raise self._error(f"\\{char}{digits} is no character") from None
        if char in _ESCAPES:
            return _ESCAPES[char]
        if char in ('"', "\\", "'"):
            return char
        raise self._error(f"\\{char} is no escape sequence")

    def _blanks(self) -> None:
        while self._peek() in (" ", "\t", "\n", "\r") and self._peek():
            self._at += 1

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _expect(self, char: str) -> None:
        if self._peek() != char:
            raise self._error(f"{char!r} was expected")
        self._at += 1

    def _error(self, problem: str) -> InvalidArgument:
        return InvalidArgument(
            f"filter {self._text!r}: {problem}, at character {self._at + 1}", hint="as name==value,labels.key~=regex"
        )
