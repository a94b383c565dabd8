"""``fedalloy align``: the frozen parts of Co-LoRA for all architectures of a federation, in one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from server_app.tools.errors import ToolError

if TYPE_CHECKING:
    from client_app.data.dataset import Base, Dataset
    from client_app.model.subwords import Decode


class AlignCommandError(ToolError):
    """These models cannot be aligned; the message says why."""


@dataclass(frozen=True)
class Aligned:
    """The models to align: a scenario's, on its public data; or the user's own, the pivot first, on the user's data.

    ``public`` has node-config's keys, as for a client's own data: ``data-path``, names of columns, ``task``, ...
    ``data_root`` is the data folder of a scenario that needs one.
    """

    scenario: str = ""
    models: Sequence[str] = ()
    public: Mapping[str, Any] = field(default_factory=dict)
    data_root: str = ""


def align_models(
    what: Aligned,
    blocks: int,
    rank: int,
    seed: int,
    penalty: float,
    orthonormal_b: bool,
    state_dir: Path,
    console: Console,
) -> Path:
    """Write ``<state-dir>/alignments/<hash>.safetensors``, with progress; a stopped run is continued.

    Raises:
        AlignCommandError: there are fewer than two models, or they have no corresponding modules or tokens.
    """
    # Torch takes seconds to import, and every command imports this file.
    from client_app.kinds import TaskError
    from client_app.model.alignment import AlignmentError, AlignOptions, align
    from client_app.model.bases.model_folders import BaseModelError
    from client_app.model.personal import ModelError, PersonalModel
    from client_app.own.reading.text_files import DataError
    from client_app.scenarios import ScenarioError, bases_to_align
    from client_app.settings import SettingsError

    if bool(what.scenario) == bool(what.models):
        raise AlignCommandError("name either a scenario, or --models and --public data of your own")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    try:
        decode: list[Decode] = []
        if what.scenario:
            bases, public = bases_to_align(what.scenario, state_dir / ".cache", what.data_root)
            data = [public] * len(bases)
        else:
            bases, data, decode = _own(what, state_dir)
        models = [PersonalModel(base, rank, float(rank), blocks=blocks) for base in bases]
        with Progress(*columns, console=console) as bars:
            tasks: dict[str, int] = {}

            def progress(doing: str, done: int, total: int) -> None:
                if doing not in tasks:
                    tasks[doing] = int(bars.add_task(doing, total=total))
                bars.update(tasks[doing], completed=done, total=total)  # type: ignore[arg-type]

            options = AlignOptions(seed=seed, penalty=penalty, orthonormal_b=orthonormal_b)
            return align(models[0], models[1:], data, state_dir / "alignments", options, progress, decode)
    except (AlignmentError, BaseModelError, DataError, ModelError, ScenarioError, SettingsError, TaskError) as error:
        raise AlignCommandError(str(error)) from error


def _own(what: Aligned, state_dir: Path) -> tuple[list[Base], list[Dataset], list[Decode]]:
    """The models, all of the public data as each of them reads them, in the same order, and what gives tokens' texts.

    Without texts there is nothing to decode.
    """
    from flwr.app import Context, RecordDict

    from client_app.own.files import load_own
    from client_app.settings import SettingsError, read_settings

    if len(what.models) < 2:
        raise SettingsError(f"--models names {', '.join(what.models)}, expected two or more, the pivot first")
    node = {"split-fractions": "1,0,0", **what.public, "client-id": "public", "state-dir": str(state_dir)}
    bases, data, decode = [], [], []
    for model in what.models:
        context = Context(0, 0, node_config=node | {"base-model": model}, state=RecordDict(), run_config={})
        base, found = load_own(read_settings(context))
        bases.append(base)
        data.append(found.splits["train"])
        decode += [found.decode] if found.decode is not None else []
    return bases, data, decode
