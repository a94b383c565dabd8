from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Encoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENCODING_UNSPECIFIED: _ClassVar[Encoding]
    ENCODING_FP32: _ClassVar[Encoding]
    ENCODING_FP16: _ClassVar[Encoding]
    ENCODING_BF16: _ClassVar[Encoding]
    ENCODING_INT8: _ClassVar[Encoding]
    ENCODING_INT4: _ClassVar[Encoding]
    ENCODING_INT2: _ClassVar[Encoding]

class Factor(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FACTOR_UNSPECIFIED: _ClassVar[Factor]
    FACTOR_A: _ClassVar[Factor]
    FACTOR_B: _ClassVar[Factor]
    FACTOR_WEIGHT: _ClassVar[Factor]
    FACTOR_BIAS: _ClassVar[Factor]
    FACTOR_P: _ClassVar[Factor]
    FACTOR_Q: _ClassVar[Factor]
    FACTOR_GATE: _ClassVar[Factor]
    FACTOR_GRADIENT: _ClassVar[Factor]
    FACTOR_GRAM: _ClassVar[Factor]
ENCODING_UNSPECIFIED: Encoding
ENCODING_FP32: Encoding
ENCODING_FP16: Encoding
ENCODING_BF16: Encoding
ENCODING_INT8: Encoding
ENCODING_INT4: Encoding
ENCODING_INT2: Encoding
FACTOR_UNSPECIFIED: Factor
FACTOR_A: Factor
FACTOR_B: Factor
FACTOR_WEIGHT: Factor
FACTOR_BIAS: Factor
FACTOR_P: Factor
FACTOR_Q: Factor
FACTOR_GATE: Factor
FACTOR_GRADIENT: Factor
FACTOR_GRAM: Factor

class TensorEntry(_message.Message):
    __slots__ = ("module", "factor", "shape")
    MODULE_FIELD_NUMBER: _ClassVar[int]
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    module: str
    factor: Factor
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, module: _Optional[str] = ..., factor: _Optional[_Union[Factor, str]] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class ModuleScaling(_message.Message):
    __slots__ = ("module", "scaling")
    MODULE_FIELD_NUMBER: _ClassVar[int]
    SCALING_FIELD_NUMBER: _ClassVar[int]
    module: str
    scaling: float
    def __init__(self, module: _Optional[str] = ..., scaling: _Optional[float] = ...) -> None: ...

class SharedName(_message.Message):
    __slots__ = ("module", "name")
    MODULE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    module: str
    name: str
    def __init__(self, module: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class Layout(_message.Message):
    __slots__ = ("base_fingerprint", "entries", "scalings", "shared_names")
    BASE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    SCALINGS_FIELD_NUMBER: _ClassVar[int]
    SHARED_NAMES_FIELD_NUMBER: _ClassVar[int]
    base_fingerprint: str
    entries: _containers.RepeatedCompositeFieldContainer[TensorEntry]
    scalings: _containers.RepeatedCompositeFieldContainer[ModuleScaling]
    shared_names: _containers.RepeatedCompositeFieldContainer[SharedName]
    def __init__(self, base_fingerprint: _Optional[str] = ..., entries: _Optional[_Iterable[_Union[TensorEntry, _Mapping]]] = ..., scalings: _Optional[_Iterable[_Union[ModuleScaling, _Mapping]]] = ..., shared_names: _Optional[_Iterable[_Union[SharedName, _Mapping]]] = ...) -> None: ...

class AdapterHeader(_message.Message):
    __slots__ = ("version", "nonce", "encoding", "layout_digest", "layout", "content_digest", "reference_digest", "payload_bytes")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    CONTENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    version: int
    nonce: bytes
    encoding: Encoding
    layout_digest: bytes
    layout: Layout
    content_digest: bytes
    reference_digest: bytes
    payload_bytes: int
    def __init__(self, version: _Optional[int] = ..., nonce: _Optional[bytes] = ..., encoding: _Optional[_Union[Encoding, str]] = ..., layout_digest: _Optional[bytes] = ..., layout: _Optional[_Union[Layout, _Mapping]] = ..., content_digest: _Optional[bytes] = ..., reference_digest: _Optional[bytes] = ..., payload_bytes: _Optional[int] = ...) -> None: ...
