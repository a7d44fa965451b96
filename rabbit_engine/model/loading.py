"""Loads a model: finds its weights, builds its class, and sets the weights streaming."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rabbit_engine.architectures import Architecture, build_architecture, explain_failures, refuse_past, stated_head_dim
from rabbit_engine.checkpoints import Streamable, execute, resolve
from rabbit_engine.config import StreamConfig
from rabbit_engine.errors import AttentionUnavailableError, RabbitError
from rabbit_engine.model.assembly import Assembly, assemble
from rabbit_engine.model.attention import choose_attention
from rabbit_engine.model.choosing import choose_draft
from rabbit_engine.model.drafts import DraftLoader, PlannedTarget, assemble_with
from rabbit_engine.model.generation_config import set_own_generation_config
from rabbit_engine.model.mixin import streamed_class
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.model.settings import LoadSettings
from rabbit_engine.model.speculating import AUTO
from rabbit_engine.model.tiered_caches import require_cache_dtype
from rabbit_engine.planning.forecast import left_out, why_lossless_gains_nothing
from rabbit_engine.planning.trial import require_pass
from rabbit_engine.streaming import Transfer
from rabbit_engine.utils.kernels import keep_few_kernels
from rabbit_engine.utils.sizes import format_bytes, format_rate

logger = logging.getLogger(__name__)


def load(name: str | Path, settings: LoadSettings, assemble: Callable[..., Assembly] = assemble) -> Any:
    """Resolve where the weights come from, split if needed, and set them streaming with `assemble`."""
    keep_few_kernels()  # before choose_attention computes something
    settings, stream = _without_useless_compression(name, settings), settings.stream
    if settings.speculate == AUTO:
        settings = replace(settings, speculate=choose_draft(DraftLoader(str(name), settings, load)))
    build = functools.partial(_build_streamed, stream=stream)
    model: Any
    checkpoint, model = execute(resolve(name, settings.source, settings.split, build=build))
    _tell_head_dim(model.config, checkpoint)
    _set_names(model, str(name), checkpoint)
    loader = DraftLoader(str(name), settings, load)
    model._draft_loader = replace(loader, is_planned=True)
    rest = functools.partial(assemble, model, checkpoint.entries, checkpoint.ties)
    try:
        with torch.inference_mode(False):  # slots are written by another thread, which inference tensors forbid
            model._assembly = assemble_with(settings.speculate, PlannedTarget(model, loader), rest)
    except BaseException:
        loader.close()
        raise
    with _closed_if_it_fails(model):
        require_pass(checkpoint.architecture, checkpoint.dtype, model._assembly.partition.probe)
        require_cache_dtype(runtime_of(model))
        model.speculate_by_default(settings.speculate)
    _tell_new_weights(model, checkpoint)
    refuse_past(model, checkpoint.architecture)
    explain_failures(model)
    weakref.finalize(model, model._assembly.transfer.abandon)
    if model._assembly.uses is not None:
        weakref.finalize(model, model._assembly.uses.save)
    if stream.profiling_mode:
        model._assembly.binding.passes.on_pass = functools.partial(_log_pass, model._assembly.transfer)
    logger.info("attention: %s (%s)", model.active_attention_implementation, model._attention_reason)
    logger.info("plan of %s:\n%s", name, model.plan)
    return model


def _without_useless_compression(name: str | Path, settings: LoadSettings) -> LoadSettings:
    """The settings without a lossless compression that makes no pass faster; a warning says so."""
    split = settings.split
    useless = why_lossless_gains_nothing(name, settings.source, split, settings.stream)
    if not useless:
        return settings
    logger.warning("%s", left_out(useless))
    return replace(settings, split=replace(split, compression=None))


def _build_streamed(architecture: Architecture, dtype: torch.dtype, *, stream: StreamConfig) -> PreTrainedModel:
    """The streaming class, on the meta device, with the chosen attention. Raises AttentionUnavailableError."""
    choice = choose_attention(stream.attn_implementation, architecture.cls, dtype, stream.device)
    try:
        cls = streamed_class(architecture.cls)  # type: ignore[arg-type]
        model: Any = build_architecture(architecture, cls, dtype, choice.name)
    except RabbitError:
        raise
    except (ValueError, ImportError) as error:
        if choice.name is None:
            raise
        raise AttentionUnavailableError(
            f"attn_implementation={choice.name!r} does not work for {architecture.cls.__name__}: {error}"
        ) from error
    model._attention_reason = choice.reason
    return model  # type: ignore[no-any-return]


def _tell_new_weights(model: Any, checkpoint: Streamable) -> None:
    """Warn of a head that the checkpoint lacks: it was initialised, as in transformers."""
    if not checkpoint.architecture.new_head:
        return
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if new := sorted(parameters - set(model._assembly.partition.weights.entries)):
        logger.warning(
            "some weights of %s are not in %s and are newly initialized: %s; train it on a task before you use what it predicts",
            type(model).__name__,
            checkpoint.repo.name,
            ", ".join(new),
        )


def _tell_head_dim(config: Any, checkpoint: Streamable) -> None:
    said, used = (stated_head_dim(part) for part in (checkpoint.architecture.config, config))
    if used != said:
        logger.warning("config.json says head_dim=%s, the checkpoint's weights have %s: using theirs", said, used)


def _set_names(model: Any, name: str, checkpoint: Streamable) -> None:
    """Set its name, generation config and tokenizer source, from the checkpoint's folder."""
    source = checkpoint.request.source
    model._checkpoint, model._drafts = checkpoint, {}
    model.name_or_path = model.config.name_or_path = name
    folder = str(checkpoint.repo.folder)
    model._tokenizer_source = {
        "pretrained_model_name_or_path": folder,
        "trust_remote_code": source.trust_remote_code,
        **({"gguf_file": source.gguf_file} if source.gguf_file else {}),
    }
    if model.can_generate() and source.gguf_file is None:
        set_own_generation_config(model, checkpoint)


@contextmanager
def _closed_if_it_fails(model: Any) -> Iterator[None]:
    try:
        yield
    except BaseException:
        model.close()
        raise


def _log_pass(transfer: Transfer, seconds: float) -> None:
    profile = transfer.profile()
    logger.info(
        "pass %d: %.2f s; so far %s read at %s, waited %.2f s",
        profile.passes,
        seconds,
        format_bytes(profile.bytes_read),
        format_rate(profile.bytes_read, profile.read_s),
        profile.wait_s,
    )
