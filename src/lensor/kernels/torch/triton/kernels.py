"""The Triton kernel for pattern products.

One program computes one tile [ROWS, COLUMNS] of C[b, r, c] = Σ_s L[b, r, s] R[b, s, c] and loops over s. Entries of L
and R are read at the sum of four offsets from tables, one for each group of indices: b, r or c, and s as a plain part t
and an inner part u. An operand has up to three checked axes: coordinates from the same tables are added, and the read
is zero if a sum is outside the axis. For padding modes other than zeros, an axis has a table of offsets.

All sizes are arguments, so other shapes compile nothing.
"""

# Triton compiles these functions: numbers are constants of the kernel, and branches on them are taken at compile time.
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from lensor.kernels.reading import OUTSIDE

_OUTSIDE = tl.constexpr(OUTSIDE)


@triton.jit
def _entries(table, at, inside, size, row: tl.constexpr, other: tl.constexpr):
    """One row of a table at some positions, `other` where there are none."""
    return tl.load(table + row * size + at, mask=inside, other=other)


@triton.jit
def _coordinates(table, at, inside, size, axis: tl.constexpr, CHECKS: tl.constexpr):
    """The coordinates on a checked axis; 0 if the operand does not have that many."""
    if axis < CHECKS:
        return _entries(table, at, inside, size, axis + 1, _OUTSIDE)
    else:
        return at * 0


@triton.jit
def _row_coordinates(table, at, first, size, axis: tl.constexpr, CHECKS: tl.constexpr, UNIFORM: tl.constexpr):
    """The coordinates of the rows of a tile; one number if they are all the same."""
    if UNIFORM:
        return _coordinates(table, first, True, size, axis, CHECKS)
    else:
        return _coordinates(table, at, True, size, axis, CHECKS)


@triton.jit
def _checked(offsets, inside, coordinates, size, table, MODE: tl.constexpr):
    """Add the offsets of a checked axis, and restrict the reads to positions on it.

    As an unsigned number, a negative coordinate is larger than any size.
    """
    if MODE > 0:
        inside = inside & (coordinates.to(tl.uint32, bitcast=True) < size.to(tl.uint32))
        if MODE > 1:
            found = tl.load(table + coordinates, mask=inside, other=-1)
            inside = inside & (found >= 0)
            offsets += found
    return offsets, inside


@triton.jit
def _tile(
    array,
    offset_r,
    r0,
    r1,
    r2,
    offset_s,
    inside_s,
    s0,
    s1,
    s2,
    size0,
    size1,
    size2,
    table0,
    table1,
    table2,
    MODE0: tl.constexpr,
    MODE1: tl.constexpr,
    MODE2: tl.constexpr,
    UNIFORM: tl.constexpr,
    BY_ROWS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """The entries [rows, sums] of an operand; neighbouring threads read neighbouring rows if BY_ROWS.

    If all rows have the same coordinates (UNIFORM), only terms of the sum are checked.
    """
    if UNIFORM:
        offset_s, inside_s = _checked(offset_s, inside_s, r0 + s0, size0, table0, MODE0)
        offset_s, inside_s = _checked(offset_s, inside_s, r1 + s1, size1, table1, MODE1)
        offset_s, inside_s = _checked(offset_s, inside_s, r2 + s2, size2, table2, MODE2)
        if BY_ROWS:
            offsets = offset_r[None, :] + offset_s[:, None]
            inside = inside_s[:, None]
        else:
            offsets = offset_r[:, None] + offset_s[None, :]
            inside = inside_s[None, :]
    else:
        if BY_ROWS:
            offsets = offset_r[None, :] + offset_s[:, None]
            inside = inside_s[:, None]
            r0, r1, r2, s0, s1, s2 = r0[None, :], r1[None, :], r2[None, :], s0[:, None], s1[:, None], s2[:, None]
        else:
            offsets = offset_r[:, None] + offset_s[None, :]
            inside = inside_s[None, :]
            r0, r1, r2, s0, s1, s2 = r0[:, None], r1[:, None], r2[:, None], s0[None, :], s1[None, :], s2[None, :]
        offsets, inside = _checked(offsets, inside, r0 + s0, size0, table0, MODE0)
        offsets, inside = _checked(offsets, inside, r1 + s1, size1, table1, MODE1)
        offsets, inside = _checked(offsets, inside, r2 + s2, size2, table2, MODE2)
    found = tl.load(array + offsets, mask=inside, other=0.0)
    if WIDEN:
        found = found.to(tl.float32)
    if BY_ROWS:
        found = tl.trans(found)
    return found


@triton.jit
def _triangle(pid):
    """The tile (row, column), column ≤ row, with this number."""
    row = ((tl.sqrt(8.0 * pid.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > pid, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= pid, row + 1, row)
    return row, pid - row * (row + 1) // 2


@triton.jit
def _part(
    left,
    right,
    left_b,
    left_t,
    left_u,
    right_b,
    right_t,
    right_u,
    left_table0,
    left_table1,
    left_table2,
    right_table0,
    right_table1,
    right_table2,
    left_size0,
    left_size1,
    left_size2,
    right_size0,
    right_size1,
    right_size2,
    b,
    batches,
    plain,
    inner,
    first_s,
    last_s,
    offset_r,
    r0,
    r1,
    r2,
    offset_c,
    c0,
    c1,
    c2,
    LEFT_CHECKS: tl.constexpr,
    RIGHT_CHECKS: tl.constexpr,
    LEFT_MODE0: tl.constexpr,
    LEFT_MODE1: tl.constexpr,
    LEFT_MODE2: tl.constexpr,
    RIGHT_MODE0: tl.constexpr,
    RIGHT_MODE1: tl.constexpr,
    RIGHT_MODE2: tl.constexpr,
    LEFT_UNIFORM: tl.constexpr,
    LEFT_BY_ROWS: tl.constexpr,
    RIGHT_UNIFORM: tl.constexpr,
    RIGHT_BY_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUMS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """C[b, r, c] for one b and a tile of r and c, summed from first_s to last_s."""
    base_l = tl.load(left_b + b)
    base_r = tl.load(right_b + b)
    lb0 = _coordinates(left_b, b, True, batches, 0, LEFT_CHECKS)
    lb1 = _coordinates(left_b, b, True, batches, 1, LEFT_CHECKS)
    lb2 = _coordinates(left_b, b, True, batches, 2, LEFT_CHECKS)
    rb0 = _coordinates(right_b, b, True, batches, 0, RIGHT_CHECKS)
    rb1 = _coordinates(right_b, b, True, batches, 1, RIGHT_CHECKS)
    rb2 = _coordinates(right_b, b, True, batches, 2, RIGHT_CHECKS)
    part = tl.zeros([ROWS, COLUMNS], tl.float32)
    for s in tl.range(first_s, last_s, SUMS, num_stages=STAGES):
        at = s + tl.arange(0, SUMS)
        inside = at < last_s
        t = at // inner
        u = at - t * inner
        a = _tile(
            left + base_l,
            offset_r,
            r0 + lb0,
            r1 + lb1,
            r2 + lb2,
            _entries(left_t, t, inside, plain, 0, 0) + _entries(left_u, u, inside, inner, 0, 0),
            inside,
            _coordinates(left_t, t, inside, plain, 0, LEFT_CHECKS)
            + _coordinates(left_u, u, inside, inner, 0, LEFT_CHECKS),
            _coordinates(left_t, t, inside, plain, 1, LEFT_CHECKS)
            + _coordinates(left_u, u, inside, inner, 1, LEFT_CHECKS),
            _coordinates(left_t, t, inside, plain, 2, LEFT_CHECKS)
            + _coordinates(left_u, u, inside, inner, 2, LEFT_CHECKS),
            left_size0,
            left_size1,
            left_size2,
            left_table0,
            left_table1,
            left_table2,
            LEFT_MODE0,
            LEFT_MODE1,
            LEFT_MODE2,
            LEFT_UNIFORM,
            LEFT_BY_ROWS,
            WIDEN,
        )
        c = _tile(
            right + base_r,
            offset_c,
            c0 + rb0,
            c1 + rb1,
            c2 + rb2,
            _entries(right_t, t, inside, plain, 0, 0) + _entries(right_u, u, inside, inner, 0, 0),
            inside,
            _coordinates(right_t, t, inside, plain, 0, RIGHT_CHECKS)
            + _coordinates(right_u, u, inside, inner, 0, RIGHT_CHECKS),
            _coordinates(right_t, t, inside, plain, 1, RIGHT_CHECKS)
            + _coordinates(right_u, u, inside, inner, 1, RIGHT_CHECKS),
            _coordinates(right_t, t, inside, plain, 2, RIGHT_CHECKS)
            + _coordinates(right_u, u, inside, inner, 2, RIGHT_CHECKS),
            right_size0,
            right_size1,
            right_size2,
            right_table0,
            right_table1,
            right_table2,
            RIGHT_MODE0,
            RIGHT_MODE1,
            RIGHT_MODE2,
            RIGHT_UNIFORM,
            RIGHT_BY_ROWS,
            WIDEN,
        )
        part = tl.dot(a, tl.trans(c), part, input_precision=PRECISION)
    return part


POINTERS = (
    *("left", "right", "out", "left_b", "left_r", "left_t", "left_u", "right_b", "right_c", "right_t", "right_u"),
    *("out_b", "out_r", "out_c", "left_table0", "left_table1", "left_table2"),
    *("right_table0", "right_table1", "right_table2"),
)
NUMBERS = (
    *("left_size0", "left_size1", "left_size2", "right_size0", "right_size1", "right_size2"),
    *("batch", "squared", "rows", "columns", "plain", "inner", "tiles_c", "tiles", "splits", "apart", "scale"),
)
"""The arguments that are tensors, and those that are numbers; their values and alignments compile nothing new."""


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=POINTERS)
def pattern_product(
    left,
    right,
    out,
    left_b,
    left_r,
    left_t,
    left_u,
    right_b,
    right_c,
    right_t,
    right_u,
    out_b,
    out_r,
    out_c,
    left_table0,
    left_table1,
    left_table2,
    right_table0,
    right_table1,
    right_table2,
    left_size0,
    left_size1,
    left_size2,
    right_size0,
    right_size1,
    right_size2,
    batch,
    squared,
    rows,
    columns,
    plain,
    inner,
    tiles_c,
    tiles,
    splits,
    apart,
    scale,
    LEFT_CHECKS: tl.constexpr,
    RIGHT_CHECKS: tl.constexpr,
    LEFT_MODE0: tl.constexpr,
    LEFT_MODE1: tl.constexpr,
    LEFT_MODE2: tl.constexpr,
    RIGHT_MODE0: tl.constexpr,
    RIGHT_MODE1: tl.constexpr,
    RIGHT_MODE2: tl.constexpr,
    LEFT_UNIFORM: tl.constexpr,
    LEFT_BY_ROWS: tl.constexpr,
    RIGHT_UNIFORM: tl.constexpr,
    RIGHT_BY_ROWS: tl.constexpr,
    SQUARE: tl.constexpr,
    REDUCE: tl.constexpr,
    GRAM: tl.constexpr,
    ATOMIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUMS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile of a pattern product, or of a part of its sum."""
    # left, right, out: the operands and the result
    # left_b … right_u: tables [1 + checks, size] of offsets and coordinates for each group of indices
    # out_b, out_r, out_c: offsets in the result; −1 for rows and columns in gaps
    # left_table0 … right_table2: tables of offsets of the checked axes with MODE 2
    # left_size0 … right_size2: numbers of positions on the checked axes
    # batch, squared: the number of kept b, and of squared b for each of them
    # rows, columns, plain, inner: the sizes of r and c with gaps, and of t and u
    # tiles_c, tiles: the number of tiles along c, and in total
    # splits, apart: the number of programs that share a sum, and the distance of their results if not ATOMIC
    # scale: the factor of the result
    pid = tl.program_id(0)
    tile = pid % tiles
    pid = pid // tiles
    split = pid % splits
    kept = pid // splits
    if GRAM:
        tile_r, tile_c = _triangle(tile)
    else:
        tile_r = tile // tiles_c
        tile_c = tile % tiles_c
    first_r = tile_r * ROWS
    first_c = tile_c * COLUMNS
    at_r = first_r + tl.arange(0, ROWS)
    at_c = first_c + tl.arange(0, COLUMNS)
    inside_r = at_r < rows
    inside_c = at_c < columns
    # Rows beyond the last one read what the last one reads; their results are not stored.
    read_r = tl.minimum(at_r, rows - 1)
    read_c = tl.minimum(at_c, columns - 1)
    offset_r = _entries(left_r, read_r, True, rows, 0, 0)
    offset_c = _entries(right_c, read_c, True, columns, 0, 0)
    r0 = _row_coordinates(left_r, read_r, first_r, rows, 0, LEFT_CHECKS, LEFT_UNIFORM)
    r1 = _row_coordinates(left_r, read_r, first_r, rows, 1, LEFT_CHECKS, LEFT_UNIFORM)
    r2 = _row_coordinates(left_r, read_r, first_r, rows, 2, LEFT_CHECKS, LEFT_UNIFORM)
    c0 = _row_coordinates(right_c, read_c, first_c, columns, 0, RIGHT_CHECKS, RIGHT_UNIFORM)
    c1 = _row_coordinates(right_c, read_c, first_c, columns, 1, RIGHT_CHECKS, RIGHT_UNIFORM)
    c2 = _row_coordinates(right_c, read_c, first_c, columns, 2, RIGHT_CHECKS, RIGHT_UNIFORM)

    sums = plain * inner
    batches = batch * squared
    if SQUARE:  # this program takes some of the squared b, and all of s
        share = tl.cdiv(squared, splits)
        first_b = kept * squared + split * share
        last_b = tl.minimum(first_b + share, (kept + 1) * squared)
        first_s = 0
        last_s = sums
    else:  # this program takes one b, and some of s
        share = tl.cdiv(tl.cdiv(sums, splits), SUMS) * SUMS
        first_s = split * share
        last_s = tl.minimum(first_s + share, sums)
    if SQUARE:
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for b in range(first_b, last_b):
            part = _part(
                left,
                right,
                left_b,
                left_t,
                left_u,
                right_b,
                right_t,
                right_u,
                left_table0,
                left_table1,
                left_table2,
                right_table0,
                right_table1,
                right_table2,
                left_size0,
                left_size1,
                left_size2,
                right_size0,
                right_size1,
                right_size2,
                b,
                batches,
                plain,
                inner,
                first_s,
                last_s,
                offset_r,
                r0,
                r1,
                r2,
                offset_c,
                c0,
                c1,
                c2,
                LEFT_CHECKS,
                RIGHT_CHECKS,
                LEFT_MODE0,
                LEFT_MODE1,
                LEFT_MODE2,
                RIGHT_MODE0,
                RIGHT_MODE1,
                RIGHT_MODE2,
                LEFT_UNIFORM,
                LEFT_BY_ROWS,
                RIGHT_UNIFORM,
                RIGHT_BY_ROWS,
                ROWS,
                COLUMNS,
                SUMS,
                STAGES,
                PRECISION,
                WIDEN,
            )
            total += part * part
    else:
        total = _part(
            left,
            right,
            left_b,
            left_t,
            left_u,
            right_b,
            right_t,
            right_u,
            left_table0,
            left_table1,
            left_table2,
            right_table0,
            right_table1,
            right_table2,
            left_size0,
            left_size1,
            left_size2,
            right_size0,
            right_size1,
            right_size2,
            kept,
            batches,
            plain,
            inner,
            first_s,
            last_s,
            offset_r,
            r0,
            r1,
            r2,
            offset_c,
            c0,
            c1,
            c2,
            LEFT_CHECKS,
            RIGHT_CHECKS,
            LEFT_MODE0,
            LEFT_MODE1,
            LEFT_MODE2,
            RIGHT_MODE0,
            RIGHT_MODE1,
            RIGHT_MODE2,
            LEFT_UNIFORM,
            LEFT_BY_ROWS,
            RIGHT_UNIFORM,
            RIGHT_BY_ROWS,
            ROWS,
            COLUMNS,
            SUMS,
            STAGES,
            PRECISION,
            WIDEN,
        )
    total *= scale

    target = out + tl.load(out_b + kept)
    if not ATOMIC:
        target += split.to(tl.int64) * apart
    to_r = _entries(out_r, at_r, inside_r, rows, 0, -1)
    to_c = _entries(out_c, at_c, inside_c, columns, 0, -1)
    inside = (to_r >= 0)[:, None] & (to_c >= 0)[None, :]
    if REDUCE:
        value = tl.sum(tl.where(inside, total, 0.0))
        if ATOMIC:
            tl.atomic_add(target, value, sem="relaxed")
        else:
            tl.store(target + tile, value)
    else:
        where = target + to_r[:, None] + to_c[None, :]
        if ATOMIC:
            tl.atomic_add(where, total, mask=inside, sem="relaxed")
        else:
            tl.store(where, total, mask=inside)
        if GRAM:  # noqa: SIM102  (GRAM is known to the compiler, the tiles are not)
            if tile_r != tile_c:
                mirror_r = _entries(out_r, at_c, inside_c, rows, 0, -1)
                mirror_c = _entries(out_c, at_r, inside_r, columns, 0, -1)
                where = target + mirror_r[:, None] + mirror_c[None, :]
                inside = (mirror_r >= 0)[:, None] & (mirror_c >= 0)[None, :]
                if ATOMIC:
                    tl.atomic_add(where, tl.trans(total), mask=inside, sem="relaxed")
                else:
                    tl.store(where, tl.trans(total), mask=inside)
