"""Lets transformers read a GGUF file quickly: the package gguf makes several arrays of numpy for every token."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

_lock = threading.RLock()

_STRING, _ARRAY = 8, 9


@contextmanager
def quick_reader(*, strings: bool = True) -> Iterator[None]:
    """Within the block the package gguf reads the values of an array together, and makes each map of names once, not for every
    module. Without `strings`, those in arrays are empty: a config needs only their number.

    Raises ImportError without the package.
    """
    package: Any = import_module("gguf")
    with _lock:
        usual = package.GGUFReader, package.get_tensor_name_map
        package.GGUFReader, package.get_tensor_name_map = _quick(package, strings), cache(package.get_tensor_name_map)
        try:
            yield
        finally:
            package.GGUFReader, package.get_tensor_name_map = usual


def _quick(package: Any, strings: bool) -> Any:
    class QuickReader(package.GGUFReader):  # type: ignore[misc]
        """Returns the same values as the usual reader; the parts of arrays are bytes and plain arrays."""

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
            kind, count = struct.unpack_from("<IQ", self.data, orig_offs) if raw_type == _ARRAY else (_ARRAY, 0)
            if kind == _ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)  # type: ignore[no-any-return]
            first = orig_offs + 12
            parts, end = self._texts(first, count) if kind == _STRING else self._numbers(first, count, kind)
            kinds = [package.GGUFValueType(found) for found in (_ARRAY, *([kind] if count else []))]
            return end - orig_offs, parts, list(range(count)), kinds

        def _numbers(self, place: int, count: int, kind: int) -> tuple[list[Any], int]:
            dtype = np.dtype(self.gguf_scalar_to_np[package.GGUFValueType(kind)])
            values = np.frombuffer(self.data, dtype, count, place)
            return list(values.reshape(count, 1)), place + values.nbytes

        def _texts(self, place: int, count: int) -> tuple[list[Any], int]:
            raw, found = memoryview(self.data), []
            for _ in range(count):
                (length,) = struct.unpack_from("<Q", raw, place)
                place += 8 + length
                found.append(bytes(raw[place - length : place]) if strings else b"")
            return found, place

    return QuickReader
