"""QTensor, the one value that crosses every seam."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class QTensor:
    """A weight as it is stored: a format's spelling, its logical shape and its parts.

    spec   a format spec string (`int4g64`, `gguf:q4_1`, `bf16`), understood by `formats.parse`
    shape  logical shape: (out, in), (experts, out, in), or (n,) for norms and biases
    parts  tensors named by the format; `formats.parse(spec).layout(shape, dtype)` lists them
    """

    spec: str
    shape: tuple[int, ...]
    parts: dict[str, Tensor] = field(repr=False)

    def __post_init__(self) -> None:
        if not self.shape or any(n <= 0 for n in self.shape):
            raise ValueError(f"a QTensor needs a shape of positive sizes, got {self.shape}")

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(p.numel() * p.element_size() for p in self.parts.values())

    @property
    def numel(self) -> int:
        """Number of logical weights."""
        count = 1
        for n in self.shape:
            count *= n
        return count
