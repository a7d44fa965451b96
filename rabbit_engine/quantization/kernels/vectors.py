"""Vectors of 16 numbers of 32 bits, and the instructions that multiply bytes, for kernels: numba itself has neither.

LLVM keeps a vector in one register of AVX512, or in two of AVX2. Products of bytes are those of VNNI where a processor has them.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

from llvmlite import ir
from numba import config, extending, types
from numba.core import cgutils, codegen
from numba.extending import models, register_model

intrinsic: Any = extending.intrinsic  # typed as what defines an operation, not as what kernels call

LANES = 16
"""Numbers of a vector."""

_INT32, _FLOAT32 = ir.IntType(32), ir.FloatType()
_INTEGERS, _FLOATS = ir.VectorType(_INT32, LANES), ir.VectorType(_FLOAT32, LANES)
_HALVES = ir.VectorType(_INT32, LANES // 2)


class _Vector(types.Type):
    """numba's type of a vector."""


class _Integers(_Vector):
    """int32, also as four bytes each."""


class _Floats(_Vector):
    """float32."""


integers, floats = _Integers("16 int32"), _Floats("16 float32")


@register_model(_Integers)
class _IntegersModel(models.PrimitiveModel):
    def __init__(self, manager: Any, type_: Any) -> None:
        super().__init__(manager, type_, _INTEGERS)


@register_model(_Floats)
class _FloatsModel(models.PrimitiveModel):
    def __init__(self, manager: Any, type_: Any) -> None:
        super().__init__(manager, type_, _FLOATS)


def can_multiply_bytes() -> bool:
    """Whether `multiply_add` has instructions here: those of AVX2 or of VNNI."""
    return _has("avx2")


def _has(feature: str) -> bool:
    """Whether numba compiles for a processor with a feature. LLVM ends the process at an instruction without its feature."""
    chosen: str | None = vars(config)["CPU_FEATURES"]
    return f"+{feature}" in (codegen.get_host_cpu_features() if chosen is None else chosen).split(",")


def _operation(result: types.Type, *operands: types.Type) -> Callable[[Callable[..., Any]], Any]:
    """Let kernels call `generate(builder, *operands)`, which returns a value of LLVM's: what it computes."""

    def decorate(generate: Callable[..., Any]) -> Any:
        def generate_call(context: Any, builder: Any, typed: Any, values: Any) -> Any:
            del context, typed
            return generate(builder, *values)

        def operation(*context_and_types: Any) -> Any:
            del context_and_types
            return result(*operands), generate_call

        vars(operation)["__signature__"] = signature(generate)  # of as many operands
        return intrinsic(operation)

    return decorate


@intrinsic
def load(context: Any, array: Any, index: Any) -> Any:
    """64 bytes of a contiguous uint8 array from `index`, as integers."""
    del context, index

    def generate(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        del typed
        return _load(builder, _pointer(context, builder, array, _INTEGERS, *values))

    return integers(array, types.intp), generate


@intrinsic
def store(context: Any, numbers: Any, array: Any, index: Any) -> Any:
    """Write floats to a contiguous float32 array from `index`."""
    del context, index

    def generate(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        del typed
        pointer = _pointer(context, builder, array, _FLOATS, *values[1:])
        builder.store(values[0], pointer).align = 1
        return context.get_dummy_value()

    return types.void(numbers, array, types.intp), generate


@intrinsic
def load_pairs(context: Any, array: Any, index: Any) -> Any:
    """16 pairs of floats from `index` of a contiguous array of their bits (see floats.py): the first ones, the second ones."""
    del context, index

    def generate(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        split = _SPLITS[array.dtype]
        both = split(builder, lambda type_: _load(builder, _pointer(context, builder, array, type_, *values)))
        return context.make_tuple(builder, typed.return_type, both)

    return types.Tuple((floats, floats))(array, types.intp), generate


def _split_bfloat16(builder: Any, load: Callable[[Any], Any]) -> tuple[Any, Any]:
    """The bits of a bfloat16 are the high bits of a float32."""
    pairs = load(_INTEGERS)
    first = builder.shl(pairs, ir.Constant(_INTEGERS, [16] * LANES))
    second = builder.and_(pairs, ir.Constant(_INTEGERS, [-(2**16)] * LANES))
    return builder.bitcast(first, _FLOATS), builder.bitcast(second, _FLOATS)


def _split_float16(builder: Any, load: Callable[[Any], Any]) -> tuple[Any, Any]:
    first, second = _every_second(builder, load(ir.VectorType(ir.HalfType(), 2 * LANES)))
    return builder.fpext(first, _FLOATS), builder.fpext(second, _FLOATS)


def _split_float32(builder: Any, load: Callable[[Any], Any]) -> tuple[Any, Any]:
    return _every_second(builder, load(ir.VectorType(_FLOAT32, 2 * LANES)))


def _every_second(builder: Any, pairs: Any) -> tuple[Any, Any]:
    lanes = (ir.Constant(_INTEGERS, list(range(first, 2 * LANES, 2))) for first in (0, 1))
    first, second = (builder.shuffle_vector(pairs, ir.Constant(pairs.type, ir.Undefined), some) for some in lanes)
    return first, second


_SPLITS = {types.uint16: _split_bfloat16, types.int16: _split_float16, types.uint32: _split_float32}


@_operation(integers, integers)
def low_nibbles(builder: Any, codes: Any) -> Any:
    """The low four bits of each byte."""
    return builder.and_(codes, ir.Constant(_INTEGERS, [0x0F0F0F0F] * LANES))


@_operation(integers, integers)
def high_nibbles(builder: Any, codes: Any) -> Any:
    """The high four bits of each byte."""
    shifted = builder.lshr(codes, ir.Constant(_INTEGERS, [4] * LANES))
    return builder.and_(shifted, ir.Constant(_INTEGERS, [0x0F0F0F0F] * LANES))


@_operation(integers, types.int32)
def all_integers(builder: Any, value: Any) -> Any:
    """An int32 in every lane."""
    return _splat(builder, value, _INTEGERS)


@_operation(floats)
def no_floats(builder: Any) -> Any:
    """Zeros."""
    del builder
    return ir.Constant(_FLOATS, [0.0] * LANES)


@_operation(floats, floats, floats, integers, types.float32)
def add_product(builder: Any, total: Any, factors: Any, whole: Any, number: Any) -> Any:
    """`total` plus floats times integers times a float32."""
    product = builder.fmul(builder.sitofp(whole, _FLOATS), factors)
    return _call(builder, f"llvm.fma.v{LANES}f32", _FLOATS, product, _splat(builder, number, _FLOATS), total)


@_operation(floats, floats, floats, types.float32)
def add_scaled(builder: Any, total: Any, factors: Any, number: Any) -> Any:
    """`total` plus floats times a float32."""
    return _call(builder, f"llvm.fma.v{LANES}f32", _FLOATS, factors, _splat(builder, number, _FLOATS), total)


@_operation(integers, integers, integers, types.int32)
def multiply_add(builder: Any, total: Any, codes: Any, four: Any) -> Any:
    """`total` plus, in each lane, the products of its four bytes, from 0 to 127, with the four int8 of the int32 `four`."""
    numbers = _splat(builder, four, _INTEGERS)
    if _has("avx512vnni"):
        return _call(builder, "llvm.x86.avx512.vpdpbusd.512", _INTEGERS, total, codes, numbers)
    half = _add_with_vnni if _has("avxvnni") else _add_with_avx2
    return _in_halves(builder, half, total, codes, numbers)


def _add_with_vnni(builder: Any, total: Any, codes: Any, numbers: Any) -> Any:
    return _call(builder, "llvm.x86.avx512.vpdpbusd.256", _HALVES, total, codes, numbers)


def _add_with_avx2(builder: Any, total: Any, codes: Any, numbers: Any) -> Any:
    """Two products are added in 16 bits, where those of nibbles and int8 always fit."""
    bytes_, words = ir.VectorType(ir.IntType(8), 32), ir.VectorType(ir.IntType(16), 16)
    operands = (builder.bitcast(some, bytes_) for some in (codes, numbers))
    pairs = _call(builder, "llvm.x86.avx2.pmadd.ub.sw", words, *operands)
    return builder.add(total, _call(builder, "llvm.x86.avx2.pmadd.wd", _HALVES, pairs, ir.Constant(words, [1] * 16)))


def _in_halves(builder: Any, function: Callable[..., Any], *vectors: Any) -> Any:
    """`function(builder, *halves)` for the first and the second half of each vector."""
    undefined = ir.Constant(_INTEGERS, ir.Undefined)
    found = []
    for first in (0, LANES // 2):
        lanes = ir.Constant(_HALVES, list(range(first, first + LANES // 2)))
        found.append(function(builder, *(builder.shuffle_vector(vector, undefined, lanes) for vector in vectors)))
    return builder.shuffle_vector(*found, ir.Constant(_INTEGERS, list(range(LANES))))


def _call(builder: Any, name: str, result: Any, *operands: Any) -> Any:
    """Call an instruction of LLVM's."""
    type_ = ir.FunctionType(result, [operand.type for operand in operands])
    return builder.call(cgutils.get_or_insert_function(builder.module, type_, name), operands)


def _splat(builder: Any, value: Any, type_: Any) -> Any:
    first = builder.insert_element(ir.Constant(type_, ir.Undefined), value, ir.Constant(_INT32, 0))
    return builder.shuffle_vector(first, ir.Constant(type_, ir.Undefined), ir.Constant(_INTEGERS, [0] * LANES))


def _pointer(context: Any, builder: Any, type_: Any, to: Any, array: Any, index: Any) -> Any:
    """To `array[index]`, as a pointer to `to`."""
    data = context.make_array(type_)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), to.as_pointer())


def _load(builder: Any, pointer: Any) -> Any:
    loaded = builder.load(pointer)
    loaded.align = 1
    return loaded
