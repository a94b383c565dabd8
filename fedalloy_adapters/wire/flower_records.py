"""FedAlloy's messages inside Flower's records: one ``bytes`` value, and one packed array per adapter.

The shape is specified in ``proto/README.md``. There is one Flower ``Array`` per adapter, because Flower makes two calls
per array, whatever its size. Small adapters lie beside the message if the receiver can read that, which halves the
number of calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from google.protobuf.message import DecodeError, Message

from fedalloy_adapters.wire.wire_counts import TooManyError, require_few

PLAN_TYPE = "train.plan"
REGISTER_TYPE = "query.register"
COUNTERS_TYPE = "query.counters"

ARRAY_DTYPE = "uint8"
ARRAY_STYPE = "fedalloy.adapter.v1"
CONFIG_RECORD = "fedalloy"
ARRAY_RECORD = "adapters"
BESIDE = "adapter/"
"""Prefix of the slot's name, if an adapter is a value of the config record."""
MAX_BESIDE_BYTES = 4 * 2**20
"""Most bytes of a message's adapters that lie beside it: Flower cuts only arrays into pieces of 5 MiB."""
FORMAT_VERSION = 1
MAX_MESSAGE_BYTES = 16 * 2**20
"""Most bytes of a plan, report or registration, which hold no adapters; parsed, they take several times as much
memory."""
MAX_VALUES = {"plan": 1_000_000, "report": 50_000, "registration": 50_000, "counters": 5_000}
"""Most values in a message, nested ones included, by its kind. The largest is a plan with the weights of a thousand
peers for each of two hundred modules."""

M = TypeVar("M", bound=Message)


class RecordError(ValueError):
    """A Flower message does not contain what ``proto/README.md`` specifies."""

    @property
    def told(self) -> str:
        """What the sender of the message may read of this error."""
        return str(self)


def pack(key: str, message: Message, blobs: Mapping[str, bytes] | None = None, *, beside: bool = False) -> RecordDict:
    """Records with ``message`` under ``key``, and one array per blob.

    With ``beside`` small blobs are values of the same record; the receiver must have said that it reads them.
    """
    config = ConfigRecord({key: message.SerializeToString()})
    if blobs and beside and sum(map(len, blobs.values())) <= MAX_BESIDE_BYTES:
        for slot, blob in blobs.items():
            config[BESIDE + slot] = blob
        blobs = None
    records = RecordDict({CONFIG_RECORD: config})
    if blobs:
        arrays = {
            slot: Array(dtype=ARRAY_DTYPE, shape=(len(blob),), stype=ARRAY_STYPE, data=blob)
            for slot, blob in blobs.items()
        }
        records[ARRAY_RECORD] = ArrayRecord(arrays)
    return records


def unpack(records: RecordDict, key: str, kind: type[M]) -> tuple[M, dict[str, bytes]]:
    """The message under ``key`` and the blobs by slot name.

    Raises:
        RecordError: a record is missing or not of the specified form; the error names what was found.
    """
    config = records.config_records.get(CONFIG_RECORD)
    value = config.get(key) if config is not None else None
    if config is None or not isinstance(value, bytes):
        raise RecordError(
            f"expected bytes {key!r} in the config record {CONFIG_RECORD!r}, found {type(value).__name__}"
        )
    if len(value) > MAX_MESSAGE_BYTES:
        raise RecordError(f"{key!r} has {len(value)} bytes, expected at most {MAX_MESSAGE_BYTES}")
    message = kind()
    try:
        require_few(value, kind.DESCRIPTOR, MAX_VALUES.get(key, 1000))
        message.ParseFromString(value)
    except TooManyError as error:
        raise RecordError(f"{key!r} {error}") from None
    except DecodeError as error:
        raise RecordError(f"{key!r} is not a {kind.__name__} ({error})") from None
    version = getattr(message, "version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise RecordError(f"{kind.__name__} has version {version}, expected {FORMAT_VERSION}")
    return message, blobs_in(records)


def blobs_in(records: RecordDict) -> dict[str, bytes]:
    """The blobs by slot name.

    Raises:
        RecordError: an array is not of the specified form.
    """
    config = records.config_records.get(CONFIG_RECORD)
    blobs = _beside(config) if config is not None else {}
    for slot, array in records.array_records.get(ARRAY_RECORD, ArrayRecord()).items():
        if array.stype != ARRAY_STYPE:
            raise RecordError(f"array {slot!r} has stype {array.stype!r}, expected {ARRAY_STYPE!r}")
        if array.dtype != ARRAY_DTYPE or tuple(array.shape) != (len(array.data),):
            raise RecordError(
                f"array {slot!r} is {array.dtype} of shape {tuple(array.shape)}, expected {ARRAY_DTYPE} of shape "
                f"({len(array.data)},)"
            )
        if slot in blobs:
            raise RecordError(f"adapter {slot!r} occurs twice, as an array and as bytes")
        blobs[slot] = array.data
    return blobs


def bytes_in(records: RecordDict, key: str) -> bytes:
    """The bytes under a key of the config record; empty if there are none."""
    config = records.config_records.get(CONFIG_RECORD)
    value = config.get(key, b"") if config is not None else b""
    return value if isinstance(value, bytes) else b""


def _beside(config: ConfigRecord) -> dict[str, bytes]:
    """Adapters among the values of the config record, by slot."""
    found = {}
    for name, value in config.items():
        if not name.startswith(BESIDE):
            continue
        if not isinstance(value, bytes):
            raise RecordError(f"expected bytes {name!r}, found {type(value).__name__}")
        found[name.removeprefix(BESIDE)] = value
    if sum(map(len, found.values())) > MAX_BESIDE_BYTES:
        raise RecordError(f"adapters of more than {MAX_BESIDE_BYTES} bytes beside {CONFIG_RECORD!r}, expected arrays")
    return found
