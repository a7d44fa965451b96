"""Runs a model without weights on the meta device: which modules run, which weights they use, what a token costs.

Nothing is computed, and shapes are inferred only once per kind of operation, so 80 layers take a second. For several
families (latent and linear attention) the config is wrong about the cache; a run shows the truth.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from rabbit_engine.architectures import stated_positions
from rabbit_engine.caches import KNOWN_ATTENTION
from rabbit_engine.errors import first_line
from rabbit_engine.planning.far_attention import far_heads
from rabbit_engine.planning.operations import RememberedResults
from rabbit_engine.planning.watching import Watch, watched
from rabbit_engine.planning.windows import (
    NO_WINDOWS,
    Windows,
    bytes_behind_windows,
    measure_windows,
    token_bytes_of,
    window_bytes,
)
from rabbit_engine.planning.without_values import runs_without_values
from rabbit_engine.transformers_bridge.attention import attention_of
from rabbit_engine.transformers_bridge.caches import growing_states
from rabbit_engine.transformers_bridge.experts import has_experts_interface
from rabbit_engine.transformers_bridge.forwards import cache_of
from rabbit_engine.transformers_bridge.inputs import Prompting, next_token, ways_to_prompt

logger = logging.getLogger(__name__)

_SHORT, _LONG = 16, 2048
"""Prompt lengths: short ones for code that walks through the tokens one by one, long ones for the activations of real prompts."""

_MOST_TOKENS = 1024
"""A state that does not grow is divided by this many tokens."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Bytes live at once in a pass over a prompt of n tokens: `fixed` + `token` n + `square` n^2."""

    fixed: int = 0
    token: int = 0
    square: int = 0

    def at(self, tokens: int) -> int:
        """Bytes for a prompt of `tokens`."""
        return self.fixed + tokens * (self.token + tokens * self.square)


def fit_curve(short: tuple[int, int], long: tuple[int, int]) -> Curve:
    """The curve through two prompts, each as (tokens, bytes); never below them."""
    (few, few_bytes), (many, many_bytes) = short, long
    if few_bytes >= many_bytes:  # of an image or a sound: the tokens do not matter
        return Curve(few_bytes)
    square = max(0.0, (many_bytes / many - few_bytes / few) / (many - few))
    token = max(0.0, many_bytes / many - square * many)
    return Curve(max(0, math.ceil(few_bytes - few * (token + few * square))), math.ceil(token), math.ceil(square))


@dataclass(frozen=True, slots=True)
class Probe:
    """What a pass showed.

    `alone` are the modules whose forward ran and whose weights were used only inside it, in the order of their first run;
    `outside` are those whose weights were also used elsewhere.
    `cache_token_bytes` is the growth of the KV cache per token, and `cache_fixed_bytes` what a text takes of it at any length:
    keys and values of an encoder's image or sound. `routed` maps each experts module to the number of experts per token.
    `growing_layers` layers of the cache hold keys and values of all tokens and nothing else, of `growing_token_bytes` a token and
    layer at most, `int8_token_bytes` in eight bits; none in a cache that is not dynamic. Their queries have `far_heads` heads, if
    the class can attend to them over blocks, else 0. With an encoder, a layer has `layer_caches` of them, one for what was read:
    `fixed_layer_bytes` of `cache_fixed_bytes`. Its layers with `windows` are not in those numbers.
    A prompt in parts has `carried_token_bytes` of states for each of its tokens while other parts run, and `span_token_bytes` of
    copies for each token that a part attends to.
    `layers` is the memory of a pass up to the head, `head` that from there on, including logits of `vocabulary` tokens, if the
    head computes only the last position where the model allows it. `prompt_only` are the modules that run for a prompt, but not
    for a token after it: an encoder's.
    `failure` is the error of a model that did not run without values.
    """

    alone: tuple[str, ...] = ()
    cache_token_bytes: int = 0
    cache_fixed_bytes: int = 0
    growing_layers: int = 0
    growing_token_bytes: int = 0
    int8_token_bytes: int = 0
    far_heads: int = 0
    layer_caches: int = 1
    fixed_layer_bytes: int = 0
    windows: Windows = NO_WINDOWS
    carried_token_bytes: int = 0
    span_token_bytes: int = 0
    layers: Curve = Curve()
    head: Curve = Curve()
    vocabulary: int = 0
    outside: frozenset[str] = frozenset()
    routed: Mapping[str, int] = field(default_factory=dict)
    prompt_only: frozenset[str] = frozenset()
    failure: str = ""

    @property
    def keeps_tokens(self) -> bool:
        """Whether a text takes more of the cache with each token, at least up to a window."""
        return bool(self.cache_token_bytes or self.windows.token_bytes)

    def activation_bytes(self, tokens: int) -> int:
        """Peak bytes of a pass over a prompt of `tokens`, without the cache."""
        return max(self.layers.at(tokens), self.head.at(tokens))


def run_probe(model: PreTrainedModel, device_type: str = "cpu", results: RememberedResults | None = None) -> Probe:
    """Prefill and decode on the meta device, as on a device of that type. If the model cannot run there, log it and return an
    empty Probe. `results` of other probes may be passed, and are added to."""
    results, failures = results or RememberedResults(), []
    for prompting in ways_to_prompt(model):
        try:
            return _probe(model, device_type, results, prompting)
        except Exception as error:  # noqa: BLE001 - any model's code may reject tensors without values; then nothing is known
            failures.append(f"{type(error).__name__}: {first_line(error)}")
    logger.info("%s does not run on the meta device (%s): its layers are moved whole", type(model).__name__, failures[0])
    return Probe(failure=failures[0])


def _probe(model: PreTrainedModel, device_type: str, results: RememberedResults, prompting: Prompting) -> Probe:
    leaves = {name: module for name, module in model.named_modules() if _is_leaf(module)}
    owners = {id(p): name for name, module in leaves.items() for p in module.parameters(recurse=False)}
    watch = Watch(owners, results)
    with runs_without_values(model, device_type), watched(leaves, watch):
        seen = _run(model, watch, prompting)
    growing = seen.growing
    return Probe(
        alone=tuple(name for name in watch.ran if name not in watch.reached),
        cache_token_bytes=seen.caches.token,
        cache_fixed_bytes=seen.caches.fixed,
        growing_layers=len(growing),
        growing_token_bytes=max((nbytes for layer in growing for nbytes, _ in layer), default=0),
        int8_token_bytes=max((nbytes for layer in growing for _, nbytes in layer), default=0),
        far_heads=seen.far_heads if attention_of(model.config.get_text_config()) in (None, *KNOWN_ATTENTION) else 0,
        layer_caches=max(map(len, growing), default=1),
        fixed_layer_bytes=seen.caches.fixed // len(growing) if growing and len(growing[0]) > 1 else 0,
        carried_token_bytes=_carried_bytes(model),
        windows=seen.windows,
        span_token_bytes=_span_bytes(model, seen.caches.token + seen.windows.token_bytes),
        layers=seen.layers,
        head=seen.head,
        vocabulary=int(getattr(model.config.get_text_config(), "vocab_size", None) or 0),
        outside=frozenset(watch.reached),
        routed=watch.routed,
        prompt_only=seen.prompt_only,
    )


def _is_leaf(module: nn.Module) -> bool:
    alone = has_experts_interface(module) or not any(True for _ in module.children())
    return alone and any(True for _ in module.parameters(recurse=False))


@dataclass(frozen=True, slots=True)
class _Showed:
    """What the passes showed: the cache's bytes without windows, these, bytes of a token (and in eight bits) in each cache of
    each layer that grows, the heads that can attend to them over blocks, the live bytes up to the head and after it, and the
    modules that ran for the prompts only."""

    caches: Curve
    windows: Windows
    growing: Sequence[Sequence[tuple[int, int]]]
    far_heads: int
    layers: Curve
    head: Curve
    prompt_only: frozenset[str]


def _run(model: PreTrainedModel, watch: Watch, prompting: Prompting) -> _Showed:
    """Run two short prompts, then a token after the second (families choose other kernels for one token), and, unless the model
    walks through the tokens, two long ones."""
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(watch.begin_phase) if head is not None else None
    try:
        positions = stated_positions(model.config) or _LONG
        short = max(1, min(_SHORT, positions // 8))  # four times as many, and the token after them, are also positions
        prompts = [_prompt(model, watch, prompting, tokens) for tokens in (short, 4 * short)]
        watch.latest = set()
        caches = _caches(model, prompts)
        windows = measure_windows(cache_of(prompts[-1].output))
        growing = [[token_bytes_of(one) for one in layer] for layer in growing_states(cache_of(prompts[-1].output))]
        heads = far_heads(model, prompts[-1].output)
        prompt_only = frozenset(watch.ran.keys() - watch.latest if watch.latest else ())
        most = min(_LONG, positions)
        if prompts[1].operations < 1.5 * prompts[0].operations and most > 4 * short:
            prompts = [_prompt(model, watch, prompting, tokens) for tokens in (most // 4, most)]
    finally:
        if handle is not None:
            handle.remove()
    layers, after = (fit_curve(*[(prompt.tokens, prompt.peaks[phase]) for prompt in prompts]) for phase in (0, 1))
    return _Showed(caches, windows, growing, heads, layers, after, prompt_only)


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A pass over a prompt: its result, the number of operations, and the peak bytes without the cache, up to the head and
    after it."""

    tokens: int
    output: Any
    operations: int
    peaks: tuple[int, int]


def _prompt(model: PreTrainedModel, watch: Watch, prompting: Prompting, tokens: int) -> _Prompt:
    watch.end_phases()
    before, operations = watch.live_bytes, watch.operations
    output = model(**prompting(tokens))
    own = before + _cache_bytes(cache_of(output)) + bytes_behind_windows(cache_of(output))
    layers, *after = (max(0, peak - own) for peak in watch.end_phases())
    return _Prompt(tokens, output, watch.operations - operations, (layers, max(after, default=0)))


def _caches(model: PreTrainedModel, prompts: Sequence[_Prompt]) -> Curve:
    """Bytes of the cache, without windows: what the token after the last prompt adds, and of an encoder's states, which it does
    not change, what they take for a token of a prompt, or for any."""
    held = [_growing_bytes(cache_of(prompt.output)) for prompt in prompts]
    (few, few_bytes), (many, many_bytes) = ((prompt.tokens, _cross_bytes(cache_of(prompt.output))) for prompt in prompts)
    crossing = (many_bytes - few_bytes) // (many - few) if many > few else 0
    if (inputs := next_token(model, prompts[-1].output)) is None:
        return Curve()
    model(**inputs)
    grown = _growing_bytes(cache_of(prompts[-1].output)) - held[-1]
    token = max(grown, crossing, -(-(held[-1] - many_bytes) // _MOST_TOKENS))
    return Curve(max(0, many_bytes - crossing * many), token)


def _carried_bytes(model: PreTrainedModel) -> int:
    """Bytes a token of what a forward keeps between two layers: its embedding, the last states, rotary angles, and inputs of each
    layer of their own."""
    hidden, width, heads, layers, own = (
        _number_in(model, name)
        for name in ("hidden_size", "head_dim", "num_attention_heads", "num_hidden_layers", "hidden_size_per_layer_input")
    )
    angles = 2 * (width or hidden // max(1, heads))
    return model.dtype.itemsize * (2 * hidden + own * layers) + 4 * angles


def _span_bytes(model: PreTrainedModel, cache_token_bytes: int) -> int:
    """Bytes of copies of keys and values for a token that a part attends to: a layer's while it grows, one for each head."""
    layers, heads, shared = (
        _number_in(model, name) for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    )
    groups = heads // shared if shared else 1
    return -(-cache_token_bytes // max(1, layers)) * (2 + (groups if groups > 1 else 0))


def _number_in(model: PreTrainedModel, name: str) -> int:
    """A number of the text's config, 0 if it is not one: some classes have one for each layer or stage."""
    found = getattr(model.config.get_text_config(), name, None)
    return found if isinstance(found, int) else 0


def _cache_bytes(cache: object) -> int:
    if hasattr(cache, "cross_attention_cache"):
        return _cache_bytes(getattr(cache, "self_attention_cache", None)) + _cross_bytes(cache)
    layers = getattr(cache, "layers", None) or []
    held = [leaf for layer in layers for leaf in tree_leaves(list(vars(layer).values())) if isinstance(leaf, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in held if tensor.dim())  # a number is of any size


def _growing_bytes(cache: object) -> int:
    return _cache_bytes(cache) - window_bytes(cache)


def _cross_bytes(cache: object) -> int:
    """Bytes of the keys and values that a decoder takes from its encoder."""
    return _cache_bytes(getattr(cache, "cross_attention_cache", None))
