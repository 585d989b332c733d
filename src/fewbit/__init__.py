"""fewbit: large language models in few bits, on the machine you own."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fewbit.errors import FewbitError

if TYPE_CHECKING:
    from fewbit.evaluator import evaluate
    from fewbit.exports import export
    from fewbit.qtensor import QTensor
    from fewbit.quantizer import quantize
    from fewbit.runtime.engine import load

    __version__: str

__all__ = ["FewbitError", "QTensor", "__version__", "evaluate", "export", "load", "quantize"]

# public names are imported at first use: `import fewbit` must not cost the seconds that torch does
_HOMES = {
    "evaluate": "fewbit.evaluator",
    "export": "fewbit.exports",
    "QTensor": "fewbit.qtensor",
    "quantize": "fewbit.quantizer",
    "load": "fewbit.runtime.engine",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("fewbit")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fewbit' has no attribute {name!r}")
