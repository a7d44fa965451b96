"""Encodings of weights: how each is recognised in a checkpoint, and decoded as transformers dequantises it.

To add one: a class with `decode` and a function that makes an entry of what is stored, in a file of its own; its method in
`_MAKERS`; and a row of `FORMATS` in `transformers_bridge/quantizers.py`, which names the tensors of a weight.
"""

from collections.abc import Callable, Mapping

import torch

from rabbit_engine.quantization.cast import Cast
from rabbit_engine.quantization.fp8 import Fp8Blocks, fp8_entry
from rabbit_engine.quantization.mxfp4 import Mxfp4, mxfp4_entry
from rabbit_engine.storage.tensorfiles import TensorEntry

Maker = Callable[[str, torch.dtype, Mapping[str, TensorEntry]], TensorEntry | str]

_MAKERS: Mapping[str, Maker] = {"fp8": fp8_entry, "mxfp4": mxfp4_entry}


def decoded_entry(method: str, name: str, dtype: torch.dtype, stored: Mapping[str, TensorEntry]) -> TensorEntry | str:
    """The weight `name` that the tensors `stored` for it decode to in `dtype`, or the reason why they cannot be decoded here.

    They are named by their roles in the method's row of `FORMATS`.
    """
    if "values" not in stored:
        return f"only its {' and '.join(stored)} are stored"
    return _MAKERS[method](name, dtype, stored)


__all__ = ["Cast", "Fp8Blocks", "Mxfp4", "decoded_entry", "fp8_entry", "mxfp4_entry"]
