from proto.fedalloy.v1 import adapter_pb2 as _adapter_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GateKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GATE_KIND_UNSPECIFIED: _ClassVar[GateKind]
    GATE_KIND_SCALAR: _ClassVar[GateKind]
    GATE_KIND_INPUT: _ClassVar[GateKind]
    GATE_KIND_TOKEN: _ClassVar[GateKind]

class Schedule(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SCHEDULE_UNSPECIFIED: _ClassVar[Schedule]
    SCHEDULE_CONSTANT: _ClassVar[Schedule]
    SCHEDULE_LINEAR: _ClassVar[Schedule]
    SCHEDULE_COSINE: _ClassVar[Schedule]
    SCHEDULE_POLYNOMIAL: _ClassVar[Schedule]
    SCHEDULE_INVERSE_SQRT: _ClassVar[Schedule]
    SCHEDULE_COSINE_WITH_RESTARTS: _ClassVar[Schedule]

class Optimizer(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OPTIMIZER_UNSPECIFIED: _ClassVar[Optimizer]
    OPTIMIZER_ADAMW: _ClassVar[Optimizer]
    OPTIMIZER_SGD: _ClassVar[Optimizer]

class MergeSpace(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MERGE_SPACE_UNSPECIFIED: _ClassVar[MergeSpace]
    MERGE_SPACE_DELTA: _ClassVar[MergeSpace]
    MERGE_SPACE_FACTOR: _ClassVar[MergeSpace]

class DistillLoss(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DISTILL_LOSS_UNSPECIFIED: _ClassVar[DistillLoss]
    DISTILL_LOSS_KL: _ClassVar[DistillLoss]
    DISTILL_LOSS_MSE: _ClassVar[DistillLoss]

class DistillReduction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DISTILL_REDUCTION_UNSPECIFIED: _ClassVar[DistillReduction]
    DISTILL_REDUCTION_POSITION_MEAN: _ClassVar[DistillReduction]
    DISTILL_REDUCTION_EXAMPLE_MEAN: _ClassVar[DistillReduction]

class SketchRows(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SKETCH_ROWS_UNSPECIFIED: _ClassVar[SketchRows]
    SKETCH_ROWS_FIRST: _ClassVar[SketchRows]
    SKETCH_ROWS_RANDOM: _ClassVar[SketchRows]

class SketchGradient(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SKETCH_GRADIENT_UNSPECIFIED: _ClassVar[SketchGradient]
    SKETCH_GRADIENT_EXACT: _ClassVar[SketchGradient]
    SKETCH_GRADIENT_DIAGONAL: _ClassVar[SketchGradient]

class SelectRule(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SELECT_RULE_UNSPECIFIED: _ClassVar[SelectRule]
    SELECT_RULE_BEST: _ClassVar[SelectRule]
    SELECT_RULE_IMPROVEMENT: _ClassVar[SelectRule]
GATE_KIND_UNSPECIFIED: GateKind
GATE_KIND_SCALAR: GateKind
GATE_KIND_INPUT: GateKind
GATE_KIND_TOKEN: GateKind
SCHEDULE_UNSPECIFIED: Schedule
SCHEDULE_CONSTANT: Schedule
SCHEDULE_LINEAR: Schedule
SCHEDULE_COSINE: Schedule
SCHEDULE_POLYNOMIAL: Schedule
SCHEDULE_INVERSE_SQRT: Schedule
SCHEDULE_COSINE_WITH_RESTARTS: Schedule
OPTIMIZER_UNSPECIFIED: Optimizer
OPTIMIZER_ADAMW: Optimizer
OPTIMIZER_SGD: Optimizer
MERGE_SPACE_UNSPECIFIED: MergeSpace
MERGE_SPACE_DELTA: MergeSpace
MERGE_SPACE_FACTOR: MergeSpace
DISTILL_LOSS_UNSPECIFIED: DistillLoss
DISTILL_LOSS_KL: DistillLoss
DISTILL_LOSS_MSE: DistillLoss
DISTILL_REDUCTION_UNSPECIFIED: DistillReduction
DISTILL_REDUCTION_POSITION_MEAN: DistillReduction
DISTILL_REDUCTION_EXAMPLE_MEAN: DistillReduction
SKETCH_ROWS_UNSPECIFIED: SketchRows
SKETCH_ROWS_FIRST: SketchRows
SKETCH_ROWS_RANDOM: SketchRows
SKETCH_GRADIENT_UNSPECIFIED: SketchGradient
SKETCH_GRADIENT_EXACT: SketchGradient
SKETCH_GRADIENT_DIAGONAL: SketchGradient
SELECT_RULE_UNSPECIFIED: SelectRule
SELECT_RULE_BEST: SelectRule
SELECT_RULE_IMPROVEMENT: SelectRule

class ModuleCoefficients(_message.Message):
    __slots__ = ("values",)
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.ScalarMap[str, float]
    def __init__(self, values: _Optional[_Mapping[str, float]] = ...) -> None: ...

class Gate(_message.Message):
    __slots__ = ("slot", "complement")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    COMPLEMENT_FIELD_NUMBER: _ClassVar[int]
    slot: str
    complement: bool
    def __init__(self, slot: _Optional[str] = ..., complement: _Optional[bool] = ...) -> None: ...

class Term(_message.Message):
    __slots__ = ("slot", "scalar", "per_module", "precision", "gate")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    SCALAR_FIELD_NUMBER: _ClassVar[int]
    PER_MODULE_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    GATE_FIELD_NUMBER: _ClassVar[int]
    slot: str
    scalar: float
    per_module: ModuleCoefficients
    precision: str
    gate: Gate
    def __init__(self, slot: _Optional[str] = ..., scalar: _Optional[float] = ..., per_module: _Optional[_Union[ModuleCoefficients, _Mapping]] = ..., precision: _Optional[str] = ..., gate: _Optional[_Union[Gate, _Mapping]] = ...) -> None: ...

class Mixture(_message.Message):
    __slots__ = ("terms", "shares", "likeness")
    TERMS_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    LIKENESS_FIELD_NUMBER: _ClassVar[int]
    terms: _containers.RepeatedCompositeFieldContainer[Term]
    shares: str
    likeness: str
    def __init__(self, terms: _Optional[_Iterable[_Union[Term, _Mapping]]] = ..., shares: _Optional[str] = ..., likeness: _Optional[str] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("factors", "modules", "without_basis")
    FACTORS_FIELD_NUMBER: _ClassVar[int]
    MODULES_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_BASIS_FIELD_NUMBER: _ClassVar[int]
    factors: _containers.RepeatedScalarFieldContainer[_adapter_pb2.Factor]
    modules: _containers.RepeatedScalarFieldContainer[str]
    without_basis: bool
    def __init__(self, factors: _Optional[_Iterable[_Union[_adapter_pb2.Factor, str]]] = ..., modules: _Optional[_Iterable[str]] = ..., without_basis: _Optional[bool] = ...) -> None: ...

class InitialiseStep(_message.Message):
    __slots__ = ("slot", "seed", "keep_existing", "gate", "copy_of", "keep_own_heads")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    KEEP_EXISTING_FIELD_NUMBER: _ClassVar[int]
    GATE_FIELD_NUMBER: _ClassVar[int]
    COPY_OF_FIELD_NUMBER: _ClassVar[int]
    KEEP_OWN_HEADS_FIELD_NUMBER: _ClassVar[int]
    slot: str
    seed: int
    keep_existing: bool
    gate: GateKind
    copy_of: str
    keep_own_heads: bool
    def __init__(self, slot: _Optional[str] = ..., seed: _Optional[int] = ..., keep_existing: _Optional[bool] = ..., gate: _Optional[_Union[GateKind, str]] = ..., copy_of: _Optional[str] = ..., keep_own_heads: _Optional[bool] = ...) -> None: ...

class RateScale(_message.Message):
    __slots__ = ("factor", "scale")
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    factor: _adapter_pb2.Factor
    scale: float
    def __init__(self, factor: _Optional[_Union[_adapter_pb2.Factor, str]] = ..., scale: _Optional[float] = ...) -> None: ...

class Proximal(_message.Message):
    __slots__ = ("slot", "mu")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    MU_FIELD_NUMBER: _ClassVar[int]
    slot: str
    mu: float
    def __init__(self, slot: _Optional[str] = ..., mu: _Optional[float] = ...) -> None: ...

class Fold(_message.Message):
    __slots__ = ("index", "count")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    index: int
    count: int
    def __init__(self, index: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class Draw(_message.Message):
    __slots__ = ("as_step", "seed")
    AS_STEP_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    as_step: int
    seed: int
    def __init__(self, as_step: _Optional[int] = ..., seed: _Optional[int] = ...) -> None: ...

class TrainStep(_message.Message):
    __slots__ = ("mixture", "slots", "part", "proximal", "steps", "batch_size", "learning_rate", "schedule", "weight_decay", "max_grad_norm", "split", "fold", "rate_scales", "draw", "draw_after_replace", "record", "record_batch_share", "keep_on_divergence", "attributed_to", "optimizer", "momentum", "keep_optimizer", "warmup_steps", "schedule_done", "schedule_total", "sharpness_radius")
    MIXTURE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    PROXIMAL_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    MAX_GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    FOLD_FIELD_NUMBER: _ClassVar[int]
    RATE_SCALES_FIELD_NUMBER: _ClassVar[int]
    DRAW_FIELD_NUMBER: _ClassVar[int]
    DRAW_AFTER_REPLACE_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    RECORD_BATCH_SHARE_FIELD_NUMBER: _ClassVar[int]
    KEEP_ON_DIVERGENCE_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTED_TO_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    KEEP_OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    WARMUP_STEPS_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_DONE_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_TOTAL_FIELD_NUMBER: _ClassVar[int]
    SHARPNESS_RADIUS_FIELD_NUMBER: _ClassVar[int]
    mixture: Mixture
    slots: _containers.RepeatedScalarFieldContainer[str]
    part: Part
    proximal: Proximal
    steps: int
    batch_size: int
    learning_rate: float
    schedule: Schedule
    weight_decay: float
    max_grad_norm: float
    split: str
    fold: Fold
    rate_scales: _containers.RepeatedCompositeFieldContainer[RateScale]
    draw: Draw
    draw_after_replace: Draw
    record: str
    record_batch_share: bool
    keep_on_divergence: bool
    attributed_to: str
    optimizer: Optimizer
    momentum: float
    keep_optimizer: bool
    warmup_steps: int
    schedule_done: int
    schedule_total: int
    sharpness_radius: float
    def __init__(self, mixture: _Optional[_Union[Mixture, _Mapping]] = ..., slots: _Optional[_Iterable[str]] = ..., part: _Optional[_Union[Part, _Mapping]] = ..., proximal: _Optional[_Union[Proximal, _Mapping]] = ..., steps: _Optional[int] = ..., batch_size: _Optional[int] = ..., learning_rate: _Optional[float] = ..., schedule: _Optional[_Union[Schedule, str]] = ..., weight_decay: _Optional[float] = ..., max_grad_norm: _Optional[float] = ..., split: _Optional[str] = ..., fold: _Optional[_Union[Fold, _Mapping]] = ..., rate_scales: _Optional[_Iterable[_Union[RateScale, _Mapping]]] = ..., draw: _Optional[_Union[Draw, _Mapping]] = ..., draw_after_replace: _Optional[_Union[Draw, _Mapping]] = ..., record: _Optional[str] = ..., record_batch_share: _Optional[bool] = ..., keep_on_divergence: _Optional[bool] = ..., attributed_to: _Optional[str] = ..., optimizer: _Optional[_Union[Optimizer, str]] = ..., momentum: _Optional[float] = ..., keep_optimizer: _Optional[bool] = ..., warmup_steps: _Optional[int] = ..., schedule_done: _Optional[int] = ..., schedule_total: _Optional[int] = ..., sharpness_radius: _Optional[float] = ...) -> None: ...

class MergeStep(_message.Message):
    __slots__ = ("target", "mixture", "space", "truncate_rank", "own_heads_only")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    MIXTURE_FIELD_NUMBER: _ClassVar[int]
    SPACE_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_RANK_FIELD_NUMBER: _ClassVar[int]
    OWN_HEADS_ONLY_FIELD_NUMBER: _ClassVar[int]
    target: str
    mixture: Mixture
    space: MergeSpace
    truncate_rank: int
    own_heads_only: bool
    def __init__(self, target: _Optional[str] = ..., mixture: _Optional[_Union[Mixture, _Mapping]] = ..., space: _Optional[_Union[MergeSpace, str]] = ..., truncate_rank: _Optional[int] = ..., own_heads_only: _Optional[bool] = ...) -> None: ...

class EvaluateStep(_message.Message):
    __slots__ = ("label", "mixture", "split", "record", "loss_only", "examples")
    LABEL_FIELD_NUMBER: _ClassVar[int]
    MIXTURE_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    LOSS_ONLY_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    label: str
    mixture: Mixture
    split: str
    record: str
    loss_only: bool
    examples: int
    def __init__(self, label: _Optional[str] = ..., mixture: _Optional[_Union[Mixture, _Mapping]] = ..., split: _Optional[str] = ..., record: _Optional[str] = ..., loss_only: _Optional[bool] = ..., examples: _Optional[int] = ...) -> None: ...

class ReplaceRule(_message.Message):
    __slots__ = ("task", "margin", "relative")
    TASK_FIELD_NUMBER: _ClassVar[int]
    MARGIN_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_FIELD_NUMBER: _ClassVar[int]
    task: str
    margin: float
    relative: bool
    def __init__(self, task: _Optional[str] = ..., margin: _Optional[float] = ..., relative: _Optional[bool] = ...) -> None: ...

class ReplaceStep(_message.Message):
    __slots__ = ("target", "source", "target_record", "source_record", "rules", "exclusive")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TARGET_RECORD_FIELD_NUMBER: _ClassVar[int]
    SOURCE_RECORD_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    EXCLUSIVE_FIELD_NUMBER: _ClassVar[int]
    target: str
    source: str
    target_record: str
    source_record: str
    rules: _containers.RepeatedCompositeFieldContainer[ReplaceRule]
    exclusive: bool
    def __init__(self, target: _Optional[str] = ..., source: _Optional[str] = ..., target_record: _Optional[str] = ..., source_record: _Optional[str] = ..., rules: _Optional[_Iterable[_Union[ReplaceRule, _Mapping]]] = ..., exclusive: _Optional[bool] = ...) -> None: ...

class TaskDistillation(_message.Message):
    __slots__ = ("task", "weight", "loss")
    TASK_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    task: str
    weight: float
    loss: DistillLoss
    def __init__(self, task: _Optional[str] = ..., weight: _Optional[float] = ..., loss: _Optional[_Union[DistillLoss, str]] = ...) -> None: ...

class DistillStep(_message.Message):
    __slots__ = ("train", "teacher", "temperature", "reduction", "tasks", "label_weight")
    TRAIN_FIELD_NUMBER: _ClassVar[int]
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    REDUCTION_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    LABEL_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    train: TrainStep
    teacher: Mixture
    temperature: float
    reduction: DistillReduction
    tasks: _containers.RepeatedCompositeFieldContainer[TaskDistillation]
    label_weight: float
    def __init__(self, train: _Optional[_Union[TrainStep, _Mapping]] = ..., teacher: _Optional[_Union[Mixture, _Mapping]] = ..., temperature: _Optional[float] = ..., reduction: _Optional[_Union[DistillReduction, str]] = ..., tasks: _Optional[_Iterable[_Union[TaskDistillation, _Mapping]]] = ..., label_weight: _Optional[float] = ...) -> None: ...

class SketchStep(_message.Message):
    __slots__ = ("slot", "split", "batches", "batch_size", "gradient", "rows", "row_count", "noise", "noise_on_gradients", "new_weight", "encoding")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ROW_COUNT_FIELD_NUMBER: _ClassVar[int]
    NOISE_FIELD_NUMBER: _ClassVar[int]
    NOISE_ON_GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    NEW_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    slot: str
    split: str
    batches: int
    batch_size: int
    gradient: SketchGradient
    rows: SketchRows
    row_count: int
    noise: float
    noise_on_gradients: bool
    new_weight: float
    encoding: _adapter_pb2.Encoding
    def __init__(self, slot: _Optional[str] = ..., split: _Optional[str] = ..., batches: _Optional[int] = ..., batch_size: _Optional[int] = ..., gradient: _Optional[_Union[SketchGradient, str]] = ..., rows: _Optional[_Union[SketchRows, str]] = ..., row_count: _Optional[int] = ..., noise: _Optional[float] = ..., noise_on_gradients: _Optional[bool] = ..., new_weight: _Optional[float] = ..., encoding: _Optional[_Union[_adapter_pb2.Encoding, str]] = ...) -> None: ...

class SaveStep(_message.Message):
    __slots__ = ("mixture",)
    MIXTURE_FIELD_NUMBER: _ClassVar[int]
    mixture: Mixture
    def __init__(self, mixture: _Optional[_Union[Mixture, _Mapping]] = ...) -> None: ...

class SendStep(_message.Message):
    __slots__ = ("slot", "part", "encoding", "relative_to_received", "for_newcomers")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_TO_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    FOR_NEWCOMERS_FIELD_NUMBER: _ClassVar[int]
    slot: str
    part: Part
    encoding: _adapter_pb2.Encoding
    relative_to_received: bool
    for_newcomers: bool
    def __init__(self, slot: _Optional[str] = ..., part: _Optional[_Union[Part, _Mapping]] = ..., encoding: _Optional[_Union[_adapter_pb2.Encoding, str]] = ..., relative_to_received: _Optional[bool] = ..., for_newcomers: _Optional[bool] = ...) -> None: ...

class FisherStep(_message.Message):
    __slots__ = ("first", "second", "split", "samples", "relative_damping", "in_delta_space", "keep_first", "keep_second", "max_bytes", "more_dampings")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    SECOND_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_DAMPING_FIELD_NUMBER: _ClassVar[int]
    IN_DELTA_SPACE_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIRST_FIELD_NUMBER: _ClassVar[int]
    KEEP_SECOND_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    MORE_DAMPINGS_FIELD_NUMBER: _ClassVar[int]
    first: str
    second: str
    split: str
    samples: int
    relative_damping: float
    in_delta_space: bool
    keep_first: str
    keep_second: str
    max_bytes: int
    more_dampings: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, first: _Optional[str] = ..., second: _Optional[str] = ..., split: _Optional[str] = ..., samples: _Optional[int] = ..., relative_damping: _Optional[float] = ..., in_delta_space: _Optional[bool] = ..., keep_first: _Optional[str] = ..., keep_second: _Optional[str] = ..., max_bytes: _Optional[int] = ..., more_dampings: _Optional[_Iterable[float]] = ...) -> None: ...

class DistanceStep(_message.Message):
    __slots__ = ("first", "second")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    SECOND_FIELD_NUMBER: _ClassVar[int]
    first: str
    second: str
    def __init__(self, first: _Optional[str] = ..., second: _Optional[str] = ...) -> None: ...

class SelectStep(_message.Message):
    __slots__ = ("slots", "target", "rule", "split", "samples")
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedScalarFieldContainer[str]
    target: str
    rule: SelectRule
    split: str
    samples: int
    def __init__(self, slots: _Optional[_Iterable[str]] = ..., target: _Optional[str] = ..., rule: _Optional[_Union[SelectRule, str]] = ..., split: _Optional[str] = ..., samples: _Optional[int] = ...) -> None: ...

class SearchStep(_message.Message):
    __slots__ = ("slots", "target", "split", "samples", "evaluations", "penalty", "bound")
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    PENALTY_FIELD_NUMBER: _ClassVar[int]
    BOUND_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedScalarFieldContainer[str]
    target: str
    split: str
    samples: int
    evaluations: int
    penalty: float
    bound: float
    def __init__(self, slots: _Optional[_Iterable[str]] = ..., target: _Optional[str] = ..., split: _Optional[str] = ..., samples: _Optional[int] = ..., evaluations: _Optional[int] = ..., penalty: _Optional[float] = ..., bound: _Optional[float] = ...) -> None: ...

class GramStep(_message.Message):
    __slots__ = ("slot", "mixture", "split", "samples", "encoding")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    MIXTURE_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    slot: str
    mixture: Mixture
    split: str
    samples: int
    encoding: _adapter_pb2.Encoding
    def __init__(self, slot: _Optional[str] = ..., mixture: _Optional[_Union[Mixture, _Mapping]] = ..., split: _Optional[str] = ..., samples: _Optional[int] = ..., encoding: _Optional[_Union[_adapter_pb2.Encoding, str]] = ...) -> None: ...

class AttributeStep(_message.Message):
    __slots__ = ("slots", "shares", "split")
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedScalarFieldContainer[str]
    shares: str
    split: str
    def __init__(self, slots: _Optional[_Iterable[str]] = ..., shares: _Optional[str] = ..., split: _Optional[str] = ...) -> None: ...

class Gaussian(_message.Message):
    __slots__ = ("weight", "mean", "variance")
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    VARIANCE_FIELD_NUMBER: _ClassVar[int]
    weight: float
    mean: _containers.RepeatedScalarFieldContainer[float]
    variance: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, weight: _Optional[float] = ..., mean: _Optional[_Iterable[float]] = ..., variance: _Optional[_Iterable[float]] = ...) -> None: ...

class DensityStep(_message.Message):
    __slots__ = ("slots", "shares", "split", "dimensions", "seed", "gaussians")
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    GAUSSIANS_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedScalarFieldContainer[str]
    shares: str
    split: str
    dimensions: int
    seed: int
    gaussians: _containers.RepeatedCompositeFieldContainer[Gaussian]
    def __init__(self, slots: _Optional[_Iterable[str]] = ..., shares: _Optional[str] = ..., split: _Optional[str] = ..., dimensions: _Optional[int] = ..., seed: _Optional[int] = ..., gaussians: _Optional[_Iterable[_Union[Gaussian, _Mapping]]] = ...) -> None: ...

class LikenessStep(_message.Message):
    __slots__ = ("slot", "source", "split", "samples", "most")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    MOST_FIELD_NUMBER: _ClassVar[int]
    slot: str
    source: str
    split: str
    samples: int
    most: float
    def __init__(self, slot: _Optional[str] = ..., source: _Optional[str] = ..., split: _Optional[str] = ..., samples: _Optional[int] = ..., most: _Optional[float] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("initialise", "train", "merge", "evaluate", "save", "send", "fisher", "distance", "sketch", "select", "gram", "attribute", "search", "density", "likeness", "replace", "distill")
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
    initialise: InitialiseStep
    train: TrainStep
    merge: MergeStep
    evaluate: EvaluateStep
    save: SaveStep
    send: SendStep
    fisher: FisherStep
    distance: DistanceStep
    sketch: SketchStep
    select: SelectStep
    gram: GramStep
    attribute: AttributeStep
    search: SearchStep
    density: DensityStep
    likeness: LikenessStep
    replace: ReplaceStep
    distill: DistillStep
    def __init__(self, initialise: _Optional[_Union[InitialiseStep, _Mapping]] = ..., train: _Optional[_Union[TrainStep, _Mapping]] = ..., merge: _Optional[_Union[MergeStep, _Mapping]] = ..., evaluate: _Optional[_Union[EvaluateStep, _Mapping]] = ..., save: _Optional[_Union[SaveStep, _Mapping]] = ..., send: _Optional[_Union[SendStep, _Mapping]] = ..., fisher: _Optional[_Union[FisherStep, _Mapping]] = ..., distance: _Optional[_Union[DistanceStep, _Mapping]] = ..., sketch: _Optional[_Union[SketchStep, _Mapping]] = ..., select: _Optional[_Union[SelectStep, _Mapping]] = ..., gram: _Optional[_Union[GramStep, _Mapping]] = ..., attribute: _Optional[_Union[AttributeStep, _Mapping]] = ..., search: _Optional[_Union[SearchStep, _Mapping]] = ..., density: _Optional[_Union[DensityStep, _Mapping]] = ..., likeness: _Optional[_Union[LikenessStep, _Mapping]] = ..., replace: _Optional[_Union[ReplaceStep, _Mapping]] = ..., distill: _Optional[_Union[DistillStep, _Mapping]] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("version", "run_name", "client_id", "round", "seed", "steps", "run_key", "keep_received", "pinned_round", "reads_beside")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_NAME_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    RUN_KEY_FIELD_NUMBER: _ClassVar[int]
    KEEP_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    PINNED_ROUND_FIELD_NUMBER: _ClassVar[int]
    READS_BESIDE_FIELD_NUMBER: _ClassVar[int]
    version: int
    run_name: str
    client_id: str
    round: int
    seed: int
    steps: _containers.RepeatedCompositeFieldContainer[Step]
    run_key: bytes
    keep_received: bool
    pinned_round: int
    reads_beside: bool
    def __init__(self, version: _Optional[int] = ..., run_name: _Optional[str] = ..., client_id: _Optional[str] = ..., round: _Optional[int] = ..., seed: _Optional[int] = ..., steps: _Optional[_Iterable[_Union[Step, _Mapping]]] = ..., run_key: _Optional[bytes] = ..., keep_received: _Optional[bool] = ..., pinned_round: _Optional[int] = ..., reads_beside: _Optional[bool] = ...) -> None: ...

class RegisterRequest(_message.Message):
    __slots__ = ("version", "run_name", "strategy")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_NAME_FIELD_NUMBER: _ClassVar[int]
    STRATEGY_FIELD_NUMBER: _ClassVar[int]
    version: int
    run_name: str
    strategy: str
    def __init__(self, version: _Optional[int] = ..., run_name: _Optional[str] = ..., strategy: _Optional[str] = ...) -> None: ...

class Signature(_message.Message):
    __slots__ = ("public_key", "not_after", "signature")
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    NOT_AFTER_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    public_key: bytes
    not_after: int
    signature: bytes
    def __init__(self, public_key: _Optional[bytes] = ..., not_after: _Optional[int] = ..., signature: _Optional[bytes] = ...) -> None: ...
