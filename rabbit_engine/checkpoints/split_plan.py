"""Plans which tensors go into which shard, which are shared, and the disk space needed. Pure: names and byte counts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One shard: the checkpoint's keys it is made from, the files that hold them, and its approximate size."""

    name: str
    keys: tuple[str, ...]
    files: frozenset[str]
    file_bytes: int


@dataclass(frozen=True, slots=True)
class Ties:
    """`shared` maps a weight to the stored one it shares; `dropped` are weights whose stored copies are not needed."""

    shared: Mapping[str, str]
    dropped: frozenset[str]


def settle_ties(tied: Mapping[str, str], present: frozenset[str], equal: Callable[[str, str], bool]) -> Ties:
    """Decide, as transformers does, which of the model's tied pairs (target -> source) are tied in this checkpoint.

    Where both are stored they are tied only if `equal(target, source)`; where only the target is stored, the source
    shares it.
    """
    shared: dict[str, str] = {}
    dropped: set[str] = set()
    for target, source in tied.items():
        if source in present and target in present:
            if equal(target, source):
                shared[target] = source
                dropped.add(target)
        elif source in present:
            shared[target] = source
        elif target in present:
            shared[source] = target
        else:
            _tie_to_sibling(target, source, tied, present, shared)
    return Ties(shared, frozenset(dropped))


def _tie_to_sibling(target: str, source: str, tied: Mapping[str, str], present: frozenset[str], shared: dict[str, str]) -> None:
    """Handle three weights tied to one source, where the stored one is not part of this pair."""
    sibling = next((other for other, its_source in tied.items() if its_source == source and other in present), None)
    if sibling is not None:
        shared[target] = sibling


def tied_together(tied: Mapping[str, str]) -> dict[str, set[str]]:
    """weight -> all weights that share its values through tied pairs (target -> source), including itself."""
    groups: dict[str, set[str]] = {}
    for target, source in tied.items():
        group = groups.get(target, {target}) | groups.get(source, {source})
        groups.update(dict.fromkeys(group, group))
    return groups


def stored_separately(ties: Ties, weight: str) -> tuple[Ties, dict[str, str]]:
    """The ties without those of `weight`, which is stored in another form than the weights it shares values with.

    The second value maps a weight that is to be stored, but has no tensor of its own, to the one that has its values.
    """
    stored = ties.shared.get(weight)
    sharers = [target for target, source in ties.shared.items() if source == weight]
    if stored is not None:
        alone, source = weight, stored
    elif sharers:
        alone, source = sharers[0], weight
    else:
        return ties, {}
    shared = {target: alone if its_source == weight else its_source for target, its_source in ties.shared.items()}
    del shared[alone]
    return Ties(shared, ties.dropped - {alone}), {} if alone in ties.dropped else {alone: source}


def plan_shards(
    shard_names: Sequence[str],
    places: Iterable[tuple[str, str]],
    files_of_key: Mapping[str, frozenset[str]],
    bytes_of_shard: Mapping[str, int],
) -> tuple[ShardPlan, ...]:
    """The shards in the order of a pass, without empty ones. `places` are (key, shard): a key may go into several."""
    keys: dict[str, list[str]] = {name: [] for name in shard_names}
    for key, shard in places:
        keys[shard].append(key)
    return tuple(
        ShardPlan(name, tuple(found), frozenset().union(*(files_of_key[key] for key in found)), bytes_of_shard[name])
        for name, found in keys.items()
        if found
    )


def files_done_after(plans: Sequence[ShardPlan]) -> dict[str, list[str]]:
    """shard -> the original files that are no longer needed after it."""
    last = {file: plan.name for plan in plans for file in plan.files}
    done: dict[str, list[str]] = {plan.name: [] for plan in plans}
    for file, shard in sorted(last.items()):
        done[shard].append(file)
    return done


def peak_extra_bytes(plans: Sequence[ShardPlan], finished: frozenset[str], freed_bytes: Mapping[str, int]) -> int:
    """The most disk space that the split will need beyond what is used now.

    `freed_bytes` holds the size of each original that is deleted once its last shard is written; empty to keep them.
    """
    done, extra, peak = files_done_after(plans), 0, 0
    for plan in plans:
        if plan.name not in finished:
            extra += plan.file_bytes
            peak = max(peak, extra)
        extra -= sum(freed_bytes.get(file, 0) for file in done[plan.name])
    return peak


def missing_weights(
    expected: Iterable[str], stored: Iterable[str], shared: Mapping[str, str], ignored: Iterable[str]
) -> list[str]:
    """Weights of the model that the checkpoint neither stores nor shares, except those that may be missing."""
    patterns = [re.compile(pattern) for pattern in ignored]
    absent = set(expected) - set(stored) - set(shared)
    return sorted(name for name in absent if not any(p.search(name) for p in patterns))
