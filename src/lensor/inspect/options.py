"""Options that several commands have, each described once."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

from lensor.inspect.layers import KINDS

Batch: TypeAlias = Annotated[int, typer.Option(min=1, help="Batch size.")]
Columns: TypeAlias = Annotated[int, typer.Option(min=1, help="Columns of the GGN's square root.")]
Debug: TypeAlias = Annotated[bool, typer.Option("--debug", help="Show a traceback for an error.")]
Device: TypeAlias = Annotated[str, typer.Option(help="cpu or cuda.")]
Dtype: TypeAlias = Annotated[str, typer.Option(help="float64, float32, bfloat16 or float16.")]
Kinds: TypeAlias = Annotated[list[str] | None, typer.Option(help=f"Kinds of convolutions, from {', '.join(KINDS)}.")]
Repeats: TypeAlias = Annotated[int, typer.Option(min=1, help="Maximum number of rounds.")]
Resume: TypeAlias = Annotated[bool, typer.Option("--resume", help="Continue a results file and skip its rows.")]
Seconds: TypeAlias = Annotated[
    float, typer.Option(min=0.0, help="Seconds to time each implementation; at least three rounds.")
]
Threads: TypeAlias = Annotated[int, typer.Option(min=1, help="Threads of torch; use 1 if other programs use the CPUs.")]
