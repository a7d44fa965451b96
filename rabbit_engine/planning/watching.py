"""Records what a forward does: which modules run, which weights each operation takes, and how many bytes live at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rabbit_engine.planning.operations import RememberedResults, is_alias
from rabbit_engine.transformers_bridge.experts import has_experts_interface


class Watch(TorchDispatchMode):
    """Records the weights that every operation takes, and the size of its result."""

    def __init__(self, owners: Mapping[int, str], results: RememberedResults) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._owners, self._results = owners, results
        self.running: list[str] = []
        self.ran: dict[str, None] = {}  # in the order of the first run
        self.latest: set[str] = set()  # since it was last emptied
        self.reached: set[str] = set()
        self.routed: dict[str, int] = {}
        self.operations = 0
        self.live_bytes = 0
        self._peak_bytes = 0
        self._peaks: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation unchanged and record it."""
        del types
        self.operations += 1
        result, operands = self._results.run(func, args, kwargs or {})
        for tensor in operands:
            owner = self._owners.get(id(tensor))
            if owner is not None and owner not in self.running:
                self.reached.add(owner)
        if is_alias(func):
            return result
        for leaf in (result,) if isinstance(result, torch.Tensor) else tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.numel() * leaf.element_size())
                weakref.finalize(leaf, self._count, -leaf.numel() * leaf.element_size())
        return result

    def _count(self, nbytes: int) -> None:
        self.live_bytes += nbytes
        self._peak_bytes = max(self._peak_bytes, self.live_bytes)

    def begin_phase(self, *_: object) -> None:
        """Restart the count of live bytes."""
        self._peaks.append(self._peak_bytes)
        self._peak_bytes = self.live_bytes

    def end_phases(self) -> list[int]:
        """The most live bytes in each phase since the last call."""
        self.begin_phase()
        peaks, self._peaks = self._peaks, []
        return peaks


@contextmanager
def watched(leaves: Mapping[str, nn.Module], watch: Watch) -> Iterator[None]:
    """Record which leaves' forwards run."""
    with ExitStack() as stack:
        for name, module in leaves.items():
            stack.callback(module.register_forward_pre_hook(_enter(name, watch)).remove)
            if has_experts_interface(module):
                stack.callback(module.register_forward_pre_hook(_note_routing(name, watch)).remove)
            stack.callback(module.register_forward_hook(_leave(watch)).remove)
        stack.enter_context(watch)
        yield


def _enter(name: str, watch: Watch) -> Callable[..., None]:
    def enter(*_: object) -> None:
        watch.running.append(name)
        watch.ran.setdefault(name)
        watch.latest.add(name)

    return enter


def _note_routing(name: str, watch: Watch) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        del module
        if len(args) > 1:
            watch.routed[name] = args[1].shape[-1]  # the interface's second argument: indices [tokens, experts a token]

    return note


def _leave(watch: Watch) -> Callable[..., None]:
    def leave(*_: object) -> None:
        watch.running.pop()

    return leave
