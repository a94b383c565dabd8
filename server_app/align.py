"""``fedalloy align``: the frozen parts of Co-LoRA for all architectures of a scenario, in one file."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class AlignCommandError(RuntimeError):
    """The scenario cannot be aligned; says why."""


def align_scenario(
    scenario: str,
    blocks: int,
    rank: int,
    seed: int,
    penalty: float,
    orthonormal_b: bool,
    state_dir: Path,
    console: Console,
) -> Path:
    """Write ``<state-dir>/alignments/<hash>.safetensors``, with progress; a run that was stopped is continued.

    Raises:
        AlignCommandError: the scenario has one architecture, or models that have no corresponding modules.
    """
    # Torch takes seconds to import, and every command looks at this file for its error.
    from client_app.alignment import AlignmentError, AlignOptions, align
    from client_app.model import ModelError, PersonalModel
    from client_app.scenarios import ScenarioError, bases_to_align

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    try:
        bases, data = bases_to_align(scenario, state_dir / ".cache")
        models = [PersonalModel(base, rank, float(rank), blocks=blocks) for base in bases]
        with Progress(*columns, console=console) as bars:
            tasks: dict[str, int] = {}

            def progress(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = int(bars.add_task(what, total=total))
                bars.update(tasks[what], completed=done, total=total)  # type: ignore[arg-type]

            options = AlignOptions(seed=seed, penalty=penalty, orthonormal_b=orthonormal_b)
            return align(models[0], models[1:], data, state_dir / "alignments", options, progress)
    except (AlignmentError, ModelError, ScenarioError) as error:
        raise AlignCommandError(str(error)) from error
