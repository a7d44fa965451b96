"""The masks of a forward in parts: memory for those of one part, however many there are."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Self

import torch


@dataclass(frozen=True, slots=True)
class MaskRecipe:
    """The arguments of `PartMasks`, but its device."""

    kinds: Mapping[str, int | None]
    rows: int
    tokens: int
    dtype: torch.dtype
    padding: torch.Tensor | None


class PartMasks:
    """Masks [sequences or 1, 1, rows, keys] for parts of up to `rows` of `tokens` tokens, one for each of `kinds`: how many
    tokens its layers see, None for all. Layers of the kinds `without` take none.

    Without padding the masks of all parts are views of one that never changes. `padding` (bool [sequences, tokens]) is True for
    padding: then they are views of one that is rewritten by `show`, which must be called whenever another part goes on.
    """

    def __init__(
        self,
        kinds: Mapping[str, int | None],
        rows: int,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        padding: torch.Tensor | None = None,
        without: Collection[str] = (),
    ) -> None:
        self._kinds, self._padding, self._without = kinds, padding, without
        self._least = torch.finfo(dtype).min
        self._plain = {kind: _band(window, min(rows, tokens), tokens, dtype, device) for kind, window in kinds.items()}
        self._masks = {
            kind: plain if padding is None else plain.repeat(len(padding), 1, 1, 1) for kind, plain in self._plain.items()
        }
        self._shown: tuple[int, int] | None = None
        self._given: dict[int, tuple[str, torch.Tensor]] = {}
        self.recipe = MaskRecipe(dict(kinds), rows, tokens, dtype, padding)
        """What makes the same masks elsewhere."""

    @classmethod
    def made(cls, recipe: MaskRecipe, device: torch.device) -> Self:
        """Those of a recipe, on another device."""
        padding = None if recipe.padding is None else recipe.padding.to(device)
        return cls(recipe.kinds, recipe.rows, recipe.tokens, recipe.dtype, device, padding)

    def one(self, kind: str, past: int, rows: int) -> torch.Tensor:
        """The mask of a part for layers of a kind."""
        return _part_of(self._masks[kind], self._kinds[kind], past, rows)

    def kind_of(self, value: object) -> str | None:
        """The kind of a mask that `of` has given, None of anything else."""
        found = self._given.get(id(value))
        return None if found is None or found[1] is not value else found[0]

    def of(self, past: int, rows: int) -> torch.Tensor | dict[str, torch.Tensor | None] | None:
        """The mask of a part of `rows` tokens after `past`: one, or by kind if there are several; None if no layer takes any."""
        found = {kind: self.one(kind, past, rows) for kind in self._kinds}
        self._given |= {id(mask): (kind, mask) for kind, mask in found.items()}
        return {**dict.fromkeys(self._without), **found} if len(found) > 1 else next(iter(found.values()), None)

    def show(self, past: int, rows: int) -> None:
        """Let the masks be those of this part."""
        if self._padding is None or self._shown == (past, rows):
            return
        self._shown = past, rows
        for kind, window in self._kinds.items():
            mask = _part_of(self._masks[kind], window, past, rows)
            mask.copy_(_part_of(self._plain[kind], window, past, rows))
            hidden = self._padding[:, past + rows - mask.shape[-1] : past + rows]
            mask.masked_fill_(hidden[:, None, None], self._least)


def _band(window: int | None, rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[1, 1, rows, keys]: what the last `rows` of `tokens` tokens see of the keys that a layer shows them, as 0 where they see it
    and the least number elsewhere, like transformers' own. Those of an earlier or shorter part are its last rows and columns.
    """
    shown = tokens if window is None else min(tokens, window - 1 + rows)
    before, least = shown - rows, torch.finfo(dtype).min
    mask = torch.full((rows, shown), least, dtype=dtype, device=device).triu_(before + 1)
    if window is not None:
        mask += torch.full_like(mask, least).tril_(before - window)
    return mask[None, None]


def _part_of(mask: torch.Tensor, window: int | None, past: int, rows: int) -> torch.Tensor:
    """The part of a `_band` for `rows` tokens after `past`."""
    shown = rows + (past if window is None else min(past, window - 1))
    return mask[..., mask.shape[-2] - rows :, mask.shape[-1] - shown :]
