"""Encodings of weights: how each is recognised in a checkpoint, and decoded as transformers dequantises it.

To add one: a class with `decode` and a function that makes an entry of what is stored, in a file of its own; its kind in
`_MAKERS`; and in `transformers_bridge/quantizers.py` the operation of transformers that it stands for.
"""

from collections.abc import Callable, Mapping

import torch

from rabbit_engine.quantization.cast import Cast
from rabbit_engine.quantization.fp8 import Fp8Blocks, fp8_entry
from rabbit_engine.quantization.mxfp4 import Mxfp4, mxfp4_entry
from rabbit_engine.storage.tensorfiles import TensorEntry

Maker = Callable[[str, torch.dtype, TensorEntry, TensorEntry | None], TensorEntry | str]

_MAKERS: Mapping[str, Maker] = {"fp8": fp8_entry, "mxfp4": mxfp4_entry}


def decoded_entry(kind: str, name: str, dtype: torch.dtype, values: TensorEntry, scales: TensorEntry | None) -> TensorEntry | str:
    """The weight `name` that `values` and their `scales` decode to in `dtype`; or why nothing here decodes them."""
    return _MAKERS[kind](name, dtype, values, scales)


__all__ = ["Cast", "Fp8Blocks", "Mxfp4", "decoded_entry", "fp8_entry", "mxfp4_entry"]
