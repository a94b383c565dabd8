"""The command that aligns different architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server_app.tools.commands.arguments import DataRoot, listed, parse_run_config
from server_app.tools.commands.terminal import clear_errors, console


def align(
    scenario: Annotated[str, typer.Argument(help="A scenario with several architectures, as digits-mixed.")] = "",
    data: DataRoot = None,
    models: Annotated[str, typer.Option(help="Or: base models of your own, comma-separated, the smallest first,")] = "",
    public: Annotated[str, typer.Option(help="and data for them: \"data-path='public.jsonl' text-column='q'\".")] = "",
    blocks: Annotated[int, typer.Option(min=1, help="lora-blocks of the runs it is for.")] = 2,
    rank: Annotated[int, typer.Option(min=1, help="lora-r of the runs it is for.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Decides the pivot's A and B.")] = 0,
    penalty: Annotated[float, typer.Option(min=0, help="Weight of A's orthogonality.")] = 0.5,
    orthonormal_b: Annotated[bool, typer.Option(help="Make B's columns orthonormal at the end.")] = False,
    state_dir: Annotated[Path, typer.Option(help="The clients' state-dir.")] = Path("runs"),
) -> None:
    """Align the frozen A and B of different architectures; if stopped, run it again to continue."""
    from server_app.tools.align import Aligned, align_models

    with clear_errors():
        what = Aligned(scenario, listed(models), parse_run_config(public), str(data or ""))
        path = align_models(what, blocks, rank, seed, penalty, orthonormal_b, state_dir, console)
    console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    console.print(f"run-config: lora-blocks={blocks} lora-r={rank} lora-alignment='{path.stem}'", soft_wrap=True)
