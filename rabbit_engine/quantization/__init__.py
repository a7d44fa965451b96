"""Encodings of weights: how each is recognised in a checkpoint, and decoded as transformers dequantises it."""

from rabbit_engine.quantization.cast import Cast
from rabbit_engine.quantization.fp8 import Fp8Blocks, fp8_entry
from rabbit_engine.quantization.mxfp4 import Mxfp4, mxfp4_entry

__all__ = ["Cast", "Fp8Blocks", "Mxfp4", "fp8_entry", "mxfp4_entry"]
