"""Learns the seconds that something takes as a function of its size: a pass by its rows, a draft by its nodes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

_MEMORY = 8
"""A bucket remembers about this many measurements, the newest most."""

_OUTLIER = 2.0
"""A measurement counts at most as this multiple of what its bucket expects: something else held the machine up."""


_NEAR = 4.0
"""Times a measured size, up to which another is near it."""

_CREDIBLE = 1.5
_FEW = 32
"""Trusted seconds are doubted if a few rows took this many times as long, or if more rows took less by that."""


@dataclass(slots=True)
class _Bucket:
    """Means of sizes from 2**k up to 2**(k + 1), and the number of the last measurement that they include."""

    size: float = 0.0
    seconds: float = 0.0
    count: int = 0
    newest: int = 0

    def add(self, size: int, seconds: float, now: int) -> None:
        if self.count > 1:
            seconds = min(seconds, _OUTLIER * self.seconds)
        elif _OUTLIER * seconds < self.seconds:
            self.count = 0  # the first one was a warm-up
        self.count = min(self.count + 1, _MEMORY)
        self.size += (size - self.size) / self.count
        self.seconds += (seconds - self.seconds) / self.count
        self.newest = now


class SecondsBySize:
    """Seconds for sizes from 1 up, a function that never falls.

    `shape` is what is known before the first measurement: how seconds grow with the size and, if `trusted`, how many they are.
    The measured points bend it: their ratios to it are interpolated and, if it `steepens`, extrapolated with their last slope.
    """

    def __init__(self, shape: Callable[[float], float], *, trusted: bool = False, steepens: bool = True) -> None:
        self._shape = shape
        self._steepens = steepens
        self._trusted = trusted
        self._buckets: dict[int, _Bucket] = {}
        self._count = 0
        self._sizes: list[float] = []
        self._ratios: list[float] = []
        self._arrange()

    def __len__(self) -> int:
        """Measurements so far."""
        return self._count

    @property
    def is_known(self) -> bool:
        """Whether `seconds` has anything to go by."""
        return bool(self._sizes)

    def add(self, size: int, seconds: float) -> None:
        """Learn from a measurement."""
        self._count += 1
        self._buckets.setdefault(_bucket_of(size), _Bucket()).add(size, seconds, self._count)
        self._arrange()

    def age(self, size: int) -> int | None:
        """Measurements since the last one of about that size; None before the first."""
        bucket = self._buckets.get(_bucket_of(size))
        return None if bucket is None else self._count - bucket.newest

    def seconds(self, size: float) -> float:
        """The expected seconds. Something must be known."""
        sizes, ratios = self._sizes, self._ratios
        after = bisect_left(sizes, size)
        if after == 0:
            return ratios[0] * self._shape(size)
        if len(sizes) == 1 or (size > sizes[-1] and not self._steepens):
            return ratios[-1] * self._shape(size)
        after = min(after, len(sizes) - 1)
        slope = (ratios[after] - ratios[after - 1]) / (sizes[after] - sizes[after - 1])
        if size > sizes[-1]:
            slope = max(slope, 0.0)
        return (ratios[after] + slope * (size - sizes[after])) * self._shape(size)

    def is_near(self, size: float) -> bool:
        """Whether other sizes tell roughly what it takes: a measured one close below, or one above that took little more."""
        if self._trusted:
            return True
        after = bisect_left(self._sizes, size)
        if after == 0 or size <= _NEAR * self._sizes[after - 1]:
            return True
        return after < len(self._sizes) and self.seconds(self._sizes[after]) <= 2 * self.seconds(self._sizes[after - 1])

    def hope(self, size: float) -> float:
        """The least seconds to hope for: those of a smaller size, as its shape grows, until this one is measured."""
        before = bisect_left(self._sizes, size) - 1
        if before < 0 or _bucket_of(size) in self._buckets:
            return self.seconds(size)
        return self._ratios[before] * self._shape(size)

    def count(self, size: int) -> int:
        """Measurements of about that size, as far as they are remembered."""
        bucket = self._buckets.get(_bucket_of(size))
        return 0 if bucket is None else bucket.count

    @property
    def needs_least(self) -> bool:
        """Whether size 1 must be measured: it never was, and there are no trusted seconds, or larger sizes took others."""
        if 0 in self._buckets:
            return False
        if not self._trusted or len(self._sizes) < 2:
            return not self._trusted
        return self._ratios[1] < 1 / _CREDIBLE or (self._sizes[1] <= _FEW and self._ratios[1] > _CREDIBLE)

    def _arrange(self) -> None:
        """Points in ascending order, whose seconds do not fall."""
        buckets = [self._buckets[key] for key in sorted(self._buckets)]
        seconds = _never_falling([(bucket.seconds, bucket.count) for bucket in buckets])
        self._sizes = [bucket.size for bucket in buckets]
        self._ratios = [value / self._shape(bucket.size) for value, bucket in zip(seconds, buckets, strict=True)]
        if self._trusted and 0 not in self._buckets:
            self._sizes.insert(0, 1.0)
            self._ratios.insert(0, 1.0)


def _bucket_of(size: float) -> int:
    return int(size).bit_length() - 1


def _never_falling(points: list[tuple[float, int]]) -> list[float]:
    """The closest sequence to (value, weight) points that does not fall, by least squares: pool adjacent violators."""
    pools: list[tuple[float, int, int]] = []
    for value, weight in points:
        length = 1
        while pools and pools[-1][0] > value:
            other, others_weight, others_length = pools.pop()
            value = (value * weight + other * others_weight) / (weight + others_weight)
            weight, length = weight + others_weight, length + others_length
        pools.append((value, weight, length))
    return [value for value, _, length in pools for _ in range(length)]
