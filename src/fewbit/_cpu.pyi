from typing import Any

# The native CPU kernels. Addresses are `Tensor.data_ptr()` of contiguous tensors; the callers check shapes and types.

class Matrix:
    def __init__(self, columns: int) -> None: ...
    def add_block(
        self,
        rows: int,
        span: int,
        code_bits: int,
        scale_type: int,
        zero: int,
        offset_type: int,
        super_span: int,
        super_type: int,
        levels: list[int],
    ) -> int: ...
    def allocate(self) -> None: ...
    def place_new(self, buffer: Any, offset: int, count: int) -> None: ...
    def place(self, buffer: Any, offset: int, count: int) -> None: ...
    def blocks(self) -> list[tuple[int, int, int, int, int, int, int, int, list[int]]]: ...
    def fill(
        self,
        block: int,
        first: int,
        count: int,
        codes: int,
        scales: int,
        offsets: int,
        scale_supers: int,
        offset_supers: int,
        /,
    ) -> None: ...
    def multiply(self, x: int, tokens: int, y: int, /) -> None: ...
    def rows(self, ids: int, count: int, y: int, /) -> bool: ...
    @property
    def row_count(self) -> int: ...
    @property
    def column_count(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

layout: int

def checksum(buffer: Any, offset: int, count: int) -> int: ...
def rms_norm(x: int, weight: int, y: int, tokens: int, n: int, eps: float, /) -> None: ...
def gated_silu(gate_up: int, y: int, tokens: int, n: int, /) -> None: ...
def rotate_append(
    q: int,
    q_stride: int,
    heads: int,
    k: int,
    k_stride: int,
    v: int,
    v_stride: int,
    kv_heads: int,
    cos: int,
    sin: int,
    slots: int,
    keys: int,
    values: int,
    half: bool,
    cache_rows: int,
    tokens: int,
    width: int,
    out: int,
    /,
) -> bool: ...
def attend(
    q: int,
    keys: int,
    values: int,
    half: bool,
    cache_rows: int,
    kv_heads: int,
    pages: int,
    pages_per_sequence: int,
    page_size: int,
    lengths: int,
    starts: int,
    sequences: int,
    tokens: int,
    heads: int,
    width: int,
    scale: float,
    out: int,
    /,
) -> int: ...
def read_all(data: int, count: int, /) -> int: ...
def dot_all(rounds: int, w: int, x: int, /) -> tuple[int, int]: ...
def set_threads(n: int) -> None: ...
def threads() -> int: ...
def instruction_sets() -> list[tuple[str, str]]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
