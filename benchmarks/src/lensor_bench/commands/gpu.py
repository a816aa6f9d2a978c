"""The subcommands of `lensor bench` for GPUs: everything on a card in minutes, and kernels compiled without one."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from lensor.inspect.errors import CommandError, require
from lensor.inspect.files import refuse_folder_early, writing
from lensor.inspect.options import Batch, Debug
from lensor.inspect.terminal import console, names_of, reported


def gpu(
    out: Annotated[Path, typer.Option(help="Folder for gpu.csv and gpu.md.")],
    minutes: Annotated[float, typer.Option(min=0.0, help="About how long the run takes.")] = 8.0,
    batch: Batch = 32,
    debug: Debug = False,
) -> None:
    """Check the kernels on a GPU, and measure operations, candidates and models; a stopped run goes on.

    Without a GPU, everything runs on small operands by Triton's interpreter.
    """
    with reported(debug, interrupted=f"interrupted: finished rows are in {out}; the same command continues"):
        _gpu(out, minutes, batch)


def _gpu(out: Path, minutes: float, batch: int) -> None:
    require("torch", "triton")
    import torch

    has_card = torch.cuda.is_available()
    if not has_card:
        os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton
    from lensor_bench.gpu import Run, summary
    from lensor_bench.run import here

    refuse_folder_early(out, ["gpu.csv", "gpu.md"])
    device = torch.device("cuda" if has_card else "cpu")
    run = Run(out, minutes, device, batch)
    with Progress(console=console(), transient=True) as progress, writing(out):
        task = progress.add_task("", total=None)
        for row in run():
            progress.update(task, description=" ".join(row.key[:4]))
    machine = here(device).label + ("" if has_card else "; no GPU: small operands, Triton's interpreter")
    text = summary(run.rows, machine)
    with writing(out):
        (out / "gpu.md").write_text(text, encoding="utf-8")
    console().print(text, soft_wrap=True, highlight=False)


def bounds(batch: Batch = 32, debug: Debug = False) -> None:
    """Print the flops and bytes of the fused plans for three layers, and the time that they bound on some GPUs."""
    with reported(debug):
        require("torch")
        from lensor_bench.gpu import bounds

        columns = [
            *(("T4", "float32"), ("A100", "float32"), ("A100", "tf32"), ("A100", "bfloat16")),
            *(("H100", "float32"), ("H100", "tf32"), ("H100", "bfloat16")),
        ]
        heads = ["operation", "convolution", "plan", "Gflop", "MB (float32)", *(f"{a} {b}" for a, b in columns)]
        lines = [f"| {' | '.join(heads)} |", f"|{'---|' * 3}{'--:|' * (len(heads) - 3)}"]
        for one in bounds(batch):
            times = [f"{one.milliseconds[column]:.3f}" for column in columns]
            cells = [one.operation, one.convolution, one.plan, f"{one.flops / 1e9:.2f}", f"{4 * one.entries / 1e6:.1f}"]
            lines.append(f"| {' | '.join([*cells, *times])} |")
        console().print("\n".join(lines), soft_wrap=True, highlight=False)


def compiled(
    out: Annotated[Path, typer.Option(help="File (CSV).")] = Path("compiled.csv"),
    capability: Annotated[list[str] | None, typer.Option(help="From 75, 80, 90; all by default.")] = None,
    numbers: Annotated[list[str] | None, typer.Option(help="From float32, tf32, float16, bfloat16.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help="Variants of the kernel; all by default.")] = None,
    debug: Debug = False,
) -> None:
    """Compile each variant of the kernels for GPUs, without one: registers, spills, shared memory, instructions."""
    with reported(debug):
        require("torch", "triton")
        from lensor_bench.compiled import CAPABILITIES, NUMBERS, SHARED, VARIANTS, Compiled, compile_all

        known = {"capability": tuple(map(str, CAPABILITIES)), "numbers": tuple(NUMBERS), "variant": tuple(VARIANTS)}
        asked = {"capability": names_of(capability), "numbers": names_of(numbers), "variant": tuple(variant or ())}
        for option, names in asked.items():
            for name in names:
                if name not in known[option]:
                    raise CommandError(f"{option} {name!r} is unknown, expected one of {', '.join(known[option])}")
        chosen = {option: names or known[option] for option, names in asked.items()}
        count = spilled = large = 0
        with writing(out), out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(Compiled._fields)
            found = compile_all([*map(int, chosen["capability"])], chosen["numbers"], chosen["variant"])
            with Progress(console=console(), transient=True) as progress:
                task = progress.add_task("", total=None)
                for one in found:
                    progress.update(task, description=f"sm_{one.capability} {one.numbers} {one.variant} {one.tile}")
                    writer.writerow(one)
                    count += 1
                    spilled += one.spilled > 0
                    large += one.shared > SHARED[one.capability]
        console().print(f"{count} kernels compiled, {spilled} with spills, {large} with too much shared memory: {out}")
