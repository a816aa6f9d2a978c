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
    "Gram": {"modes": (_ZEROS, _ZEROS), "GRAM": True},
    "Gram, 3-d": {"modes": ((1, 1, 1), (1, 1, 1)), "GRAM": True},
    "Gram, tables": {"modes": (_TABLES, _TABLES), "GRAM": True},
    "squares": {"modes": (_ZEROS, _NONE), "SQUARE": True},
    "norms": {"modes": (_ZEROS, _NONE), "SQUARE": True, "REDUCE": True},
}
"""The variants of the kernel: how axes are checked, and the epilogues."""


class Compiled(NamedTuple):
    """What a compiled kernel needs; `shared` and `spilled` are in bytes, and the rest are numbers of instructions."""

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


def compile_all(
    capabilities: Sequence[int] = CAPABILITIES,
    numbers: Sequence[str] = tuple(NUMBERS),
    variants: Sequence[str] = tuple(VARIANTS),
) -> Iterator[Compiled]:
    """Compile the kernel for all combinations, with each tile that a launch may choose."""
    for capability in capabilities:
        for kind in numbers:
            if capability < 80 and kind in ("tf32", "bfloat16"):
                continue  # float32 products on these GPUs
            for variant in variants:
                for tile in _tiles(capability, kind, variant):
                    yield _compile(capability, kind, variant, tile)


def _tiles(capability: int, kind: str, variant: str) -> Sequence[Any]:
    """The tiles that a launch of this variant may choose."""
    from lensor.kernels.torch.triton.tiles import fitting, tiles_for

    options = VARIANTS[variant]
    tiles = tiles_for((capability // 10, capability % 10), has_exact_products=kind == "float32")
    is_heavy = "SQUARE" in options or any(2 in modes or 0 not in modes for modes in options["modes"])
    found = fitting(tiles, 1, 1, is_gram="GRAM" in options, is_heavy=is_heavy)
    return [tile for tile in found if "ATOMIC" not in options or tile.rows * tile.columns <= 128 * 64]


def _compile(capability: int, kind: str, variant: str, tile: Any) -> Compiled:
    import triton
    from lensor.kernels.torch.triton.kernels import NUMBERS as ARGUMENTS
    from lensor.kernels.torch.triton.kernels import POINTERS, pattern_product
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    dtype, precision = NUMBERS[kind]
    options = dict(VARIANTS[variant])
    modes, by_rows = options.pop("modes"), options.pop("by_rows", False)
    constants = {
        **{f"{side}_CHECKS": sum(mode > 0 for mode in one) for side, one in zip(("LEFT", "RIGHT"), modes, strict=True)},
        **{
            f"{side}_MODE{at}": mode
            for side, one in zip(("LEFT", "RIGHT"), modes, strict=True)
            for at, mode in enumerate(one)
        },
        **{"LEFT_BY_ROWS": by_rows, "RIGHT_BY_ROWS": by_rows},
        **{name: options.get(name, False) for name in ("SQUARE", "REDUCE", "GRAM", "ATOMIC")},
        **{"ROWS": tile.rows, "COLUMNS": tile.columns, "SUMS": tile.sums, "STAGES": tile.stages},
        **{"PRECISION": precision, "WIDEN": capability < 80 and dtype != "fp32"},
    }
    types = {"left": f"*{dtype}", "right": f"*{dtype}", "out": "*fp32", "apart": "i64", "scale": "fp32"}
    signature = {
        name: types.get(name) or ("*i32" if name in POINTERS else "i32" if name in ARGUMENTS else "constexpr")
        for name in pattern_product.arg_names
    }
    found = triton.compile(
        ASTSource(fn=pattern_product, signature=signature, constexprs=constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tile.warps, "enable_fp_fusion": True},
    )
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        command = [str(tools / "cuobjdump"), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    code = found.asm["ptx"]
    return Compiled(
        capability,
        kind,
        variant,
        "×".join(map(str, tile[:3])) + f", {tile.warps} warps, {tile.stages} stages",
        numbers["REG"],
        numbers["STACK"] + numbers["LOCAL"],
        found.metadata.shared,
        code.count("mma.sync"),
        code.count("wgmma.mma_async"),
        code.count("fma.rn.f32"),
    )
