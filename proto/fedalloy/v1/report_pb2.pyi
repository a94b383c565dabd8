from proto.fedalloy.v1 import adapter_pb2 as _adapter_pb2
from proto.fedalloy.v1 import plan_pb2 as _plan_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TrainerMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRAINER_MODE_UNSPECIFIED: _ClassVar[TrainerMode]
    TRAINER_MODE_BUNDLED: _ClassVar[TrainerMode]
    TRAINER_MODE_INSTALLED: _ClassVar[TrainerMode]
TRAINER_MODE_UNSPECIFIED: TrainerMode
TRAINER_MODE_BUNDLED: TrainerMode
TRAINER_MODE_INSTALLED: TrainerMode

class ConnectionReading(_message.Message):
    __slots__ = ("local_address", "local_port", "remote_address", "remote_port", "cookie", "bytes_sent", "bytes_acked", "bytes_received", "bytes_retransmitted", "segments_out", "segments_in", "header_bytes")
    LOCAL_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LOCAL_PORT_FIELD_NUMBER: _ClassVar[int]
    REMOTE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    REMOTE_PORT_FIELD_NUMBER: _ClassVar[int]
    COOKIE_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    BYTES_ACKED_FIELD_NUMBER: _ClassVar[int]
    BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    BYTES_RETRANSMITTED_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_OUT_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_IN_FIELD_NUMBER: _ClassVar[int]
    HEADER_BYTES_FIELD_NUMBER: _ClassVar[int]
    local_address: str
    local_port: int
    remote_address: str
    remote_port: int
    cookie: int
    bytes_sent: int
    bytes_acked: int
    bytes_received: int
    bytes_retransmitted: int
    segments_out: int
    segments_in: int
    header_bytes: int
    def __init__(self, local_address: _Optional[str] = ..., local_port: _Optional[int] = ..., remote_address: _Optional[str] = ..., remote_port: _Optional[int] = ..., cookie: _Optional[int] = ..., bytes_sent: _Optional[int] = ..., bytes_acked: _Optional[int] = ..., bytes_received: _Optional[int] = ..., bytes_retransmitted: _Optional[int] = ..., segments_out: _Optional[int] = ..., segments_in: _Optional[int] = ..., header_bytes: _Optional[int] = ...) -> None: ...

class WireReading(_message.Message):
    __slots__ = ("unix_time", "connections", "not_measured")
    UNIX_TIME_FIELD_NUMBER: _ClassVar[int]
    CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    NOT_MEASURED_FIELD_NUMBER: _ClassVar[int]
    unix_time: float
    connections: _containers.RepeatedCompositeFieldContainer[ConnectionReading]
    not_measured: str
    def __init__(self, unix_time: _Optional[float] = ..., connections: _Optional[_Iterable[_Union[ConnectionReading, _Mapping]]] = ..., not_measured: _Optional[str] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("name", "kind", "examples", "notes", "groups", "modalities")
    class ExamplesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    MODALITIES_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: str
    examples: _containers.ScalarMap[str, int]
    notes: _containers.RepeatedScalarFieldContainer[str]
    groups: _containers.RepeatedScalarFieldContainer[str]
    modalities: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[str] = ..., examples: _Optional[_Mapping[str, int]] = ..., notes: _Optional[_Iterable[str]] = ..., groups: _Optional[_Iterable[str]] = ..., modalities: _Optional[_Iterable[str]] = ...) -> None: ...

class RecordPrivacy(_message.Message):
    __slots__ = ("epsilon", "delta", "budget", "noise_multiplier", "covers")
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    NOISE_MULTIPLIER_FIELD_NUMBER: _ClassVar[int]
    COVERS_FIELD_NUMBER: _ClassVar[int]
    epsilon: float
    delta: float
    budget: float
    noise_multiplier: float
    covers: str
    def __init__(self, epsilon: _Optional[float] = ..., delta: _Optional[float] = ..., budget: _Optional[float] = ..., noise_multiplier: _Optional[float] = ..., covers: _Optional[str] = ...) -> None: ...

class Registration(_message.Message):
    __slots__ = ("version", "client_id", "base_model", "layout", "tasks", "device", "wire", "reference", "reads_beside", "trainer", "privacy", "lends_adapter")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    WIRE_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    READS_BESIDE_FIELD_NUMBER: _ClassVar[int]
    TRAINER_FIELD_NUMBER: _ClassVar[int]
    PRIVACY_FIELD_NUMBER: _ClassVar[int]
    LENDS_ADAPTER_FIELD_NUMBER: _ClassVar[int]
    version: int
    client_id: str
    base_model: str
    layout: _adapter_pb2.Layout
    tasks: _containers.RepeatedCompositeFieldContainer[Task]
    device: str
    wire: WireReading
    reference: _adapter_pb2.Layout
    reads_beside: bool
    trainer: TrainerMode
    privacy: RecordPrivacy
    lends_adapter: bool
    def __init__(self, version: _Optional[int] = ..., client_id: _Optional[str] = ..., base_model: _Optional[str] = ..., layout: _Optional[_Union[_adapter_pb2.Layout, _Mapping]] = ..., tasks: _Optional[_Iterable[_Union[Task, _Mapping]]] = ..., device: _Optional[str] = ..., wire: _Optional[_Union[WireReading, _Mapping]] = ..., reference: _Optional[_Union[_adapter_pb2.Layout, _Mapping]] = ..., reads_beside: _Optional[bool] = ..., trainer: _Optional[_Union[TrainerMode, str]] = ..., privacy: _Optional[_Union[RecordPrivacy, _Mapping]] = ..., lends_adapter: _Optional[bool] = ...) -> None: ...

class InitialiseResult(_message.Message):
    __slots__ = ("created",)
    CREATED_FIELD_NUMBER: _ClassVar[int]
    created: bool
    def __init__(self, created: _Optional[bool] = ...) -> None: ...

class TaskLoss(_message.Message):
    __slots__ = ("examples", "mean", "batch_share")
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    BATCH_SHARE_FIELD_NUMBER: _ClassVar[int]
    examples: int
    mean: float
    batch_share: float
    def __init__(self, examples: _Optional[int] = ..., mean: _Optional[float] = ..., batch_share: _Optional[float] = ...) -> None: ...

class TrainResult(_message.Message):
    __slots__ = ("steps", "examples", "first_loss", "mean_loss", "last_loss", "seconds", "task_losses", "diverged", "withheld")
    class TaskLossesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: TaskLoss
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[TaskLoss, _Mapping]] = ...) -> None: ...
    STEPS_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    FIRST_LOSS_FIELD_NUMBER: _ClassVar[int]
    MEAN_LOSS_FIELD_NUMBER: _ClassVar[int]
    LAST_LOSS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    TASK_LOSSES_FIELD_NUMBER: _ClassVar[int]
    DIVERGED_FIELD_NUMBER: _ClassVar[int]
    WITHHELD_FIELD_NUMBER: _ClassVar[int]
    steps: int
    examples: int
    first_loss: float
    mean_loss: float
    last_loss: float
    seconds: float
    task_losses: _containers.MessageMap[str, TaskLoss]
    diverged: bool
    withheld: bool
    def __init__(self, steps: _Optional[int] = ..., examples: _Optional[int] = ..., first_loss: _Optional[float] = ..., mean_loss: _Optional[float] = ..., last_loss: _Optional[float] = ..., seconds: _Optional[float] = ..., task_losses: _Optional[_Mapping[str, TaskLoss]] = ..., diverged: _Optional[bool] = ..., withheld: _Optional[bool] = ...) -> None: ...

class TaskReplacement(_message.Message):
    __slots__ = ("task", "replaced", "source_loss", "target_loss")
    TASK_FIELD_NUMBER: _ClassVar[int]
    REPLACED_FIELD_NUMBER: _ClassVar[int]
    SOURCE_LOSS_FIELD_NUMBER: _ClassVar[int]
    TARGET_LOSS_FIELD_NUMBER: _ClassVar[int]
    task: str
    replaced: bool
    source_loss: float
    target_loss: float
    def __init__(self, task: _Optional[str] = ..., replaced: _Optional[bool] = ..., source_loss: _Optional[float] = ..., target_loss: _Optional[float] = ...) -> None: ...

class ReplaceResult(_message.Message):
    __slots__ = ("tasks", "numbers")
    TASKS_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    tasks: _containers.RepeatedCompositeFieldContainer[TaskReplacement]
    numbers: int
    def __init__(self, tasks: _Optional[_Iterable[_Union[TaskReplacement, _Mapping]]] = ..., numbers: _Optional[int] = ...) -> None: ...

class DistillResult(_message.Message):
    __slots__ = ("train", "divergences")
    class DivergencesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    TRAIN_FIELD_NUMBER: _ClassVar[int]
    DIVERGENCES_FIELD_NUMBER: _ClassVar[int]
    train: TrainResult
    divergences: _containers.ScalarMap[str, float]
    def __init__(self, train: _Optional[_Union[TrainResult, _Mapping]] = ..., divergences: _Optional[_Mapping[str, float]] = ...) -> None: ...

class MergeResult(_message.Message):
    __slots__ = ("max_rank",)
    MAX_RANK_FIELD_NUMBER: _ClassVar[int]
    max_rank: int
    def __init__(self, max_rank: _Optional[int] = ...) -> None: ...

class EvaluateResult(_message.Message):
    __slots__ = ("label", "split", "examples", "metrics", "seconds", "withheld")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    LABEL_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    WITHHELD_FIELD_NUMBER: _ClassVar[int]
    label: str
    split: str
    examples: int
    metrics: _containers.ScalarMap[str, float]
    seconds: float
    withheld: bool
    def __init__(self, label: _Optional[str] = ..., split: _Optional[str] = ..., examples: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., seconds: _Optional[float] = ..., withheld: _Optional[bool] = ...) -> None: ...

class SaveResult(_message.Message):
    __slots__ = ("content_digest", "in_parts")
    CONTENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    IN_PARTS_FIELD_NUMBER: _ClassVar[int]
    content_digest: bytes
    in_parts: bool
    def __init__(self, content_digest: _Optional[bytes] = ..., in_parts: _Optional[bool] = ...) -> None: ...

class SendResult(_message.Message):
    __slots__ = ("slot", "content_digest", "residual_norm")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    CONTENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    RESIDUAL_NORM_FIELD_NUMBER: _ClassVar[int]
    slot: str
    content_digest: bytes
    residual_norm: float
    def __init__(self, slot: _Optional[str] = ..., content_digest: _Optional[bytes] = ..., residual_norm: _Optional[float] = ...) -> None: ...

class DampedFisher(_message.Message):
    __slots__ = ("relative_damping", "damping", "variance_first", "variance_second", "covariance")
    RELATIVE_DAMPING_FIELD_NUMBER: _ClassVar[int]
    DAMPING_FIELD_NUMBER: _ClassVar[int]
    VARIANCE_FIRST_FIELD_NUMBER: _ClassVar[int]
    VARIANCE_SECOND_FIELD_NUMBER: _ClassVar[int]
    COVARIANCE_FIELD_NUMBER: _ClassVar[int]
    relative_damping: float
    damping: float
    variance_first: _containers.RepeatedScalarFieldContainer[float]
    variance_second: _containers.RepeatedScalarFieldContainer[float]
    covariance: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, relative_damping: _Optional[float] = ..., damping: _Optional[float] = ..., variance_first: _Optional[_Iterable[float]] = ..., variance_second: _Optional[_Iterable[float]] = ..., covariance: _Optional[_Iterable[float]] = ...) -> None: ...

class FisherResult(_message.Message):
    __slots__ = ("samples", "dropped", "damping", "information_first", "information_second", "variance_first", "variance_second", "covariance", "information_distance", "effective_dimension", "more")
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    DAMPING_FIELD_NUMBER: _ClassVar[int]
    INFORMATION_FIRST_FIELD_NUMBER: _ClassVar[int]
    INFORMATION_SECOND_FIELD_NUMBER: _ClassVar[int]
    VARIANCE_FIRST_FIELD_NUMBER: _ClassVar[int]
    VARIANCE_SECOND_FIELD_NUMBER: _ClassVar[int]
    COVARIANCE_FIELD_NUMBER: _ClassVar[int]
    INFORMATION_DISTANCE_FIELD_NUMBER: _ClassVar[int]
    EFFECTIVE_DIMENSION_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    samples: int
    dropped: int
    damping: float
    information_first: _containers.RepeatedScalarFieldContainer[float]
    information_second: _containers.RepeatedScalarFieldContainer[float]
    variance_first: _containers.RepeatedScalarFieldContainer[float]
    variance_second: _containers.RepeatedScalarFieldContainer[float]
    covariance: _containers.RepeatedScalarFieldContainer[float]
    information_distance: _containers.RepeatedScalarFieldContainer[float]
    effective_dimension: _containers.RepeatedScalarFieldContainer[float]
    more: _containers.RepeatedCompositeFieldContainer[DampedFisher]
    def __init__(self, samples: _Optional[int] = ..., dropped: _Optional[int] = ..., damping: _Optional[float] = ..., information_first: _Optional[_Iterable[float]] = ..., information_second: _Optional[_Iterable[float]] = ..., variance_first: _Optional[_Iterable[float]] = ..., variance_second: _Optional[_Iterable[float]] = ..., covariance: _Optional[_Iterable[float]] = ..., information_distance: _Optional[_Iterable[float]] = ..., effective_dimension: _Optional[_Iterable[float]] = ..., more: _Optional[_Iterable[_Union[DampedFisher, _Mapping]]] = ...) -> None: ...

class DistanceResult(_message.Message):
    __slots__ = ("squared",)
    SQUARED_FIELD_NUMBER: _ClassVar[int]
    squared: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, squared: _Optional[_Iterable[float]] = ...) -> None: ...

class SketchResult(_message.Message):
    __slots__ = ("slot", "examples", "norm", "seconds")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    NORM_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    slot: str
    examples: int
    norm: float
    seconds: float
    def __init__(self, slot: _Optional[str] = ..., examples: _Optional[int] = ..., norm: _Optional[float] = ..., seconds: _Optional[float] = ...) -> None: ...

class SelectResult(_message.Message):
    __slots__ = ("losses", "weights", "target_loss")
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    TARGET_LOSS_FIELD_NUMBER: _ClassVar[int]
    losses: _containers.RepeatedScalarFieldContainer[float]
    weights: _containers.RepeatedScalarFieldContainer[float]
    target_loss: float
    def __init__(self, losses: _Optional[_Iterable[float]] = ..., weights: _Optional[_Iterable[float]] = ..., target_loss: _Optional[float] = ...) -> None: ...

class SearchResult(_message.Message):
    __slots__ = ("coefficients", "loss", "base_loss", "slot_losses", "evaluations", "examples")
    COEFFICIENTS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    BASE_LOSS_FIELD_NUMBER: _ClassVar[int]
    SLOT_LOSSES_FIELD_NUMBER: _ClassVar[int]
    EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    coefficients: _containers.RepeatedScalarFieldContainer[float]
    loss: float
    base_loss: float
    slot_losses: _containers.RepeatedScalarFieldContainer[float]
    evaluations: int
    examples: int
    def __init__(self, coefficients: _Optional[_Iterable[float]] = ..., loss: _Optional[float] = ..., base_loss: _Optional[float] = ..., slot_losses: _Optional[_Iterable[float]] = ..., evaluations: _Optional[int] = ..., examples: _Optional[int] = ...) -> None: ...

class GramResult(_message.Message):
    __slots__ = ("slot", "examples")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    slot: str
    examples: int
    def __init__(self, slot: _Optional[str] = ..., examples: _Optional[int] = ...) -> None: ...

class AttributeResult(_message.Message):
    __slots__ = ("examples",)
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    examples: int
    def __init__(self, examples: _Optional[int] = ...) -> None: ...

class DensityResult(_message.Message):
    __slots__ = ("examples", "log_density", "shares", "gaussians")
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    LOG_DENSITY_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    GAUSSIANS_FIELD_NUMBER: _ClassVar[int]
    examples: int
    log_density: float
    shares: _containers.RepeatedScalarFieldContainer[float]
    gaussians: _containers.RepeatedCompositeFieldContainer[_plan_pb2.Gaussian]
    def __init__(self, examples: _Optional[int] = ..., log_density: _Optional[float] = ..., shares: _Optional[_Iterable[float]] = ..., gaussians: _Optional[_Iterable[_Union[_plan_pb2.Gaussian, _Mapping]]] = ...) -> None: ...

class LikenessResult(_message.Message):
    __slots__ = ("examples",)
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    examples: int
    def __init__(self, examples: _Optional[int] = ...) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("initialise", "train", "merge", "evaluate", "save", "send", "fisher", "distance", "sketch", "select", "gram", "attribute", "search", "density", "likeness", "replace", "distill", "seconds")
    INITIALISE_FIELD_NUMBER: _ClassVar[int]
    TRAIN_FIELD_NUMBER: _ClassVar[int]
    MERGE_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    SAVE_FIELD_NUMBER: _ClassVar[int]
    SEND_FIELD_NUMBER: _ClassVar[int]
    FISHER_FIELD_NUMBER: _ClassVar[int]
    DISTANCE_FIELD_NUMBER: _ClassVar[int]
    SKETCH_FIELD_NUMBER: _ClassVar[int]
    SELECT_FIELD_NUMBER: _ClassVar[int]
    GRAM_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTE_FIELD_NUMBER: _ClassVar[int]
    SEARCH_FIELD_NUMBER: _ClassVar[int]
    DENSITY_FIELD_NUMBER: _ClassVar[int]
    LIKENESS_FIELD_NUMBER: _ClassVar[int]
    REPLACE_FIELD_NUMBER: _ClassVar[int]
    DISTILL_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    initialise: InitialiseResult
    train: TrainResult
    merge: MergeResult
    evaluate: EvaluateResult
    save: SaveResult
    send: SendResult
    fisher: FisherResult
    distance: DistanceResult
    sketch: SketchResult
    select: SelectResult
    gram: GramResult
    attribute: AttributeResult
    search: SearchResult
    density: DensityResult
    likeness: LikenessResult
    replace: ReplaceResult
    distill: DistillResult
    seconds: float
    def __init__(self, initialise: _Optional[_Union[InitialiseResult, _Mapping]] = ..., train: _Optional[_Union[TrainResult, _Mapping]] = ..., merge: _Optional[_Union[MergeResult, _Mapping]] = ..., evaluate: _Optional[_Union[EvaluateResult, _Mapping]] = ..., save: _Optional[_Union[SaveResult, _Mapping]] = ..., send: _Optional[_Union[SendResult, _Mapping]] = ..., fisher: _Optional[_Union[FisherResult, _Mapping]] = ..., distance: _Optional[_Union[DistanceResult, _Mapping]] = ..., sketch: _Optional[_Union[SketchResult, _Mapping]] = ..., select: _Optional[_Union[SelectResult, _Mapping]] = ..., gram: _Optional[_Union[GramResult, _Mapping]] = ..., attribute: _Optional[_Union[AttributeResult, _Mapping]] = ..., search: _Optional[_Union[SearchResult, _Mapping]] = ..., density: _Optional[_Union[DensityResult, _Mapping]] = ..., likeness: _Optional[_Union[LikenessResult, _Mapping]] = ..., replace: _Optional[_Union[ReplaceResult, _Mapping]] = ..., distill: _Optional[_Union[DistillResult, _Mapping]] = ..., seconds: _Optional[float] = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("version", "run_name", "client_id", "round", "results", "examples", "seconds", "wire", "privacy")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_NAME_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    WIRE_FIELD_NUMBER: _ClassVar[int]
    PRIVACY_FIELD_NUMBER: _ClassVar[int]
    version: int
    run_name: str
    client_id: str
    round: int
    results: _containers.RepeatedCompositeFieldContainer[StepResult]
    examples: int
    seconds: float
    wire: WireReading
    privacy: RecordPrivacy
    def __init__(self, version: _Optional[int] = ..., run_name: _Optional[str] = ..., client_id: _Optional[str] = ..., round: _Optional[int] = ..., results: _Optional[_Iterable[_Union[StepResult, _Mapping]]] = ..., examples: _Optional[int] = ..., seconds: _Optional[float] = ..., wire: _Optional[_Union[WireReading, _Mapping]] = ..., privacy: _Optional[_Union[RecordPrivacy, _Mapping]] = ...) -> None: ...

class Counters(_message.Message):
    __slots__ = ("version", "client_id", "wire")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    WIRE_FIELD_NUMBER: _ClassVar[int]
    version: int
    client_id: str
    wire: WireReading
    def __init__(self, version: _Optional[int] = ..., client_id: _Optional[str] = ..., wire: _Optional[_Union[WireReading, _Mapping]] = ...) -> None: ...
