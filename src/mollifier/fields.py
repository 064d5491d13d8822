"""Reading JSON that somebody else wrote: typed access to its members, every mistake collected under its path.

A body is decoded one level at a time with `msgspec.Raw`, so that what is only passed on (payloads, metadata) keeps its bytes:
`1e309`, integers of any size, spacing. A member that is absent or null reads as None.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from decimal import Decimal, InvalidOperation
from itertools import accumulate
from typing import Any, TypeVar

import msgspec

from mollifier.durations import DURATION_FORMS, MOMENT_FORMS, parse_duration, parse_moment
from mollifier.errors import FieldError, InvalidRequestError, MalformedBodyError

T = TypeVar("T")
Members = Mapping[str, msgspec.Raw]

ERRORS_MAX = 50
"""So many mistakes of one request are told; reading goes on without counting more."""

DEPTH_MAX = 512
"""Of arrays and objects within one another. Python's own parsers give up somewhere above it, where depends on its version."""

UNSTORABLE = "must not contain NUL characters or half of a surrogate pair"

HALF_A_PAIR = "holds half of a surrogate pair, which is no character"

TOO_DEEP = f"is nested deeper than {DEPTH_MAX} levels"

_object = msgspec.json.Decoder(dict[str, msgspec.Raw])
_array = msgspec.json.Decoder(list[msgspec.Raw])
_text = msgspec.json.Decoder(str)
_any = msgspec.json.Decoder(msgspec.Raw)
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
_KINDS = {
    ord("{"): "an object",
    ord("["): "an array",
    ord('"'): "a string",
    ord("n"): "null",
    **dict.fromkeys(b"tf", "a boolean"),
    **dict.fromkeys(b"-0123456789", "a number"),
}
# One escape of a JSON text at a time: a whole surrogate pair, else half of one (the group), else any other.
_ESCAPES = re.compile(rb"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|(\\u[dD][89a-fA-F]..)|\\.", re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = [(byte in b"[{") - (byte in b"]}") for byte in range(256)]
_BLOCK = 256
_NULS = re.compile(rb"\\(u0000)|\\.", re.DOTALL)


class Fields:
    """The members of one object. `path` is what stands before a member's name in errors, which all go to one list."""

    def __init__(self, members: Members, path: str = "", errors: list[FieldError] | None = None) -> None:
        self._members = members
        self._path = path
        self._errors: list[FieldError] = [] if errors is None else errors

    def blame(self, name: str, detail: str) -> None:
        """Note a mistake in the member `name`."""
        self.blame_path(self._path + name, detail)

    def blame_path(self, path: str, detail: str) -> None:
        """Note a mistake that has its place elsewhere, for example in a header."""
        if len(self._errors) < ERRORS_MAX:
            self._errors.append(FieldError(path, detail))

    def check(self) -> None:
        """Raise InvalidRequestError if anything was noted."""
        if self._errors:
            raise InvalidRequestError(*self._errors)

    def under(self, path: str) -> Fields:
        """Return the same members under another path: what they are called is sometimes known only once they are read."""
        return Fields(self._members, path, self._errors)

    def has(self, name: str) -> bool:
        """Return whether the member is there and not null."""
        return self._raw(name) is not None

    def required(self, name: str, read: Callable[[str], T]) -> T | None:
        """Return what `read` makes of the member, which has to be there."""
        if not self.has(name):
            self.blame(name, "is required")
            return None
        return read(name)

    def kind(self, name: str) -> str | None:
        """Return what JSON calls the member's value, with its article."""
        raw = self._raw(name)
        return None if raw is None else kind_of(raw)

    def json(self, name: str) -> bytes | None:
        """Return the member's JSON text, byte for byte; null is a value here."""
        raw = self._members.get(name)
        return None if raw is None else bytes(raw)

    def names(self) -> Iterator[str]:
        """Return the names of the members."""
        return iter(self._members)

    def value(self, name: str) -> Any:
        """Return any JSON as Python has it, of the kind that a database can hold as JSON."""
        text = self.json(name) or b"null"
        try:
            found = msgspec.json.decode(text)
        except msgspec.DecodeError as error:
            self.blame(name, f"cannot be stored: {error}")
            return None
        if any(escape[1] for escape in _NULS.finditer(text)):
            self.blame(name, UNSTORABLE)
        return found

    def text(self, name: str, longest: int, shortest: int = 1) -> str | None:
        """Return a string of so many characters, one that every store can hold."""
        raw = self._expect(name, "a string")
        return None if raw is None else self._checked_text(name, raw, longest, shortest)

    def any_text(self, name: str) -> str | None:
        """Return a string as it is: of any length, with whatever characters."""
        raw = self._expect(name, "a string")
        return None if raw is None else _text.decode(raw)

    def text_or_number(self, name: str, longest: int) -> str | None:
        """Return a string as `text` does; a number counts as the string it is written as."""
        raw = self._raw(name)
        if raw is None or kind_of(raw) != "a number":
            return self.text(name, longest)
        if len(raw) > longest:
            self.blame(name, f"must be at most {longest} characters")
        return raw.decode()

    def choice(self, name: str, options: Sequence[str]) -> str | None:
        """Return one of the given strings."""
        raw = self._expect(name, "a string")
        if raw is None:
            return None
        chosen = _text.decode(raw)
        if chosen in options:
            return chosen
        self.blame(name, f"must be one of {', '.join(options)}")
        return None

    def boolean(self, name: str) -> bool | None:
        """Return true or false, of which nothing else is taken for."""
        raw = self._expect(name, "a boolean")
        return None if raw is None else raw == b"true"

    def integer(self, name: str, low: int, high: int) -> int | None:
        """Return an integer within the range, however JSON writes it: `3000`, `3000.0` and `3e3` are the same."""
        raw = self._raw(name)
        if raw is None:
            return None
        number = _number(raw)
        if number is not None and low <= number <= high and number == number.to_integral_value():
            return int(number)
        got = "" if kind_of(raw) == "a number" else f", got {kind_of(raw)}"
        self.blame(name, f"expected an integer from {low} to {high}{got}")
        return None

    def duration(self, name: str, shortest: timedelta = timedelta(0), form: str = DURATION_FORMS) -> timedelta | None:
        """Return a duration that is not shorter than the given one."""
        raw = self._expect(name, "a string", form)
        duration = None if raw is None else self._parsed(name, raw, parse_duration)
        if duration is not None and duration < shortest:
            self.blame(name, f"must be at least {int(shortest.total_seconds())}s")
            return None
        return duration

    def seconds_or_duration(self, name: str) -> timedelta | None:
        """Return a duration, which may also be given as a number of seconds."""
        raw = self._raw(name)
        if raw is None or kind_of(raw) != "a number":
            return self.duration(name, form=f"a number of seconds or {DURATION_FORMS}")
        seconds = self.integer(name, 0, 3650 * 86_400)
        return None if seconds is None else timedelta(seconds=seconds)

    def delay(self, name: str) -> timedelta | datetime | None:
        """Return a duration or a moment; no delay at all (`0s`) is None."""
        raw = self._expect(name, "a string", f"{DURATION_FORMS}, or {MOMENT_FORMS}")
        delay = None if raw is None else self._parsed(name, raw, _duration_or_moment)
        return delay or None

    def object(self, name: str) -> Fields | None:
        """Return the members of an object."""
        raw = self._expect(name, "an object")
        return None if raw is None else Fields(_object.decode(raw), f"{self._path}{name}.", self._errors)

    def object_or_empty(self, name: str) -> Fields:
        """Return the members of an object; one that is absent has none."""
        return self.object(name) or Fields({}, f"{self._path}{name}.", self._errors)

    def objects(self, name: str, most: int, least: int = 0) -> list[Fields]:
        """Return the members of each object of an array."""
        found: list[Fields] = []
        for place, raw in self._array(name, most, least=least):
            if kind_of(raw) == "an object":
                found.append(Fields(_object.decode(raw), f"{self._path}{place}.", self._errors))
            else:
                self.blame(place, f"expected an object, got {kind_of(raw)}")
        return found

    def texts(self, name: str, longest: int, most: int, least: int = 0) -> tuple[str, ...]:
        """Return the different strings of an array, in order; a lone string stands for an array of one."""
        if self.kind(name) == "a string":
            text = self.text(name, longest)
            return () if text is None else (text,)
        found: dict[str, None] = {}
        for place, raw in self._array(name, None, "an array of strings or one string", least):
            if kind_of(raw) != "a string":
                self.blame(place, f"expected a string, got {kind_of(raw)}")
            elif (text := self._checked_text(place, raw, longest, 1)) is not None:
                found[text] = None
        if len(found) > most:
            self.blame(name, f"must be at most {most} different ones, are {len(found)}")
        return tuple(found)

    # --- inside ----------------------------------------------------------------------------------------------------

    def _raw(self, name: str) -> bytes | None:
        raw = self._members.get(name)
        if raw is None:
            return None
        text = bytes(raw)
        return None if text == b"null" else text

    def _expect(self, name: str, kind: str, form: str | None = None) -> bytes | None:
        raw = self._raw(name)
        if raw is None or kind_of(raw) == kind:
            return raw
        self.blame(name, f"expected {form or kind}, got {kind_of(raw)}")
        return None

    def _array(
        self, name: str, most: int | None, form: str | None = None, least: int = 0
    ) -> Iterator[tuple[str, bytes]]:
        raw = self._expect(name, "an array", form)
        items = _array.decode(raw) if raw is not None else []
        if most is not None and len(items) > most:
            self.blame(name, f"must hold at most {most}, holds {len(items)}")
            return
        if raw is not None and len(items) < least:
            self.blame(name, f"must hold at least {least}, holds {len(items)}")
        for index, item in enumerate(items):
            yield f"{name}[{index}]", bytes(item)

    def _checked_text(self, place: str, raw: bytes, longest: int, shortest: int) -> str | None:
        text = _text.decode(raw)
        detail = text_fault(text, longest, shortest)
        if detail is None:
            return text
        self.blame(place, detail)
        return None

    def _parsed(self, name: str, raw: bytes, parse: Callable[[str], T]) -> T | None:
        try:
            return parse(_text.decode(raw))
        except ValueError as error:
            self.blame(name, str(error))
            return None


def read_body(body: bytes, read: Callable[[Fields], T]) -> T:
    """Decode a body that has to be a JSON object and return what `read` makes of its members.

    Raises MalformedBodyError when it is not JSON, InvalidRequestError when it is no object or when `read` noted a mistake. A body
    with half of a surrogate pair in it is not JSON to any store here; where that half is in a member that `read` looks at as
    text, the error names the member.
    """
    if nests_too_deep(body):
        raise MalformedBodyError(TOO_DEEP)
    try:
        return _read(body, read)
    except msgspec.DecodeError as error:
        whole = _without_halves(body)
        if whole != body:
            with suppress(msgspec.DecodeError, RecursionError):
                _read(whole, read)
            raise MalformedBodyError(f"is not JSON: {HALF_A_PAIR}") from error
        raise MalformedBodyError(f"is not JSON: {str(error).removeprefix('JSON is malformed: ')}") from error
    except UnicodeDecodeError as error:
        raise MalformedBodyError(f"is not UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise MalformedBodyError(TOO_DEEP) from error


def json_fault(text: bytes) -> str | None:
    """Return why the text is not JSON, None when it is."""
    if nests_too_deep(text):
        return TOO_DEEP
    try:
        text.decode()
        _any.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return HALF_A_PAIR if _without_halves(text) != text else str(error).removeprefix("JSON is malformed: ")
    except RecursionError:
        return TOO_DEEP
    return None


def nests_too_deep(text: bytes) -> bool:
    """Tell whether a JSON text nests deeper than `DEPTH_MAX`; of one that is not JSON the answer may be either.

    Few texts have that many brackets at all. Of those that have, only the brackets outside of strings are looked at, and of these
    only the blocks in which the depth could be reached.
    """
    if text.count(b"[") + text.count(b"{") <= DEPTH_MAX:
        return False
    if b"\\" in text:
        text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    brackets = b"".join(text.split(b'"')[::2]).translate(None, _NOT_BRACKETS)
    depth = 0
    for start in range(0, len(brackets), _BLOCK):
        block = brackets[start : start + _BLOCK]
        opened = block.count(b"[") + block.count(b"{")
        if depth + opened > DEPTH_MAX and max(accumulate(map(_STEPS.__getitem__, block), initial=depth)) > DEPTH_MAX:
            return True
        depth += 2 * opened - len(block)
    return False


def text_fault(text: str, longest: int, shortest: int = 1) -> str | None:
    """Return what is wrong with a text of the caller's, None when nothing is."""
    if not shortest <= len(text) <= longest:
        return f"must be {shortest} to {longest} characters, is {len(text)}"
    return UNSTORABLE if _UNSTORABLE.search(text) else None


def kind_of(raw: bytes) -> str:
    """Return what JSON calls the value, with its article."""
    return _KINDS[raw[0]]


def _read(body: bytes, read: Callable[[Fields], T]) -> T:
    if not body.isascii():
        body.decode()
    if not body.strip():
        raise MalformedBodyError("is empty; send a JSON object")
    try:
        fields = Fields(_object.decode(body))
    except msgspec.ValidationError:
        # Nothing after the first character was looked at yet, and not being JSON is the graver mistake.
        kind = kind_of(bytes(_any.decode(body)))
        raise InvalidRequestError(FieldError("body", f"expected an object, got {kind}")) from None
    result = read(fields)
    fields.check()
    return result


def _number(raw: bytes) -> Decimal | None:
    """Return exactly the number that is written, however many digits it has; None for what is no number."""
    if kind_of(raw) != "a number":
        return None
    try:
        return Decimal(raw.decode())
    except InvalidOperation:
        # Its exponent is more than a decimal can hold; only zero could be written so and be an integer in any range.
        return None


def _without_halves(body: bytes) -> bytes:
    """Put NUL, which `text` refuses too, in the place of each half of a surrogate pair."""
    return _ESCAPES.sub(lambda found: b"\\u0000" if found[1] else found[0], body)


def _duration_or_moment(text: str) -> timedelta | datetime:
    for parse in (parse_duration, parse_moment):
        try:
            return parse(text)
        except ValueError:
            pass
    raise ValueError(f"expected {DURATION_FORMS}, or {MOMENT_FORMS}")
