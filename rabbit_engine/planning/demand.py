"""How much memory texts need on top of the weights, checked before a prompt is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from rabbit_engine.errors import PromptTooLongError
from rabbit_engine.planning.probe import Probe
from rabbit_engine.streaming import BLOCK_TOKENS, PIECE_TOKENS
from rabbit_engine.utils.heap import give_free_memory_back
from rabbit_engine.utils.sizes import format_bytes

_SAMPLING_BYTES = 40
"""Bytes per vocabulary token while the next one is chosen: logits in float32, sorted, with their indices, summed, masked."""

_LOGITS_BYTES = 8
"""Bytes per vocabulary token of a row of logits: in the model's dtype, and while a head in blocks joins them."""

_MOST_ROWS = 1024

_SCORE_BYTES = 8
"""Bytes per pair of a row and a token of a piece, and head: scores in float32, and what is summed of them."""

_MASK_BYTES = 4
"""Bytes per pair of positions of a padded prompt: the mask as booleans, and as the kernel takes it."""

PART_ROWS = (4096, 2048, 1024, 512, 256)
"""Tokens in a part of a prompt that is not computed at once."""

KEPT_FREE_BYTES = 32 * 2**20
"""Bytes to leave free for newly compiled kernels, small heap blocks and Python objects."""


@dataclass(frozen=True, slots=True)
class Demand:
    """The tokens of a request: its prompt and the longest answer, for `sequences` computed together.

    A `padded` batch needs a mask. The prompt is computed in parts of `chunk` tokens, all at once if that is None, and only the
    newest token if the rest `is_computed` already. A single forward, which keeps no cache and samples nothing, has the number
    of its rows of `logits` over the vocabulary. `tiered` layers of the cache have their keys and values on disk, and in memory
    only while they run, a piece at a time if they are in `pieces`; those that are `encoded`, in eight bits, and in memory too if
    they are `held` there.
    The first `begun` tokens of the prompt are computed already, and blocks of them counted with another text. `windows` layers
    that forget tokens are in tiers too.
    """

    prompt: int
    answer: int
    sequences: int = 1
    padded: bool = False
    chunk: int | None = None
    is_computed: bool = False
    logits: int | None = None
    tiered: int = 0
    encoded: bool = False
    held: bool = False
    begun: int = 0
    pieces: bool = False
    windows: int = 0

    @property
    def in_tiers(self) -> bool:
        """Whether any layer is."""
        return bool(self.tiered or self.windows)

    @property
    def rows(self) -> int:
        """The most tokens that are computed at once."""
        rows = self.prompt - self.begun
        return 1 if self.is_computed else min(rows, self.chunk or rows)


_WHOLE_LAYERS = 3
"""Layers in tiers that are in memory at once: the one that runs, the one that is read ahead, the one that is written."""

_PIECES = 5
"""Pieces in memory at once: the one in use and its copies in float32, those that are read, and the next layer's first."""

_COPIES_OF_NEW = 4
"""Of the tokens of a part, for a layer in pieces: as computed, behind its tail, in blocks, and in blocks of the part before."""

_TAIL_TOKENS = 768
"""The newest tokens of each layer in tiers, or of each of its caches, stay in memory: up to two blocks, and one more while it is
cut off."""


def cache_bytes(probe: Probe, demand: Demand) -> int:
    """Bytes in memory of the caches of all sequences at full length; a single forward keeps none."""
    if demand.logits is not None:
        return 0
    tokens = demand.prompt + demand.answer
    whole = probe.cache_fixed_bytes + probe.cache_token_bytes * tokens
    if demand.tiered:
        layer = probe.growing_token_bytes * tokens + probe.fixed_layer_bytes
        tails = min(layer, probe.layer_caches * _TAIL_TOKENS * probe.growing_token_bytes)
        whole = max(0, whole - demand.tiered * layer) + _shown_bytes(probe, demand, layer) + demand.tiered * tails
    whole += _window_bytes(probe, demand)
    return demand.sequences * whole + (_block_bytes(probe, demand) if demand.held else 0)


def _shown_bytes(probe: Probe, demand: Demand, layer_bytes: int) -> int:
    """Bytes of what attention sees of layers in tiers at once, if one has `layer_bytes`."""
    if demand.pieces:
        return (_COPIES_OF_NEW * demand.rows + _PIECES * PIECE_TOKENS) * probe.growing_token_bytes
    return min(demand.tiered, _WHOLE_LAYERS) * (layer_bytes + BLOCK_TOKENS * probe.growing_token_bytes)


def _window_bytes(probe: Probe, demand: Demand) -> int:
    """Bytes in memory of the layers with windows: after a prompt, of all tokens that were computed at once."""
    shown, layer = probe.windows.shown(demand.prompt + demand.answer, demand.rows), _window_layer_bytes(probe)
    kept = probe.windows.token_bytes * shown
    if not demand.windows:
        return kept
    whole = min(demand.windows, _WHOLE_LAYERS) * (shown + BLOCK_TOKENS)
    return max(0, kept - demand.windows * layer * shown) + layer * (whole + demand.windows * min(shown, _TAIL_TOKENS))


def _window_layer_bytes(probe: Probe) -> int:
    """Bytes a token of one layer with a window."""
    return -(-probe.windows.token_bytes // max(1, probe.windows.layers))


def tier_bytes(probe: Probe, demand: Demand) -> int:
    """Bytes outside of the device's memory of the layers in tiers, of all sequences at full length."""
    return 0 if demand.held else _block_bytes(probe, demand)


def _block_bytes(probe: Probe, demand: Demand) -> int:
    """Bytes of the blocks of the layers in tiers, wherever they lie."""
    token_bytes = probe.int8_token_bytes if demand.encoded else probe.growing_token_bytes
    layer = token_bytes * (demand.prompt + demand.answer - demand.begun) + probe.fixed_layer_bytes
    window = _window_layer_bytes(probe) * min(demand.prompt + demand.answer, probe.windows.tokens + BLOCK_TOKENS)
    return demand.sequences * (demand.tiered * layer + demand.windows * window)


def encoded_demand(probe: Probe, demand: Demand, *, held: bool) -> Demand:
    """`demand` with all layers that grow in eight bits."""
    return replace(demand, tiered=probe.growing_layers, encoded=True, held=held)


def work_bytes(probe: Probe, demand: Demand) -> int:
    """The most bytes live at once in a pass, without the caches: activations, masks, logits and what samples from them."""
    tokens = demand.rows
    parted = not demand.is_computed and tokens < demand.prompt
    extra = _MASK_BYTES * tokens * (demand.prompt if parted else tokens) if demand.padded else 0
    if parted:
        extra += _part_bytes(probe, demand, tokens)
    if demand.pieces:
        extra += _SCORE_BYTES * probe.far_heads * tokens * PIECE_TOKENS
    if demand.logits == 0:
        return demand.sequences * (probe.layers.at(tokens) + extra)
    head = _SAMPLING_BYTES if demand.logits is None else demand.logits * _LOGITS_BYTES
    return demand.sequences * (probe.activation_bytes(tokens) + extra + head * probe.vocabulary)


def _part_bytes(probe: Probe, demand: Demand, rows: int) -> int:
    """What a part of `rows` tokens takes more than a prompt as short: the states of all parts between two layers, copies of the
    keys and values of a layer, and masks or scores for the tokens before it."""
    copied = min(demand.prompt, PIECE_TOKENS) if demand.pieces else demand.prompt
    before = rows * (demand.prompt - rows) * (probe.layers.square + _MASK_BYTES)
    return demand.prompt * probe.carried_token_bytes + copied * probe.span_token_bytes + before


@dataclass(frozen=True, slots=True)
class Ways:
    """How a text that does not fit may be computed: its prompt in `parts`, its cache in tiers with `disk_bytes` of disk, whose
    layers are in memory whole, or in `pieces` too.

    The caches of all texts are in eight bits if they are `encoded`, in the memory of the device if it `holds` them. `no_disk`
    says why none may lie on disk.
    """

    parts: bool = False
    disk_bytes: int = 0
    encoded: bool = False
    holds: bool = False
    pieces: bool = False
    no_disk: str = ""


AS_IT_IS = Ways()


def best_way(probe: Probe, demand: Demand, free_bytes: int, ways: Ways) -> Demand:
    """`demand` as it is if `free_bytes` suffice; else in the largest parts with which they do; else with the fewest layers in
    tiers, those with windows last, and then the largest parts, with which they do; then the same with layers in pieces, which
    compute other bits; as it is if they never do. An encoded cache lies in memory if it fits in any parts, else in tiers."""
    chunks = [demand.chunk, *(rows for rows in PART_ROWS if rows < demand.prompt and ways.parts and demand.chunk is None)]
    if ways.encoded:
        places = [*([True] if ways.holds else []), *([False] if ways.disk_bytes or not ways.holds else [])]
        encoded = [encoded_demand(probe, replace(demand, chunk=rows), held=held) for held in places for rows in chunks]
        encoded += [replace(one, pieces=True) for one in encoded if not one.held and ways.pieces]
        return next((found for found in encoded if _fits(probe, found, free_bytes, ways)), encoded[0])
    tried = [replace(demand, chunk=rows) for rows in chunks]
    tried += [replace(one, **place) for place in (_places(probe, ways) if ways.disk_bytes else []) for one in tried]
    for found in tried:
        if _fits(probe, found, free_bytes, ways):
            return _fewest_tiered(probe, found, free_bytes)
    return demand


def _places(probe: Probe, ways: Ways) -> list[dict[str, Any]]:
    """Which layers may be in tiers, and how, in the order in which that is tried."""
    windows = [0, *([probe.windows.layers] if probe.windows.layers else [])]
    shown = [False, *([True] if ways.pieces else [])]
    return [{"tiered": probe.growing_layers, "pieces": pieces, "windows": count} for pieces in shown for count in windows]


def _fits(probe: Probe, demand: Demand, free_bytes: int, ways: Ways) -> bool:
    return need_bytes(probe, demand) <= free_bytes and tier_bytes(probe, demand) <= ways.disk_bytes


def _fewest_tiered(probe: Probe, demand: Demand, free_bytes: int) -> Demand:
    """`demand`, which fits, with as few layers in tiers as do."""
    least = 1 if demand.pieces else _WHOLE_LAYERS + 1
    most = demand.windows or demand.tiered
    fewer = (
        replace(demand, windows=layers) if demand.windows else replace(demand, tiered=layers) for layers in range(least, most)
    )
    return next((found for found in fewer if need_bytes(probe, found) <= free_bytes), demand)


def most_rows(probe: Probe, free_bytes: int) -> int:
    """How many rows of a pass, each with its logits, may take a fourth of the free memory."""
    row_bytes = probe.cache_token_bytes + probe.windows.token_bytes + _LOGITS_BYTES * probe.vocabulary
    return most_prompt(lambda rows: 4 * (probe.activation_bytes(rows) + rows * row_bytes) <= free_bytes, _MOST_ROWS)


def need_bytes(probe: Probe, demand: Demand) -> int:
    """All bytes that a request needs on top of the weights: its caches at full length, and a pass over its prompt."""
    return cache_bytes(probe, demand) + work_bytes(probe, demand)


def most_prompt(fits: Callable[[int], bool], most: int) -> int:
    """The longest prompt of up to `most` tokens that fits; 0 if none does."""
    least, above = 0, most + 1
    while above - least > 1:
        middle = (least + above) // 2
        least, above = (middle, above) if fits(middle) else (least, middle)
    return least


def fitted(
    probe: Probe,
    demand: Demand,
    find_free_bytes: Callable[[], int],
    place: str,
    ways: Ways = AS_IT_IS,
    *,
    why_whole: str = "",
) -> Demand:
    """`demand`, in one of the `ways` if it does not fit as it is. Raises PromptTooLongError if it needs more than the free
    memory of `place`; `why_whole` is the setting without which it could be in parts."""
    free = find_free_bytes()
    if need_bytes(probe, demand) + KEPT_FREE_BYTES > free:
        give_free_memory_back()
        free = find_free_bytes()

    def best(demand: Demand, ways: Ways = ways) -> Demand:
        return best_way(probe, demand, free - KEPT_FREE_BYTES, ways)

    demand = best(demand)
    need = need_bytes(probe, demand) + KEPT_FREE_BYTES
    if need <= free:
        return demand

    def fits_one(tokens: int) -> bool:
        return need_bytes(probe, best(replace(demand, prompt=tokens))) + KEPT_FREE_BYTES <= free

    fits = most_prompt(fits_one, demand.prompt)
    side_by_side = f"{demand.sequences} sequences of " if demand.sequences > 1 else ""
    wanted = demand.sequences * (demand.prompt + demand.answer)
    fits_parts = why_whole and best(demand, replace(ways, parts=True)) != demand
    leave_out = f"leave out {why_whole}, with which it is not computed in parts, " if fits_parts else ""
    raise PromptTooLongError(
        f"{side_by_side}{demand.prompt} tokens and {demand.answer} new ones need {format_bytes(need)} on top of the weights, "
        f"but {place} has {format_bytes(free)} free, enough for a prompt of {fits} tokens: {leave_out}shorten it, "
        f"request fewer new tokens, or load the model with max_seq_len={wanted}, which leaves less memory to the weights"
        + (f". Its cache cannot lie on disk, as {ways.no_disk}: name a folder on a disk" if ways.no_disk else "")
    )
