"""Compilation of the fused kernels for GPUs that are not there: registers, spills, shared memory, instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

CAPABILITIES = (75, 80, 90)
"""Compute capabilities: 7.5 (T4), 8.0 (A100), 9.0 (H100, H200)."""

SHARED = {75: 64 << 10, 80: 163 << 10, 90: 227 << 10}
"""The most shared memory in bytes that one block may use."""

NUMBERS = {
    "float32": ("fp32", "ieee"),
    "tf32": ("fp32", "tf32"),
    "float16": ("fp16", "ieee"),
    "bfloat16": ("bf16", "ieee"),
}
"""For each kind of products, the dtype of the operands and the precision of the products."""

_ZEROS, _TABLES, _NONE = (1, 1, 0), (2, 2, 0), (0, 0, 0)

VARIANTS: dict[str, dict[str, Any]] = {
    "product": {"modes": (_ZEROS, _NONE)},
    "product, 3-d": {"modes": ((1, 1, 1), _NONE)},
    "product, tables": {"modes": (_TABLES, _NONE)},
    "product, channels last": {"modes": (_ZEROS, _NONE), "by_rows": True},
    "product, split": {"modes": (_ZEROS, _NONE), "ATOMIC": True},
    "product, few channels": {"modes": (_ZEROS, _NONE), "uniform": False},
    "product, few channels, tables": {"modes": (_TABLES, _NONE), "uniform": False},
    "Gram": {"modes": (_ZEROS, _ZEROS), "GRAM": True},
    "Gram, 3-d": {"modes": ((1, 1, 1), (1, 1, 1)), "GRAM": True},
    "Gram, tables": {"modes": (_TABLES, _TABLES), "GRAM": True},
    "Gram, few channels": {"modes": (_ZEROS, _ZEROS), "GRAM": True, "uniform": False},
    "Gram, few channels, 3-d": {"modes": ((1, 1, 1), (1, 1, 1)), "GRAM": True, "uniform": False},
    "squares": {"modes": (_ZEROS, _NONE), "SQUARE": True},
    "squares, few channels": {"modes": (_ZEROS, _NONE), "SQUARE": True, "uniform": False},
    "norms": {"modes": (_ZEROS, _NONE), "SQUARE": True, "REDUCE": True},
}
"""The variants of the kernel: how axes are checked, and the epilogues."""


class Compiled(NamedTuple):
    """What a compiled kernel needs.

    `shared` and `spilled` are in bytes; `mma`, `wgmma` and `fma` are numbers of instructions. `limited` is true if the
    kernel had spilled registers and was compiled again with a limit.
    """

    capability: int
    numbers: str
    variant: str
    tile: str
    registers: int
    spilled: int
    shared: int
    mma: int
    wgmma: int
    fma: int
    limited: bool


def compile_all(
    capabilities: Sequence[int] = CAPABILITIES,
    numbers: Sequence[str] = tuple(NUMBERS),
    variants: Sequence[str] = tuple(VARIANTS),
) -> Iterator[Compiled]:
    """Compile the kernel for all combinations, with each tile that a launch may choose."""
    for capability in capabilities:
        for kind in numbers:
            if capability < 80 and kind != "float32":
                continue  # torch multiplies faster in half precision there, and has no TF32
            for variant in variants:
                for tile in _tiles(capability, kind, variant):
                    yield _compile(capability, kind, variant, tile)


def _tiles(capability: int, kind: str, variant: str) -> Sequence[Any]:
    """The tiles that a launch of this variant may choose."""
    from lensor.kernels.torch.triton.launch import MOST_ADDED
    from lensor.kernels.torch.triton.tiles import Side, fitting, tiles_for

    options = VARIANTS[variant]
    capabilities = (capability // 10, capability % 10)
    tiles = tiles_for(capabilities, has_exact_products=kind == "float32")
    # With one row for each group, tiles of one group would have too many gaps.
    each, by_rows = 4096 if options.get("uniform", True) else 1, options.get("by_rows", False)
    rows, columns = (Side(9, each, sum(map(bool, one)), by_rows, 2 in one) for one in options["modes"])
    found = fitting(tiles, rows, columns, is_gram="GRAM" in options, is_square="SQUARE" in options)
    return [tile for tile in found if "ATOMIC" not in options or tile.rows * tile.columns <= MOST_ADDED]


def _compile(capability: int, kind: str, variant: str, tile: Any) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lensor.kernels.torch.triton.kernels import NUMBERS as ARGUMENTS
    from lensor.kernels.torch.triton.kernels import POINTERS, pattern_product
    from lensor.kernels.torch.triton.launch import limits

    dtype, precision = NUMBERS[kind]
    epilogue = dict(VARIANTS[variant])
    modes, by_rows, uniform = epilogue.pop("modes"), epilogue.pop("by_rows", False), epilogue.pop("uniform", True)
    constants = {
        **{f"{side}_CHECKS": sum(mode > 0 for mode in one) for side, one in zip(("LEFT", "RIGHT"), modes, strict=True)},
        **{
            f"{side}_MODE{at}": mode
            for side, one in zip(("LEFT", "RIGHT"), modes, strict=True)
            for at, mode in enumerate(one)
        },
        "LEFT_BY_ROWS": by_rows,
        "RIGHT_BY_ROWS": by_rows,
        **{f"{side}_UNIFORM": uniform or not any(one) for side, one in zip(("LEFT", "RIGHT"), modes, strict=True)},
        **{name: epilogue.get(name, False) for name in ("SQUARE", "REDUCE", "GRAM", "ATOMIC")},
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "SUMS": tile.sums,
        "STAGES": tile.stages,
        "PRECISION": precision,
        "WIDEN": False,
    }
    types = {"left": f"*{dtype}", "right": f"*{dtype}", "out": "*fp32", "apart": "i64", "scale": "fp32"}
    signature = {
        name: types.get(name) or ("*i32" if name in POINTERS else "i32" if name in ARGUMENTS else "constexpr")
        for name in pattern_product.arg_names
    }
    options = {"num_warps": tile.warps, "enable_fp_fusion": True}

    def compiled(**limit: int) -> tuple[Any, int, int]:
        found = triton.compile(
            ASTSource(fn=pattern_product, signature=signature, constexprs=constants),
            target=GPUTarget("cuda", capability, 32),
            options={**options, **limit},
        )
        return found, *_assembled(found.asm["ptx"], capability)

    found, registers, spilled = compiled()
    is_limited = spilled > 0
    for limit in limits(registers):  # as a launch does
        if spilled:
            found, registers, spilled = compiled(maxnreg=limit)
    code = found.asm["ptx"]
    return Compiled(
        capability,
        kind,
        variant,
        "×".join(map(str, tile[:3])) + f", {tile.warps} warps, {tile.stages} stages",
        registers,
        spilled,
        found.metadata.shared,
        code.count("mma.sync"),
        code.count("wgmma.mma_async"),
        code.count("fma.rn.f32"),
        is_limited,
    )


def _assembled(code: str, capability: int) -> tuple[int, int]:
    """The registers of a kernel, and the bytes of its spill stores, as NVIDIA's assembler reports them."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    target = re.search(r"\.target (\w+)", code)
    assert target is not None
    for name in ("ptxas", "ptxas-blackwell"):  # newer code needs the newer one
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(code)
            file.flush()
            command = [str(tools / name), "-v", f"-arch={target[1]}", file.name, "-o", "/dev/null"]
            said = subprocess.run(command, capture_output=True, text=True, timeout=120).stderr
        registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
        if registers and spilled:
            return int(registers[1]), int(spilled[1])
    raise RuntimeError(f"ptxas cannot assemble the kernel for sm_{capability}: {said}")
