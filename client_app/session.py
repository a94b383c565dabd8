"""Carries out a server's requests at a client, in the ClientApp's process or in the trainer.

An executor keeps the base model and the data between requests, as long as settings and data files
stay the same.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from client_app.data.arrival import streamed
from client_app.data.dataset import Base, ClientData, Dataset
from client_app.data.stored import give_back_memory
from client_app.guard.disclosure import told
from client_app.guard.noise import secret_of
from client_app.guard.policy import PolicyError
from client_app.guard.privacy import Budget, mark_private, require_private_run
from client_app.guard.record import Record, asked, digest, left, values_of
from client_app.guard.run_binding import bind_run, require_same_run
from client_app.guard.tally import Tally
from client_app.kinds import kind_of
from client_app.model.alignment import load_alignment
from client_app.model.forward.packing import reason_against
from client_app.model.personal import PersonalModel
from client_app.model.start_adapter import read_start_adapter
from client_app.own.about import write_about
from client_app.own.files import load_own
from client_app.own.reading.text_files import DataError
from client_app.own.task_file import is_task_file, load_tasks, stamp_of
from client_app.plan.interpreter import Interpreter
from client_app.plan.progress import Cancelled, tick, within
from client_app.plan.progress_file import shown_in
from client_app.plan.seeds import seed_of
from client_app.plan.sketch import reference_layout
from client_app.plan.slots import SlotStore
from client_app.plan.training import autocast, set_up_torch
from client_app.scenarios import FROM_FILES, NAMES, load_scenario
from client_app.scenarios.files import load_files
from client_app.settings import NodeConfigError, Settings, SettingsError
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.files.atomic_files import private_folder
from fedalloy_adapters.layout import Layout
from proto.fedalloy.v1 import plan_pb2, report_pb2


class Executor:
    """One client's base model and data; holds those of one run's settings at a time.

    Args:
        mode: whose code this is; registrations report it.
    """

    def __init__(self, mode: report_pb2.TrainerMode = report_pb2.TRAINER_MODE_BUNDLED) -> None:
        self.mode = mode
        self._shown: set[bytes] = set()
        self._key: object = None
        self._held: tuple[PersonalModel, ClientData] | None = None

    def register(self, settings: Settings, run_name: str = "") -> report_pb2.Registration:
        """This client's id, adapter layout and numbers of examples; its record names the run."""
        found = self.describe(settings)
        said = found.SerializeToString(deterministic=True)
        values = values_of(found)
        Record(settings.state_dir, settings.client_id).append(
            "registered", run=run_name, bytes=len(said), sha256=digest(said), values=values
        )
        return found

    def describe(self, settings: Settings) -> report_pb2.Registration:
        """The report of :meth:`register`, for the owner: nothing leaves the client and nothing is recorded."""
        found = _registration(settings, *self._load(settings))
        found.trainer = self.mode
        budget = budget_of(settings)
        if budget is not None:
            found.privacy.CopyFrom(budget.said(budget.spent))
            for task in found.tasks:
                task.ClearField("notes")  # findings about the examples
        return found

    def carry_out(
        self, settings: Settings, plan: plan_pb2.Plan, blobs: Mapping[str, bytes]
    ) -> tuple[report_pb2.Report, dict[str, bytes]]:
        """Run a plan; returns the report and the uploads by slot. Either all changes to slots become visible, or none.

        Afterwards the model is as it was loaded. After an error it is loaded again next time.
        """
        record = Record(settings.state_dir, settings.client_id)
        try:
            folder = settings.run_directory(plan.run_name)
            with within(settings.policy.max_seconds), shown_in(folder, plan.round, settings.shown.progress_seconds):
                report, uploads, layouts = self._carry_out(settings, plan, blobs)
        except Exception as error:
            record.append("refused", **asked(plan), error=told(error))
            raise
        for found in layouts.keys() - self._shown:
            shapes = {entry.name: list(entry.shape) for entry in layouts[found].entries}
            record.append("layout", layout=found.hex(), shapes=shapes)
            self._shown.add(found)
        record.append("left", **asked(plan), **left(report, uploads))
        return report, uploads

    def _carry_out(
        self, settings: Settings, plan: plan_pb2.Plan, blobs: Mapping[str, bytes]
    ) -> tuple[report_pb2.Report, dict[str, bytes], dict[bytes, Layout]]:
        model, data = self._load(settings)
        directory, who, policy = settings.run_directory(plan.run_name), settings.client_id, settings.policy
        store = SlotStore(
            directory, model.base.name, lambda: model.heads, settings.keep_rounds, lambda: model.drawn, model.own_layout
        )
        try:
            require_same_run(directory, plan)
            pinned = plan.pinned_round if plan.HasField("pinned_round") else None
            with store.transaction(plan.round, pinned) as slots:
                require_same_run(directory, plan)  # another process may have bound it while this one waited
                starts, secret = _starts(settings, model), secret_of(settings.state_dir, who)
                tally = Tally(settings.state_dir, who)
                budget = budget_of(settings)
                if budget is not None:
                    require_private_run(directory, who)
                interpreter = Interpreter(who, model, data, slots, starts, policy, secret, tally, budget)
                answer = interpreter.run(plan, blobs)
                if budget is not None:
                    mark_private(directory)
                bind_run(directory, plan)
            write_about(directory, settings, model, data, answer[0])
            model.unload_all()
        except (Cancelled, PolicyError):  # raised between two batches or steps, so the model is sound
            model.unload_all()
            raise
        except BaseException:
            del model, data, store
            self.evict()
            raise
        if model.device.type == "cuda":
            torch.cuda.empty_cache()  # between messages, others on this GPU may use the memory
        return *answer, interpreter.layouts

    def evict(self) -> None:
        """Release model and data, on the GPU, too."""
        self._key, self._held = None, None
        gc.collect()  # modules and their hooks refer to each other
        torch.cuda.empty_cache()  # does nothing if CUDA was not used

    def _load(self, settings: Settings) -> tuple[PersonalModel, ClientData]:
        key = (settings, stamp_of(settings))
        if self._held is None or self._key != key:
            self.evict()  # before the next one is loaded: there may not be room for two
            tick("loading")
            private_folder(settings.state_dir)  # before libraries make folders in it
            self._held, self._key = _load(settings), key
        return self._held


def budget_of(settings: Settings) -> Budget | None:
    """The privacy budget of the client's data; None without differential privacy."""
    if not settings.privacy.epsilon:
        return None
    data = settings.data.data_path
    where = str(Path(data).resolve()) if data else f"{settings.scenario} {settings.partition_id} {settings.client_id}"
    return Budget(settings.state_dir, settings.privacy, where)


def _registration(settings: Settings, model: PersonalModel, data: ClientData) -> report_pb2.Registration:
    reference = reference_layout(model)
    settings.policy.require_scores(
        settings.client_id,
        {name: len(task.splits.get("test", ())) for name, task in data.each_task.items()},
        {name: task.generate_examples for name, task in data.each_task.items()},
    )
    # The server should not plan with data that the owner's policy hides.
    held_out = [len(task.splits.get("validation", ())) for task in data.each_task.values()]
    unused = {"validation"} if any(0 < count < settings.policy.min_examples for count in held_out) else set()
    return report_pb2.Registration(
        version=1,
        client_id=settings.client_id,
        base_model=model.base.name,
        layout=model.layout.to_proto(),
        tasks=[
            report_pb2.Task(
                name=name,
                kind=task.kind,
                examples={split: len(found) for split, found in task.splits.items() if split not in unused},
                notes=task.notes,
                groups=task.groups,
                modalities=task.modalities,
            )
            for name, task in data.each_task.items()
        ],
        device=str(model.device),
        reference=reference.to_proto() if reference is not None else None,
        reads_beside=True,
        lends_adapter=settings.policy.lend_adapter,
    )


def _load(settings: Settings) -> tuple[PersonalModel, ClientData]:
    device = set_up_torch(settings.torch_threads or 1)
    base, data = base_and_data(settings)
    model = PersonalModel(base, settings.rank, settings.alpha, settings.dropout, settings.blocks)
    model.micro_batch = settings.model.micro_batch_size
    model.preference_beta = settings.model.preference_beta
    weighed = {name: task.label_weights for name, task in data.each_task.items() if task.label_weights is not None}
    model.label_weights = weighed if data.tasks or not weighed else {"": weighed[data.task]}
    model.group_by_length = settings.model.group_by_length
    if settings.alignment:
        model.align(load_alignment(settings.alignments, settings.alignment, model.layout))
    model.module.to(device)
    model.target_losses.chunk_bytes = settings.model.logits_chunk_mb * 10**6
    if settings.model.packing:
        _pack(model, data)
    return model, replace(data, notes=(*data.notes, *_notes_on_logits(model, data)))


def _pack(model: PersonalModel, data: ClientData) -> None:
    """Let training texts share rows.

    Raises:
        SettingsError: the data or the model do not allow it; says why.
    """
    reason = "" if data.kind == "causal-lm" and not data.tasks else f"the task is {data.kind}, expected causal-lm"
    if not reason:
        train = data.splits["train"]
        texts = train.batch(torch.arange(min(2, len(train))))
        rough = model.dtype is not torch.float32 or model.device.type == "cuda"

        def losses_of(batch: Dataset) -> Tensor:
            with autocast(model.device):
                labels = batch.labels.to(model.device)
                return model.at_targets(model.inputs(batch.inputs), labels, batch.task).losses()

        reason = reason_against(model.module, losses_of, texts, 5e-2 if rough else 1e-3)
    if reason:
        raise SettingsError(f"packing = true: {reason}")
    model.packing = True


def _notes_on_logits(model: PersonalModel, data: ClientData) -> list[str]:
    """Try a batch of one example: does the model compute more logits than its losses need?"""
    train = data.splits["train"]
    if data.tasks or not kind_of(data.kind).generative or not len(train):
        return []
    one = train.batch(torch.tensor([0]))
    with torch.no_grad(), autocast(model.device):
        model.at_targets(model.inputs(one.inputs), one.labels.to(model.device), one.task)
    reason = model.target_losses.reason
    return [f"losses need more memory than they should: {reason}"] if reason else []


def base_and_data(settings: Settings) -> tuple[Base, ClientData]:
    """The client's base model and data, according to its settings."""
    base, data = _read(settings)
    if settings.task_arrival != "all":
        data = streamed(data, settings.task_arrival, settings.rounds, seed_of(settings.seed, settings.client_id))
    return base, data


def _read(settings: Settings) -> tuple[Base, ClientData]:
    if settings.data.data_path:
        base, data = load_tasks(settings) if is_task_file(settings.data.data_path) else load_own(settings)
        for name, task in data.each_task.items():
            if "test" not in task.splits:
                raise DataError(
                    f"{settings.data.data_path}, task {name!r}: no example is in split 'test', on which every model is "
                    "evaluated; expected a share for it in split-fractions, or a test split"
                )
        give_back_memory()  # the rows as they were read
        return base, data
    if settings.model.base_model and settings.scenario in NAMES:
        raise NodeConfigError(
            f"base-model is set, and node-config has no data-path: data of this client are expected, and the scenario "
            f"{settings.scenario!r} has a base model of its own"
        )
    if settings.scenario in FROM_FILES:
        return load_files(settings.scenario, settings)
    return load_scenario(
        settings.scenario, settings.partition_id, settings.num_partitions, settings.seed, settings.state_dir / ".cache"
    )


def _starts(settings: Settings, model: PersonalModel) -> dict[str, Adapter]:
    """The adapters that slots start from, if the client was given one."""
    if not settings.start_adapter:
        return {}
    beside = {**model.heads, **model.drawn}
    return {settings.start_slot: read_start_adapter(settings.start_adapter, model.whole_layout, beside)}
