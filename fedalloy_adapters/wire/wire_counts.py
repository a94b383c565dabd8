"""Counts the values in a protobuf message before it is parsed.

Parsed, a message takes up to a hundred times as much memory: sixteen megabytes can hold eight million empty strings.
Here its bytes are walked according to its description, without creating objects, and the walk ends at a bound.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import FieldDescriptor

_MESSAGE = FieldDescriptor.TYPE_MESSAGE
_FIXED = {
    FieldDescriptor.TYPE_DOUBLE: 8,
    FieldDescriptor.TYPE_FIXED64: 8,
    FieldDescriptor.TYPE_SFIXED64: 8,
    FieldDescriptor.TYPE_FLOAT: 4,
    FieldDescriptor.TYPE_FIXED32: 4,
    FieldDescriptor.TYPE_SFIXED32: 4,
}
_UNPACKED = (_MESSAGE, FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)
MAX_DEPTH = 64


class TooManyError(ValueError):
    """A message has more values than its receiver accepts."""


class _BeyondError(Exception):
    """The walk has reached its bound."""


def require_few(data: bytes, kind: Any, most: int) -> int:
    """The number of values in a serialised message, including nested ones and those of packed lists.

    Bytes that are not protobuf are left to the parser, and not counted.

    Raises:
        TooManyError: more than ``most``, or nested too deep.
    """
    try:
        return _count(memoryview(data), kind, most, MAX_DEPTH)
    except _BeyondError:
        raise TooManyError(f"has more than {most} values") from None


def _count(data: memoryview, kind: Any, most: int, depth: int) -> int:
    if depth < 0:
        raise TooManyError(f"is nested more than {MAX_DEPTH} deep")
    found, place, end = 0, 0, len(data)
    fields = kind.fields_by_number
    while place < end:
        tag, place = _varint(data, place)
        form = tag & 7
        found += 1
        if form == 0:
            _, place = _varint(data, place)
        elif form in (1, 5):
            place += 8 if form == 1 else 4
        elif form == 2:
            size, place = _varint(data, place)
            if place + size > end:
                return found
            field = fields.get(tag >> 3)
            if field is not None:
                found += _inside(data[place : place + size], field, most - found, depth)
            place += size
        else:
            return found
        if found > most:
            raise _BeyondError
    return found


def _inside(part: memoryview, field: FieldDescriptor, most: int, depth: int) -> int:
    """The number of values inside a length-delimited field: a message, or a packed list of numbers."""
    if field.type == _MESSAGE:
        return _count(part, field.message_type, most, depth - 1)
    if field.type in _UNPACKED:
        return 0
    return len(part) // _FIXED.get(field.type, 1)


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """A number and the position after it; a truncated one at the end of the data, or beyond 64 bits."""
    number = shift = 0
    while place < len(data) and shift < 64:
        byte = data[place]
        place += 1
        number |= (byte & 127) << shift
        if byte < 128:
            break
        shift += 7
    return number, place
