"""Texts whose layers forget: a window's keys, or states that each token changes as a whole. What they hold at the ends of some
blocks is stored with those blocks, and a text begins where one of them is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from transformers import DynamicCache

from rabbit_engine.prefixes import Prefix
from rabbit_engine.transformers_bridge.block_ends import blocks_seen, is_state, layer_of, put_ends
from rabbit_engine.transformers_bridge.caches import adds_in_place, put_states, state_layers, windows_of

DeviceOf = Callable[[int], torch.device]
"""Where the states of a layer are put."""

_FIRST_DOUBLED = 4
"""Blocks before the first of the ends that are kept at a guess: less is soon computed."""

_NOTHING = "nothing"
"""What a block has whose layers have no keys, where no states are kept: it says that the text was seen up to its end."""


def choose_ends(begun: int, found: int, stop: int, *, few: bool = False) -> list[int]:
    """At how many blocks to keep what layers forget of a text, the most useful first, if its first `begun` blocks were read, its
    first `found` are stored and up to `stop` will be.

    The last, where the next turn of a conversation continues; where the text leaves those before it, as others may too; and at a
    guess at each doubling, so that at most half of what texts share is computed again, for few copies. `few`: without guesses.
    """
    doubled = [] if few else [_FIRST_DOUBLED << power for power in range(stop.bit_length())]
    wanted = dict.fromkeys([stop, found, *reversed(doubled)])
    return [end for end in wanted if begun < end <= stop]


def groups_of(states: Mapping[str, torch.Tensor], windows: Mapping[int, int | None]) -> dict[str, list[torch.Tensor]]:
    """Tensors of one shape and use together: not all are read again."""
    alike: dict[object, list[str]] = {}
    for name, tensor in states.items():
        use = "state" if is_state(name) else windows.get(layer_of(name))
        alike.setdefault((use, tensor.shape, tensor.dtype), []).append(name)
    return {" ".join(names): [states[name] for name in names] for names in alike.values()} or {_NOTHING: [torch.zeros(1)]}


def restorable(cache: DynamicCache, prefix: Prefix) -> int:
    """After how many blocks of `prefix` all is stored that a new cache holds there. Reads headers from the last block on."""
    needs = _Needs(cache, prefix.block_tokens)
    return next((count for count in range(len(prefix), 0, -1) if needs.are_met(prefix, count)), 0)


def restore(cache: DynamicCache, prefix: Prefix, device_of: DeviceOf) -> int:
    """Let a new cache be as after the last block of `prefix`, or after as many as are `restorable` if one turns out to be damaged
    or was deleted meanwhile; after how many blocks that is."""
    needs = _Needs(cache, prefix.block_tokens)
    while len(prefix):
        came = _fill(cache, prefix, needs, device_of)
        if came == len(prefix):
            break
        prefix = prefix.cut(came)
        prefix = prefix.cut(restorable(cache, prefix))
    return len(prefix)


class _Needs:
    """What a cache takes from blocks."""

    def __init__(self, cache: DynamicCache, block_tokens: int) -> None:
        windows = windows_of(cache)
        self._windows = {layer: window for layer, window in windows.items() if window is not None}
        self._growing = windows.keys() - self._windows.keys()
        self._states, self._size = state_layers(cache), block_tokens

    def are_met(self, prefix: Prefix, count: int) -> bool:
        """Whether all that is needed after `count` blocks is stored."""
        last = _names(prefix, count - 1)
        if not last.issuperset(f"{layer}.keys" for layer in self._growing):
            return False
        if not all(any(is_state(name) and layer_of(name) == layer for name in last) for layer in self._states):
            return False
        needed = [(block, f"{layer}.keys") for layer, w in self._windows.items() for block in blocks_seen(count, w, self._size)]
        names = {block: _names(prefix, block) for block in {block for block, _ in needed}}
        return bool(last) and all(name in names[block] for block, name in needed)

    def has(self, count: int, block: int, name: str) -> bool:
        """Whether a block's tensor is needed after `count` blocks."""
        if name == _NOTHING:
            return False
        if is_state(name):
            return block == count - 1
        window = self._windows.get(layer_of(name))
        return window is None or block in blocks_seen(count, window, self._size)

    def is_kept_whole(self, name: str) -> bool:
        """Whether a layer has the tensor of every block."""
        return not is_state(name) and layer_of(name) not in self._windows


def _names(prefix: Prefix, block: int) -> set[str]:
    return {name for names in prefix.names(block) for name in names.split()}


def _fill(cache: DynamicCache, prefix: Prefix, needs: _Needs, device_of: DeviceOf) -> int:
    """Put all blocks of `prefix` into a new cache; how many came. Nothing of fewer."""
    count, size = len(prefix), prefix.block_tokens
    whole: dict[str, torch.Tensor] = {}
    ends: dict[str, list[torch.Tensor]] = {}
    came, adds = 0, adds_in_place(cache)

    def wanted(block: int, names: str) -> bool:
        return any(needs.has(count, block, name) for name in names.split())

    for block in prefix.blocks(wanted=wanted):
        named = [(name, states) for names, group in block.items() for name, states in zip(names.split(), group, strict=True)]
        for name, states in named:
            if not needs.is_kept_whole(name):
                ends.setdefault(name, []).append(states)
        grown = {name: states for name, states in named if needs.is_kept_whole(name)}
        if adds:
            put_states(cache, {name: states[None].to(device_of(layer_of(name))) for name, states in grown.items()})
        else:
            _copy_at(whole, grown, came * size, prefix.tokens, device_of)
        came += 1
    if came == count:
        put_states(cache, whole)
        put_ends(cache, prefix.tokens, {name: _joined(name, parts).to(device_of(layer_of(name))) for name, parts in ends.items()})
    elif adds:
        cache.reset()
    return came


def _copy_at(
    whole: dict[str, torch.Tensor], grown: Mapping[str, torch.Tensor], at: int, tokens: int, device_of: DeviceOf
) -> None:
    """Copy the tensors of a block [heads, tokens, width] to where they are among those of all `tokens`."""
    for name, states in grown.items():
        if name not in whole:
            heads, _, width = states.shape
            whole[name] = torch.empty(1, heads, tokens, width, dtype=states.dtype, device=device_of(layer_of(name)))
        whole[name][0, :, at : at + states.shape[1]] = states


def _joined(name: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[-1][None].clone() if is_state(name) else torch.cat(list(parts), dim=1)[None]
