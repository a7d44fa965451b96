"""An embedding that stays on disk: its forward reads only the rows of the given ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from rabbit_engine.errors import DamagedShardError
from rabbit_engine.storage.directio import as_bytes, damage_as, open_unchanged, read_into
from rabbit_engine.storage.tensorfiles import TensorEntry, read_tensor
from rabbit_engine.streaming.binding.placeholder import Placeholder


class EmbeddingRows(Placeholder):
    """The weight of an embedding, [vocabulary, width], in a shard; `torch.nn.functional.embedding` on it reads rows."""

    @damage_as(DamagedShardError)
    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of int64 `ids` [n] on the CPU: [n, width]. Raises IndexError past the vocabulary, as torch does."""
        entry, rows = self.entry, self.shape[0]
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= rows):
            span = f"{int(ids.min())} to {int(ids.max())}"
            raise IndexError(f"index out of range in self: {self.weight_name} has {rows} rows, the ids go from {span}")
        if entry.encoding is None:
            return _read_rows(entry, ids).view(self.dtype)
        tables = [_read_rows(part, ids).view(part.dtype).view(len(ids), *part.shape[1:]) for part in entry.components]
        decoded = torch.empty(len(ids), *self.shape[1:], dtype=self.dtype, device="cpu")
        entry.encoding.decode(tables, decoded)
        return decoded

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: object, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Handle `embedding(weight, ids)`; everything else raises as for any weight that is not loaded."""
        if func is torch.ops.aten.embedding.default:
            weight, ids = args[0], args[1]
            needed, position = torch.unique(ids.cpu(), return_inverse=True)
            table = weight.read(needed).to(weight.device)
            return functional.embedding(position.to(weight.device), table)
        if func is torch.ops.aten.select.int and args[1] == 0:  # Gemma 4 indexes the row of its padding token
            weight, row = args[0], args[2] % args[0].shape[0]
            return weight.read(torch.tensor([row], device="cpu"))[0].to(weight.device)
        return super().__torch_dispatch__(func, types, args, kwargs)


def _read_rows(entry: TensorEntry, ids: torch.Tensor) -> torch.Tensor:
    """The bytes of rows `ids` of a plain tensor: uint8 [n, bytes of a row]."""
    row_bytes = entry.nbytes // max(1, entry.shape[0])
    if len(entry.places) > 1:
        found = [read_tensor(entry.rows(row, row + 1)).reshape(-1).view(torch.uint8) for row in ids.tolist()]
        return torch.stack(found) if found else torch.empty(0, row_bytes, dtype=torch.uint8, device="cpu")
    table = torch.empty(len(ids), row_bytes, dtype=torch.uint8, device="cpu")
    with open_unchanged(entry.path, entry.stamp) as file:
        for index, row in enumerate(ids.tolist()):
            file.seek(entry.offset + row * row_bytes)
            read_into(file, as_bytes(table[index]), entry.path)
    return table
