"""One pass of a model without weights, on the meta device: which modules run, which weights are used, what a token costs.

Nothing is computed, so 80 layers take a second. What the config says of these things is wrong for several families (the
cache of latent and linear attention); what runs is not.
"""

from __future__ import annotations

import inspect
import logging
import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from rabbit_engine.utils.caches import cache_argument, cache_of

logger = logging.getLogger(__name__)

_PROMPTS = (16, 64)
_MOST_TOKENS = 1024
"""A state that does not grow is spread over this many tokens."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What a pass showed.

    `alone` are the modules whose forward ran and whose weights nobody used outside of it, in the order of their first run;
    `outside` are those whose weights somebody did.
    `cache_token_bytes` is what the KV cache grows by with each token; `routed` tells how many of its experts each experts
    module takes for a token. The results that live at once in a pass over a prompt of n tokens take
    `activation_token_bytes` n + `activation_square_bytes` n^2.
    """

    alone: tuple[str, ...] = ()
    cache_token_bytes: int = 0
    activation_token_bytes: int = 0
    activation_square_bytes: int = 0
    outside: frozenset[str] = frozenset()
    routed: Mapping[str, int] = field(default_factory=dict)


class _Watch(TorchDispatchMode):
    """Sees every operation: whose weights it takes, and how large its result is."""

    def __init__(self, owners: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._owners = owners
        self.running: list[str] = []
        self.ran: dict[str, None] = {}  # in the order of the first run
        self.reached: set[str] = set()
        self.routed: dict[str, int] = {}
        self._live_bytes = 0
        self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it as it is, and take notes."""
        del types
        for leaf in tree_leaves((args, kwargs)):
            owner = self._owners.get(id(leaf))
            if owner is not None and owner not in self.running:
                self.reached.add(owner)
        result = func(*args, **(kwargs or {}))
        is_view = any(returned.alias_info is not None for returned in func._schema.returns)
        for leaf in () if is_view else tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.numel() * leaf.element_size())
                weakref.finalize(leaf, self._count, -leaf.numel() * leaf.element_size())
        return result

    def _count(self, nbytes: int) -> None:
        self._live_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)

    def forget_peak(self) -> int:
        """The most bytes that lived at once since the last call, beyond those that live now."""
        peak = self.peak_bytes - self._live_bytes
        self.peak_bytes = self._live_bytes
        return peak


def run_probe(model: PreTrainedModel) -> Probe:
    """Prefill and decode on the meta device. A model that cannot be run so gives an empty Probe, and says it in the log."""
    leaves = {name: module for name, module in model.named_modules() if _is_leaf(module)}
    watch = _Watch({id(p): name for name, module in leaves.items() for p in module.parameters(recurse=False)})
    try:
        with torch.no_grad(), _unchanged(model), _chosen_kernels(model), _watched(leaves, watch), torch.device("meta"):
            costs = _run(model, watch, model.config._attn_implementation == "eager")
    except Exception as error:  # noqa: BLE001 - any model's code may object to tensors without values; then nothing is known
        logger.info("%s does not run on the meta device (%s): its layers are moved whole", type(model).__name__, error)
        return Probe()
    alone = tuple(name for name in watch.ran if name not in watch.reached)
    return Probe(alone, *costs, frozenset(watch.reached), watch.routed)


def has_experts_interface(module: nn.Module) -> bool:
    """Whether transformers' `ALL_EXPERTS_FUNCTIONS` may compute this module's experts: its decorator leaves these attributes."""
    return all(hasattr(module, name) for name in ("is_concatenated", "is_transposed", "has_bias", "has_gate", "num_experts"))


def _is_leaf(module: nn.Module) -> bool:
    alone = has_experts_interface(module) or not any(True for _ in module.children())
    return alone and any(True for _ in module.parameters(recurse=False))


def _run(model: PreTrainedModel, watch: _Watch, materializes_scores: bool) -> tuple[int, int, int]:
    """Two prompts, then a token behind the second: families choose other kernels for one token.

    Bytes of the cache a token, and of activations a token and a token squared.
    """
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    peaks = []
    for tokens in _PROMPTS:
        watch.forget_peak()
        prompt = model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=True, **last_only)
        peaks.append(watch.forget_peak() / tokens)
    square = max(0.0, (peaks[1] - peaks[0]) / (_PROMPTS[1] - _PROMPTS[0]))
    linear = max(0.0, peaks[0] - square * _PROMPTS[0])
    if not materializes_scores:  # the meta device has no fused kernel and shows what none would hold
        square = 0.0
    cache = cache_of(prompt)
    held = _cache_bytes(cache)
    model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=True, **cache_argument(model.forward, cache))
    grown = max(_cache_bytes(cache) - held, -(-held // _MOST_TOKENS))
    return grown, math.ceil(linear), math.ceil(square)


def _cache_bytes(cache: Any) -> int:
    layers = getattr(cache, "layers", None) or []
    held = [leaf for layer in layers for leaf in tree_leaves(list(vars(layer).values())) if isinstance(leaf, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


@contextmanager
def _unchanged(model: PreTrainedModel) -> Iterator[None]:
    """What forwards keep in their modules is put back: a rotary embedding's frequencies, which would be without values, and
    the hooks by which transformers captures outputs.

    Rotary embeddings that look at positions, which have no values here, stand still meanwhile.
    """
    before = {module: (dict(vars(module)), _tables(module)) for module in model.modules()}
    try:
        for module in before:
            kind = getattr(module, "rope_type", None)
            if kind is not None:
                vars(module)["rope_type"] = dict.fromkeys(kind, "default") if isinstance(kind, dict) else "default"
        yield
    finally:
        for module, (attributes, tables) in before.items():
            vars(module).clear()
            vars(module).update(attributes)
            for name, entries in tables.items():  # the same objects: handles of hooks refer to them
                attributes[name].clear()
                attributes[name].update(entries)


def _tables(module: nn.Module) -> dict[str, dict[Any, Any]]:
    """A copy of each dict that a module keeps: its buffers, its hooks."""
    return {name: dict(value) for name, value in vars(module).items() if isinstance(value, dict)}


def _experts_without_values(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """A function of the experts interface that makes results of the right shapes: grouped kernels refuse the meta device."""
    tokens, used = top_k_index.shape
    up = module.gate_up_proj if module.has_gate else module.up_proj
    rows = hidden_states.repeat_interleave(used, dim=0)
    inner = rows.new_empty(len(rows), up.shape[-1 if module.is_transposed else 1])
    result = rows.new_empty(rows.shape) * top_k_weights.reshape(-1, 1)
    del inner
    return result.view(tokens, used, -1).sum(dim=1).to(hidden_states.dtype)


_EXPERTS = "rabbit_engine_probe"
ALL_EXPERTS_FUNCTIONS.register(_EXPERTS, _experts_without_values)


@contextmanager
def _chosen_kernels(model: PreTrainedModel) -> Iterator[None]:
    """sdpa runs on the meta device, flash attention does not; nor do all kernels for experts."""
    models = {id(module.config): module.config for module in model.modules() if isinstance(module, PreTrainedModel)}
    modules: list[Any] = [module for module in model.modules() if has_experts_interface(module)]
    routed = {id(module.config): module.config for module in modules}
    attention = [(config, config._attn_implementation) for config in models.values()]
    experts = [(config, config._experts_implementation_internal) for config in routed.values()]
    try:
        for config, name in attention:
            if name not in ("eager", "sdpa"):
                config._attn_implementation = "sdpa"
        for config, _ in experts:
            config._experts_implementation_internal = _EXPERTS
        yield
    finally:
        for config, name in attention:
            config._attn_implementation = name
        for config, implementation in experts:
            config._experts_implementation_internal = implementation


@contextmanager
def _watched(leaves: Mapping[str, nn.Module], watch: _Watch) -> Iterator[None]:
    """Note which leaves' forwards run."""
    with ExitStack() as stack:
        for name, module in leaves.items():
            stack.callback(module.register_forward_pre_hook(_enter(name, watch)).remove)
            if has_experts_interface(module):
                stack.callback(module.register_forward_pre_hook(_note_routing(name, watch)).remove)
            stack.callback(module.register_forward_hook(_leave(watch)).remove)
        stack.enter_context(watch)
        yield


def _enter(name: str, watch: _Watch) -> Any:
    def enter(*_: Any) -> None:
        watch.running.append(name)
        watch.ran.setdefault(name)

    return enter


def _note_routing(name: str, watch: _Watch) -> Any:
    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        del module
        if len(args) > 1:
            watch.routed[name] = args[1].shape[-1]  # the interface's second argument: indices [tokens, experts a token]

    return note


def _leave(watch: _Watch) -> Any:
    def leave(*_: Any) -> None:
        watch.running.pop()

    return leave
