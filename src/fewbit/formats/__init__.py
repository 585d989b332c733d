"""What the bits mean and where they lie.

A format owns bits and knows no method: it fits parameters to weights, rounds weights to codes, gives codes their
value back, and packs both into the parts of a QTensor. Each module of this package has `parse(spec) -> Format | None`.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fewbit.errors import FewbitError
from fewbit.lookup import names
from fewbit.qtensor import QTensor

Params = dict[str, Tensor]
Shape = tuple[int, ...]
# part name -> (dtype, shape)
Layout = dict[str, tuple[torch.dtype, Shape]]


@dataclass(frozen=True)
class TwoLevel:
    """Scales, and maybe offsets, that are a whole number for each group times a float for several groups.

    scale    f16 or f32 [out, supers]; steps  uint8 or int8 [out, groups]: a scale is scale * step
    minimum  f16 [out, supers]; minimum_steps  uint8 [out, groups]: an offset is -(minimum * minimum_step)
    The products are exact in float32.
    """

    scale: Tensor
    steps: Tensor
    minimum: Tensor | None = None
    minimum_steps: Tensor | None = None

    def scales(self) -> Tensor:
        """float32 [out, groups]."""
        return _product(self.scale, self.steps)

    def offsets(self) -> Tensor | None:
        """float32 [out, groups], or None."""
        if self.minimum is None or self.minimum_steps is None:
            return None
        return _product(self.minimum, self.minimum_steps).neg_()


def _product(scale: Tensor, steps: Tensor) -> Tensor:
    groups = steps.reshape(*scale.shape, -1).float()
    return groups.mul_(scale.float()[..., None]).flatten(1)


@dataclass(frozen=True)
class Affine:
    """A matrix as `scale * code + offset` per group of `span` columns: what integer kernels multiply by.

    codes   uint8 [out, in]
    scale   bf16, f16 or f32 [out, groups], groups = ceil(in / span); the last group may be ragged
    zero    the code of value 0 where it is one constant for the whole matrix (then offset = -scale * zero), else None
    offset  float32 or float16 [out, groups] where `zero` is None
    span    columns that share a scale
    bits    codes are below 2**bits
    zeros   uint8 [out, groups] where offset = -scale * zeros in float32: the same in a quarter of the bytes
    two_level  the same scales and offsets, where they are products
    """

    codes: Tensor
    scale: Tensor
    zero: int | None
    offset: Tensor | None
    span: int
    bits: int
    zeros: Tensor | None = None
    two_level: TwoLevel | None = None


@dataclass(frozen=True)
class Tabled:
    """A matrix as `scale * levels[code]` per group of `span` columns: what kernels multiply by that look codes up.

    codes   uint8 [out, in], below 2**bits, of at most 4 bits
    levels  whole numbers from -127 to 127
    scale   bf16, f16 or f32 [out, groups]; two_level: the same, where they are products
    """

    codes: Tensor
    levels: tuple[int, ...]
    scale: Tensor
    span: int
    bits: int
    two_level: TwoLevel | None = None


@dataclass(frozen=True)
class Scaled:
    """Values as `scale[:, group] * levels`: what refining scales needs.

    levels  float32 [out, in]; scale  float32 [out, groups]; group  int64 [in], the group of each column
    limits  float32 [out, in or 1] pairs (low, high): the levels a weight could take
    """

    levels: Tensor
    scale: Tensor
    group: Tensor
    limits: tuple[Tensor, Tensor]


class Format(ABC):
    """One way to store a matrix in few bits. Instances are immutable and cheap."""

    spec: str
    # rows and columns that must be rounded jointly: (1, 1) for integers, (16, 16) for a trellis
    step: tuple[int, int] = (1, 1)

    @abstractmethod
    def accepts(self, shape: Shape) -> str | None:
        """None where a tensor of this shape can be stored, otherwise the reason in words."""

    @abstractmethod
    def layout(self, shape: Shape, dtype: torch.dtype) -> Layout:
        """Names, dtypes and shapes of the parts of a tensor of this shape; `dtype` is the scales' dtype."""

    @abstractmethod
    def unpack(self, q: QTensor) -> tuple[Tensor, Params]:
        """Codes and parameters as `value` takes them."""

    @abstractmethod
    def value(self, codes: Tensor, params: Params) -> Tensor:
        """The weights the codes stand for, float32 [out, in]."""

    @abstractmethod
    def take(self, q: QTensor, rows: Tensor) -> QTensor:
        """The tensor made of the given rows (int64 indices) in that order, still quantized."""

    def fit(
        self, w: Tensor, importance: Tensor | None = None, dtype: torch.dtype = torch.float32, search: bool = True
    ) -> Params:
        """Parameters for `w` (float32 [out, in]), already rounded to the dtype they are stored in.

        `importance` (float32 [in] or [out, in], not negative) weighs each squared error; `search=False` gives the
        textbook min/max map.
        """
        raise FewbitError(
            f"fewbit reads {self.spec} and does not write it.",
            f"{self.spec} has no rounding here.",
            "Quantize to an integer format such as int4g64.",
        )

    def round(self, w: Tensor, params: Params) -> Tensor:
        """The nearest code of each weight under `params`."""
        raise NotImplementedError(f"{self.spec} is read-only")

    def at(self, params: Params, columns: Tensor) -> tuple[Format, Params]:
        """This format on the given columns alone (int64 [n]), in that order: `round` and `value` of w[:, columns] under
        the returned format and parameters give what they give for the whole. Every parameter has one column a weight,
        so that it can be sliced like the weights. What methods that fix one column after the other need.
        """
        raise NotImplementedError(f"{self.spec} is read-only")

    def nearest(self, w: Tensor, params: Params) -> Tensor:
        """The value nearest to each weight: `value(round(w))`, in one go where that is faster."""
        return self.value(self.round(w, params), params)

    def scaled(self, codes: Tensor, params: Params) -> Scaled | None:
        """The values as scale x level, where the format is linear in its scales; None otherwise."""
        return None

    def with_scale(self, params: Params, scale: Tensor) -> Params:
        """Other scales, float32 [out, groups], rounded as `params["scale"]` is stored; never zero."""
        raise NotImplementedError(f"{self.spec} has no scales to replace")

    def pack(self, codes: Tensor, params: Params) -> QTensor:
        """Codes and parameters as stored parts; the inverse of `unpack`."""
        raise NotImplementedError(f"{self.spec} is read-only")

    def affine(self, q: QTensor) -> Affine | None:
        """The tensor as scale, code and offset, where the format is that simple; None otherwise."""
        return None

    def tabled(self, q: QTensor) -> Tabled | None:
        """The tensor as scale and a table of levels, where the format has one; None otherwise."""
        return None

    def dequantize(self, q: QTensor) -> Tensor:
        """float32 weights of the logical shape."""
        return self.value(*self.unpack(q)).reshape(q.shape)

    def nbytes(self, shape: Shape, dtype: torch.dtype) -> int:
        """Stored bytes of a tensor of this shape: the planner's and the writer's one arithmetic."""
        total = 0
        for part_dtype, part_shape in self.layout(shape, dtype).values():
            count = 1
            for n in part_shape:
                count *= n
            total += count * part_dtype.itemsize
        return total


@lru_cache(maxsize=256)
def parse(spec: str) -> Format:
    """The format a spec string names, such as `int4g64`, `int8`, `int4g32a`, `gguf:q4_1`, `bf16`."""
    for name in names(__name__):
        found: Format | None = importlib.import_module(f"{__name__}.{name}").parse(spec)
        if found is not None:
            return found
    raise FewbitError(
        f"{spec!r} is not a format.",
        "Formats: intN or intNgM or intNgMa with N from 2 to 8 bits and M columns a group (a: asymmetric); "
        "f32, f16, bf16; gguf:TYPE with a type of ggml such as q4_0, q6_k or iq4_xs (read only).",
        "Try int8, int4g64, int4g32 or int4g64a.",
    )
