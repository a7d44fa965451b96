"""Encodings of weights: how each is recognised in a checkpoint, and decoded as its own reference decoder does.

To add one that transformers undoes: a class with `decode` and a function that makes an entry of what is stored, in a file of its
own; its method in `_MAKERS`; and a row of `FORMATS` in `transformers_bridge/quantizers.py`, which names the tensors of a weight.
To add one that only its own package undoes: the class, and a function that opens the format from a `quantization_config`
(`format.py`); its method in `_PACKED`, and in `PACKED_METHODS` of `transformers_bridge/quantizers.py`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from rabbit_engine.quantization.awq import Awq, open_awq
from rabbit_engine.quantization.bitsandbytes import Blocks4bit, Int8Rows, open_bitsandbytes
from rabbit_engine.quantization.cast import Cast
from rabbit_engine.quantization.compressed_tensors import ScaledBlocks, open_compressed_tensors
from rabbit_engine.quantization.format import UNUSED, PackedFormat, ShapeOf, StoredWeight
from rabbit_engine.quantization.fp8 import Fp8Blocks, fp8_entry
from rabbit_engine.quantization.gptq import Gptq, open_gptq
from rabbit_engine.quantization.linears import Linears
from rabbit_engine.quantization.mxfp4 import Mxfp4, mxfp4_entry
from rabbit_engine.storage.jsonvalues import Fields
from rabbit_engine.storage.tensorfiles import TensorEntry

Block = tuple[int, int]
Maker = Callable[[str, torch.dtype, Mapping[str, TensorEntry], Block | None], TensorEntry | str]

_MAKERS: Mapping[str, Maker] = {"fp8": fp8_entry, "mxfp4": lambda name, dtype, stored, _: mxfp4_entry(name, dtype, stored)}

_PACKED: Mapping[str, Callable[[Fields], PackedFormat]] = {
    "bitsandbytes": open_bitsandbytes,
    "gptq": open_gptq,
    "awq": open_awq,
    "compressed-tensors": open_compressed_tensors,
}


def decoded_entry(
    method: str, name: str, dtype: torch.dtype, stored: Mapping[str, TensorEntry], block: Block | None = None
) -> TensorEntry | str:
    """The weight `name` that the tensors `stored` for it decode to in `dtype`, or the reason why they cannot be decoded here.

    They are named by their roles in the method's row of `FORMATS`. `block` is the number of rows and columns that the config says
    for a scale.
    """
    if "values" not in stored:
        return f"only its {' and '.join(stored)} are stored"
    return _MAKERS[method](name, dtype, stored, block)


def open_packed(method: str, config: Mapping[str, Any]) -> PackedFormat | None:
    """The format of a checkpoint with this `quantization_config`; None if transformers undoes it.

    Raises CompressionUnavailableError for a variant that is not supported, ValueError for values of wrong types.
    """
    return _PACKED[method](Fields.of(dict(config), "quantization_config")) if method in _PACKED else None


__all__ = [
    "UNUSED",
    "Awq",
    "Blocks4bit",
    "Cast",
    "Fp8Blocks",
    "Gptq",
    "Int8Rows",
    "Linears",
    "Mxfp4",
    "PackedFormat",
    "ScaledBlocks",
    "ShapeOf",
    "StoredWeight",
    "decoded_entry",
    "fp8_entry",
    "mxfp4_entry",
    "open_packed",
]
