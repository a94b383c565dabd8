from proto.fedalloy.v1 import plan_pb2 as _plan_pb2
from proto.fedalloy.v1 import report_pb2 as _report_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GreetRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GreetResponse(_message.Message):
    __slots__ = ("pid", "code_digest", "retiring", "version")
    PID_FIELD_NUMBER: _ClassVar[int]
    CODE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    RETIRING_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    pid: int
    code_digest: bytes
    retiring: bool
    version: int
    def __init__(self, pid: _Optional[int] = ..., code_digest: _Optional[bytes] = ..., retiring: _Optional[bool] = ..., version: _Optional[int] = ...) -> None: ...

class RetireRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RetireResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RunRequest(_message.Message):
    __slots__ = ("job", "chunk")
    JOB_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    job: Job
    chunk: Chunk
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("node_config", "run_config", "run_id", "node_id", "idle_seconds", "register", "plan", "site")
    class NodeConfigEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Scalar
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Scalar, _Mapping]] = ...) -> None: ...
    class RunConfigEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Scalar
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Scalar, _Mapping]] = ...) -> None: ...
    NODE_CONFIG_FIELD_NUMBER: _ClassVar[int]
    RUN_CONFIG_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    IDLE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    REGISTER_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    node_config: _containers.MessageMap[str, Scalar]
    run_config: _containers.MessageMap[str, Scalar]
    run_id: int
    node_id: int
    idle_seconds: float
    register: RegisterJob
    plan: _plan_pb2.Plan
    site: SiteJob
    def __init__(self, node_config: _Optional[_Mapping[str, Scalar]] = ..., run_config: _Optional[_Mapping[str, Scalar]] = ..., run_id: _Optional[int] = ..., node_id: _Optional[int] = ..., idle_seconds: _Optional[float] = ..., register: _Optional[_Union[RegisterJob, _Mapping]] = ..., plan: _Optional[_Union[_plan_pb2.Plan, _Mapping]] = ..., site: _Optional[_Union[SiteJob, _Mapping]] = ...) -> None: ...

class RegisterJob(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SiteJob(_message.Message):
    __slots__ = ("version", "plan", "register", "signature")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    REGISTER_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    version: int
    plan: bytes
    register: bytes
    signature: bytes
    def __init__(self, version: _Optional[int] = ..., plan: _Optional[bytes] = ..., register: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Scalar(_message.Message):
    __slots__ = ("truth", "integer", "number", "text")
    TRUTH_FIELD_NUMBER: _ClassVar[int]
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    truth: bool
    integer: int
    number: float
    text: str
    def __init__(self, truth: _Optional[bool] = ..., integer: _Optional[int] = ..., number: _Optional[float] = ..., text: _Optional[str] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("slot", "data")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    slot: str
    data: bytes
    def __init__(self, slot: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class RunResponse(_message.Message):
    __slots__ = ("progress", "chunk", "registration", "report", "failure")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    REGISTRATION_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    progress: Progress
    chunk: Chunk
    registration: _report_pb2.Registration
    report: _report_pb2.Report
    failure: Failure
    def __init__(self, progress: _Optional[_Union[Progress, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., registration: _Optional[_Union[_report_pb2.Registration, _Mapping]] = ..., report: _Optional[_Union[_report_pb2.Report, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("activity", "done", "total")
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    activity: str
    done: int
    total: int
    def __init__(self, activity: _Optional[str] = ..., done: _Optional[int] = ..., total: _Optional[int] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("error", "message", "words")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    WORDS_FIELD_NUMBER: _ClassVar[int]
    error: str
    message: str
    words: str
    def __init__(self, error: _Optional[str] = ..., message: _Optional[str] = ..., words: _Optional[str] = ...) -> None: ...
