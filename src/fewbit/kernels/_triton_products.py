"""Products of packed weights in Triton's language; imported only where Triton is there (see triton.py)."""

# Triton reads annotations as they are written: no postponed ones here
import triton
import triton.language as tl


@triton.jit
def weights(
    packed, scale, offset, row, first, rows, columns, words, groups, span, centre,
    BITS: tl.constexpr, KIND: tl.constexpr, WHOLE: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Rows x COLUMNS columns from `first` on in float32, zeros outside of the matrix.

    WHOLE: a word holds whole codes of one group. It is then loaded once, and else for each of its codes.
    """
    PER: tl.constexpr = 32 // BITS if WHOLE else 1
    column = first + tl.arange(0, COLUMNS // PER) * PER
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    there = row.to(tl.int64)[:, None]
    bit = column * BITS
    place = packed + there * words + (bit // 32)[None, :]
    code = tl.load(place, mask=inside, other=0).to(tl.uint32, bitcast=True)
    group = there * groups + (column // span)[None, :]
    s = tl.load(scale + group, mask=inside, other=0.0).to(tl.float32)
    o = tl.zeros_like(s)
    if KIND > 0:
        o = tl.load(offset + group, mask=inside, other=0).to(tl.float32)
    if WHOLE:
        at = (tl.arange(0, PER) * BITS).to(tl.uint32)
        code = code[:, :, None] >> at[None, None, :]
        s, o = s[:, :, None], o[:, :, None]
    else:
        at = (bit % 32).to(tl.uint32)[None, :]
        # a code may run on in the next word
        over = inside & (at + BITS > 32)
        rest = tl.load(place + 1, mask=over, other=0).to(tl.uint32, bitcast=True)
        code = (code >> at) | tl.where(over, rest << ((32 - at) % 32), 0)
    level = (code & ((1 << BITS) - 1)).to(tl.float32)
    if KIND == 0:
        w = (level - centre) * s
    elif KIND == 1:
        w = (level - o) * s
    else:
        w = level * s + o
    return tl.reshape(w, (row.shape[0], COLUMNS))


@triton.jit
def few(
    x, out, stride, packed, scale, offset, rows, columns, words, groups, span, centre,
    BITS: tl.constexpr, KIND: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """One token by ROWS rows, sums in float32."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1).to(tl.int64)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, columns, COLUMNS):
        w = weights(
            packed, scale, offset, row, first, rows, columns, words, groups, span, centre, BITS, KIND, WHOLE, COLUMNS
        )
        column = first + tl.arange(0, COLUMNS)
        part = tl.load(x + token * columns + column, mask=column < columns, other=0.0)
        total += tl.sum(w * part[None, :], 1)
    tl.store(out + token * stride + row, total, mask=row < rows)


@triton.jit
def expand(
    out, from_row, packed, scale, offset, rows, columns, words, groups, span, centre,
    BITS: tl.constexpr, KIND: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Rows from `from_row` on, written out as float32."""
    here = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, first = from_row + here, tl.program_id(1) * COLUMNS
    w = weights(
        packed, scale, offset, row, first, rows, columns, words, groups, span, centre, BITS, KIND, WHOLE, COLUMNS
    )
    column = first + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out + here.to(tl.int64)[:, None] * columns + column[None, :], w, mask=inside)
