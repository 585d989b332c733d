"""Products of packed weights in Triton's language; imported only where Triton is there (see triton.py)."""

# Triton reads annotations as they are written: no postponed ones here
import triton
import triton.language as tl


@triton.jit
def weights(
    packed, scale, offset, row, column, rows, columns, words, groups, span, centre,
    BITS: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """Rows x columns of a matrix in float32, zeros outside of it."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    there = row.to(tl.int64)[:, None]
    bit = column * BITS
    at = (bit % 32).to(tl.uint32)[None, :]
    place = packed + there * words + (bit // 32)[None, :]
    code = tl.load(place, mask=inside, other=0).to(tl.uint32, bitcast=True) >> at
    if 32 % BITS != 0:
        # a code that runs on in the next word
        over = inside & (at + BITS > 32)
        rest = tl.load(place + 1, mask=over, other=0).to(tl.uint32, bitcast=True)
        code |= tl.where(over, rest << ((32 - at) % 32), 0)
    level = (code & ((1 << BITS) - 1)).to(tl.float32)
    group = there * groups + (column // span)[None, :]
    s = tl.load(scale + group, mask=inside, other=0.0).to(tl.float32)
    if KIND == 0:
        return (level - centre) * s
    o = tl.load(offset + group, mask=inside, other=0).to(tl.float32)
    if KIND == 1:
        return (level - o) * s
    return level * s + o


@triton.jit
def few(
    x, packed, scale, offset, out, stride, rows, columns, words, groups, span, centre,
    BITS: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """One token by ROWS rows, sums in float32."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1).to(tl.int64)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        w = weights(packed, scale, offset, row, column, rows, columns, words, groups, span, centre, BITS, KIND)
        part = tl.load(x + token * columns + column, mask=column < columns, other=0.0)
        total += tl.sum(w * part[None, :], 1)
    tl.store(out + token * stride + row, total, mask=row < rows)


@triton.jit
def many(
    x, packed, scale, offset, out, stride, tokens, rows, columns, words, groups, span, centre,
    BITS: tl.constexpr, KIND: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """TOKENS tokens by ROWS rows, factors rounded to tf32 (a half's precision with a float's range)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    there = token.to(tl.int64)[:, None]
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        w = weights(packed, scale, offset, row, column, rows, columns, words, groups, span, centre, BITS, KIND)
        inside = (token < tokens)[:, None] & (column < columns)[None, :]
        part = tl.load(x + there * columns + column[None, :], mask=inside, other=0.0)
        total = tl.dot(part, tl.trans(w), total, input_precision="tf32")
    inside = (token < tokens)[:, None] & (row < rows)[None, :]
    tl.store(out + there * stride + row[None, :], total, mask=inside)
