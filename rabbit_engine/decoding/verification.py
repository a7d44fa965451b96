"""Runs guesses through a model with its cache: the inputs of the pass, the rows of its output, and the cache after it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from transformers import Cache, PretrainedConfig

from rabbit_engine.decoding.tree import ROOT, Tree
from rabbit_engine.transformers_bridge.caches import (
    States,
    copy_states,
    crop,
    keep,
    record_past,
    restore_states,
    windows_of,
)

Inputs = dict[str, Any]
Output = TypeVar("Output", bound=Mapping[str, Any])

_POSITIONS = ("position_ids", "cache_position")
"""Keywords [..., tokens] that count the text's tokens; the second is that of code for transformers 4."""

KINDS = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
"""Keywords [1, tokens] whose value for new text is that of the last token."""

PER_TOKEN = frozenset({"input_ids", "attention_mask", *_POSITIONS, *KINDS})
"""Keywords with a value for each token, which a verifier extends."""


class Verifier(ABC):
    """Verifies trees with one text's `cache`. Between passes the cache holds the text without its last token."""

    way: ClassVar[str]
    """What the record of classes and the log call it."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self._tree = Tree()

    def shaped(self, tree: Tree) -> Tree:
        """The part of a tree that one pass can verify."""
        return tree.likeliest_chain()

    @property
    def lag(self) -> int:
        """The number of tokens that the cache lacks besides the text's last."""
        return 0

    def inputs(self, given: Inputs, tree: Tree) -> Inputs:
        """The keywords of the pass that verifies `tree`, from those for the last token alone: the same if nothing changes."""
        self._tree = tree
        return self._inputs(given, tree) if tree or self.lag else given

    @abstractmethod
    def _inputs(self, given: Inputs, tree: Tree) -> Inputs:
        """See `inputs`."""

    @abstractmethod
    def settle(self, path: Sequence[int]) -> None:
        """After a pass: leave in the cache the text's last token of then, and the nodes of `path`."""

    @abstractmethod
    def finish(self) -> None:
        """After the last pass: let the cache forget again what its layers no longer see."""

    def _extended(self, given: Inputs, tokens: Sequence[int], positions: torch.Tensor) -> Inputs:
        """`given` with `tokens` after the text's last; `positions` [all tokens of the pass] count from that one."""
        ids: torch.Tensor = given["input_ids"]
        found = given | {"input_ids": torch.cat([ids, ids.new_tensor([tokens])], -1)}
        for name in _POSITIONS:
            if (place := given.get(name)) is not None:
                found[name] = place[..., -1:] + positions.to(place)
        if "logits_to_keep" in given:
            found["logits_to_keep"] = 1 + len(tokens)
        for name in KINDS:
            if (kinds := given.get(name)) is not None:
                found[name] = kinds[..., -1:].expand(*kinds.shape[:-1], len(positions))
        return found


class ChainVerifier(Verifier):
    """One guess after another, with a cache that can drop its newest positions: the mask is the model's own."""

    way = "chain"

    def __init__(self, cache: Cache) -> None:
        super().__init__(cache)
        self._stop_recording = record_past(cache)

    def _inputs(self, given: Inputs, tree: Tree) -> Inputs:
        return _longer_mask(self._extended(given, tree.tokens, torch.arange(1 + len(tree))), len(tree))

    def settle(self, path: Sequence[int]) -> None:
        """See `Verifier`."""
        crop(self.cache, len(self._tree) - len(path))
        self._tree = Tree()

    def finish(self) -> None:
        """See `Verifier`."""
        self._stop_recording()


class TreeVerifier(Verifier):
    """Whole trees, with a cache that can keep any of its newest positions: a mask [1, 1, queries, keys] says who sees whom."""

    way = "tree"

    def __init__(self, cache: Cache, config: PretrainedConfig, dtype: torch.dtype) -> None:
        super().__init__(cache)
        self._kinds = mask_kinds(windows_of(cache), getattr(config, "layer_types", None))
        self._dtype = dtype
        self._past = 0
        self._stop_recording = record_past(cache)

    def shaped(self, tree: Tree) -> Tree:
        """See `Verifier`."""
        return tree

    def _inputs(self, given: Inputs, tree: Tree) -> Inputs:
        self._past = int(self.cache.get_seq_length())
        depths = torch.tensor((0, *tree.depths))
        found = self._extended(given, tree.tokens, depths)
        visible = torch.ones(self._past, dtype=torch.bool)
        if (mask := given.get("attention_mask")) is not None:
            visible = mask[0, : self._past].bool().cpu()
        masks = {
            kind: additive(tree_mask(visible, tree, window), self._dtype).to(given["input_ids"].device)
            for kind, window in self._kinds.items()
        }
        found["attention_mask"] = masks if len(masks) > 1 else next(iter(masks.values()))
        return found

    def settle(self, path: Sequence[int]) -> None:
        """See `Verifier`."""
        if self._tree:
            keep(self.cache, self._past, [0, *(1 + node for node in path)])
        else:
            crop(self.cache, 0)  # sliding layers kept what they no longer see
        self._tree = Tree()

    def finish(self) -> None:
        """See `Verifier`."""
        self._stop_recording()


class CarryVerifier(Verifier):
    """Chains, with a cache that can only go back to a copy: tokens accepted meanwhile are computed again in the next pass."""

    way = "carry"

    def __init__(self, cache: Cache) -> None:
        super().__init__(cache)
        self._before: States | None = None
        self._given: Inputs = {}
        self._carried: list[int] = []
        """Tokens of the text that the cache does not hold, before its last one."""
        self._last = 0
        """The index in it of the token that the last pass was asked for."""

    @property
    def lag(self) -> int:
        """See `Verifier`."""
        return len(self._carried)

    def inputs(self, given: Inputs, tree: Tree) -> Inputs:
        """See `Verifier`."""
        self._given, self._before = given, copy_states(self.cache) if tree else None
        return super().inputs(given, tree)

    def _inputs(self, given: Inputs, tree: Tree) -> Inputs:
        return self._after(given, self._carried, tree.tokens)

    def _after(self, given: Inputs, carried: Sequence[int], tokens: Sequence[int]) -> Inputs:
        """`given`, for the text's last token, with tokens before and after it."""
        ids = torch.cat([given["input_ids"].new_tensor([carried]), given["input_ids"]], -1)
        positions = torch.arange(-len(carried), 1 + len(tokens))
        return _longer_mask(self._extended(given | {"input_ids": ids}, tokens, positions), len(tokens))

    def settle(self, path: Sequence[int]) -> None:
        """See `Verifier`."""
        if len(path) == len(self._tree):
            self._carried = []
        elif self._before is not None:
            restore_states(self.cache, self._before)
            self._last = len(self._carried)
            self._carried += [int(self._given["input_ids"][0, -1]), *(self._tree.tokens[node] for node in path)]
        self._tree, self._before = Tree(), None

    def catch_up(self) -> Inputs:
        """The keywords of a pass after which the cache lacks nothing but the text's last token."""
        return self._after(self._given, self._carried[: self._last], self._carried[self._last + 1 :])

    def finish(self) -> None:
        """See `Verifier`: nothing was recorded."""


def mask_kinds(windows: Mapping[int, int | None], layer_types: Sequence[str] | None) -> dict[str, int | None]:
    """The window of each kind of layer that needs a mask of its own, from the windows by layer; one kind if all see as far.

    Raises ValueError if layers of a kind differ: there is no mask for them.
    """
    if len(set(windows.values())) == 1:
        return {"": next(iter(windows.values()))}
    if layer_types is None:
        raise ValueError(f"layers see {sorted(set(windows.values()), key=str)} tokens, and the config does not say which")
    kinds: dict[str, int | None] = {}
    for index, window in windows.items():
        if kinds.setdefault(layer_types[index], window) != window:
            raise ValueError(f"layers of type {layer_types[index]!r} see {kinds[layer_types[index]]} and {window} tokens")
    return kinds


def tree_mask(visible: torch.Tensor, tree: Tree, window: int | None) -> torch.Tensor:
    """Which keys each query of a pass over the text's last token and a tree sees: bool [1 + nodes, kept + 1 + nodes].

    `visible` [past] are the positions in the cache that are not padding; a layer with a `window` keeps the last `window` - 1
    of them and sees `window` positions, its own included.
    """
    past = len(visible)
    kept = past if window is None else min(past, window - 1)
    depths = torch.tensor((0, *tree.depths))
    mask = torch.cat([visible[past - kept :].expand(len(depths), kept), _ancestors(tree)], -1)
    if window is not None:
        positions = torch.cat([torch.arange(-kept, 0), depths])
        mask = mask & (depths[:, None] - positions[None, :] < window)
    return mask


def _ancestors(tree: Tree) -> torch.Tensor:
    """Bool [1 + nodes, 1 + nodes]: each node sees itself, the nodes on its path, and the text's last token (the first)."""
    found = torch.eye(1 + len(tree), dtype=torch.bool)
    for node, parent in enumerate(tree.parents):
        found[1 + node] |= found[parent - ROOT]
    return found


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[1, 1, queries, keys]: 0 where the mask is set, else the least number of the dtype, as transformers' own masks."""
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)[None, None]


def _longer_mask(inputs: Inputs, count: int) -> Inputs:
    """With `count` more positions in the mask [1, tokens] of what is not padding, if there is one."""
    mask = inputs.get("attention_mask")
    if mask is not None:
        inputs["attention_mask"] = torch.cat([mask, mask.new_ones((1, count))], -1)
    return inputs


def output_row(output: Output, row: int, rows: int) -> Output:
    """The output of a pass over one token, from row `row` of one whose last `rows` tokens were the text's last and a tree.

    Hidden states are copies, for `generate` may return those of all tokens: views would keep every pass in memory. It copies
    logits itself.
    """
    found = dict(output)
    for name, value in output.items():
        if name == "logits":
            found[name] = _row(value, row, rows)
        elif name == "hidden_states" and value is not None:
            found[name] = tuple(_row(states, row, rows).clone() for states in value)
    return type(output)(**found)


def _row(states: torch.Tensor, row: int, rows: int) -> torch.Tensor:
    """[..., tokens, width] -> [..., 1, width], counted from the end: carried tokens come first."""
    index = states.shape[-2] - rows + row
    return states[..., index : index + 1, :]
