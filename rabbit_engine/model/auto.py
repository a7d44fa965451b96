"""`AutoModel`: from keywords to a streamed model."""

from __future__ import annotations

import functools
import inspect
import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, overload

import torch
from transformers import GenerationConfig, PreTrainedModel

from rabbit_engine.architectures import (
    Architecture,
    build_architecture,
    explain_failures,
    refuse_past,
    require_generation_config,
    stated_head_dim,
)
from rabbit_engine.checkpoints import Streamable, execute, loading_info, resolve
from rabbit_engine.config import (
    DEFAULT_CUT,
    Cut,
    MaxMemory,
    SourceConfig,
    StreamConfig,
)
from rabbit_engine.decoding import Draft
from rabbit_engine.errors import (
    AttentionUnavailableError,
    ConfigurationError,
    DamagedCheckpointError,
    RabbitError,
    first_line,
)
from rabbit_engine.model.assembly import Assembly, assemble
from rabbit_engine.model.attention import choose_attention
from rabbit_engine.model.choosing import choose_draft, forecast_with, forecast_with_auto
from rabbit_engine.model.compression import quantization_config_of
from rabbit_engine.model.drafts import DraftLoader, PlannedTarget, assemble_with
from rabbit_engine.model.mixin import streamed_class
from rabbit_engine.model.settings import LoadSettings, settings_of
from rabbit_engine.model.speculating import AUTO, Speculate
from rabbit_engine.model.streamed import StreamedModel
from rabbit_engine.planning.forecast import left_out, why_lossless_gains_nothing
from rabbit_engine.planning.plan import Plan
from rabbit_engine.planning.trial import require_pass
from rabbit_engine.streaming import Transfer
from rabbit_engine.transformers_bridge.adapters import can_load_adapters
from rabbit_engine.transformers_bridge.generation import read_generation_config
from rabbit_engine.utils.kernels import keep_few_kernels
from rabbit_engine.utils.overloads import arguments_of, signed_as_overload
from rabbit_engine.utils.sizes import format_bytes, format_rate

logger = logging.getLogger(__name__)

_ADAPTER = "adapter_config.json"


class AutoModel:
    """Loads the class that a checkpoint names so that it runs in less memory than its size; one that names none generates text.

    The classes for tasks, such as `AutoModelForSequenceClassification`, choose as those of transformers do.
    """

    _auto: ClassVar[str | None] = None
    """The class of transformers that chooses; None: the checkpoint does."""

    def __init__(self) -> None:
        name = type(self).__name__
        raise TypeError(f"{name} cannot be instantiated: use {name}.from_pretrained(name)")

    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        device: str | int | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        max_memory: MaxMemory | None = None,
        attn_implementation: str | None = "auto",
        compression: str | None = None,
        fused_products: bool | None = None,
        layer_shards_saving_path: str | Path | None = None,
        delete_original: bool = False,
        split: str = "auto",
        prefetching: bool = True,
        profiling_mode: bool = False,
        show_layer_progress: bool = False,
        max_seq_len: int | None = None,
        cut: Cut = DEFAULT_CUT,
        speculate: Speculate = None,
        token: str | bool | None = None,
        hf_token: str | bool | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        gguf_file: str | None = None,
        device_map: Any = None,
        torch_dtype: str | torch.dtype | None = None,
        quantization_config: Any = None,
        config: Any = None,
        subfolder: str = "",
        variant: str | None = None,
        use_safetensors: bool | None = None,
        force_download: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        code_revision: str | None = None,
        generation_config: Any = None,
        output_loading_info: Literal[False] = False,
        **other: Any,
    ) -> StreamedModel: ...

    @overload
    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, output_loading_info: Literal[True], **keywords: Any
    ) -> tuple[StreamedModel, dict[str, Any]]: ...

    @classmethod
    @signed_as_overload
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **keywords: Any
    ) -> StreamedModel | tuple[StreamedModel, dict[str, Any]]:
        """A transformers model whose layers are streamed from disk, one at a time, with the answer of the whole model.

        Args:
            pretrained_model_name_or_path: a repo id or URL of the Hugging Face Hub, a folder, or a `.gguf` file.
            device: "cuda:0", "xpu:0", "mps" or "cpu"; None selects the best available.
            dtype: of the weights and of the computation; None keeps the checkpoint's own.
            max_memory: `{0: "8GiB", "cpu": "24GiB"}`, the memory for weights and their buffers: the ring, slots for experts,
                staging. The KV cache and activations come on top, unless `max_seq_len` is given. None uses what is free now,
                minus those of `max_seq_len` tokens and a margin for the system.
            attn_implementation: "auto" (flash_attention_2 if it works, else sdpa, else eager) or one of these.
            compression: "4bit" stores the linear layers and experts in 4.5 bits a weight and the head in 8, "8bit" all of them
                in 8; norms, embeddings and routers keep their dtype. "lossless" stores bfloat16 in about 0.7 of its bytes, with
                every bit, where the plan says that a pass gets faster. Made once, in shards of their own, then streamed.
            fused_products: True multiplies few rows by quantised weights in their stored form, which is faster and may differ
                from the decoded weights by rounding; False always decodes; None decodes a format whose bits transformers
                defines.
            layer_shards_saving_path: where the shards go; None puts them next to the checkpoint.
            delete_original: delete each original weight file once every shard made from it is verified.
            split: "auto" streams from the original files if they hold the weights in the model's form (safetensors, the same
                dtype, at most renamed), and otherwise, or if a path for shards is given, splits; "always" splits, "never"
                raises if a split is needed.
            prefetching: read the next layer while this one runs.
            profiling_mode: log every pass at INFO: bytes, rates, seconds waited.
            show_layer_progress: show a progress bar over the weights of each pass.
            max_seq_len: tokens, of prompts and answers together, to reserve KV cache and activations for, within
                `max_memory` if that is given; None reserves 1,024 without `max_memory`, else nothing. Longer texts run as
                long as memory lasts.
            cut: how finely the model is cut into units (`rabbit_engine.config.Cut`); the default suits disks and GPUs.
            speculate: the default of `generate`: a draft (`rabbit_engine.Lookup()`, `DraftModel(...)` ...) guesses several tokens
                for each pass to verify; "auto" takes lookup, and with it a 4-bit copy of the model if one was split, or the
                checkpoint's multi-token heads, if they pay for their memory. The text stays the same.
            token: for gated and private repos; by default from HF_TOKEN.
            hf_token: the older name of token.
            revision: branch, tag or commit.
            cache_dir: cache folder of the Hub.
            local_files_only: download nothing.
            trust_remote_code: run modelling code from the repository.
            gguf_file: the file to load from a folder or repo with several.
            device_map: "auto" (also "balanced", "sequential"), or one device.
            torch_dtype: the older name of dtype.
            quantization_config: a BitsAndBytesConfig: bitsandbytes quantises the weights once, in shards of their own, and
                computes with them, as transformers has it do. `load_in_4bit=True` and `load_in_8bit=True` are short for one.
            config: a config object, a folder, a file or a repo id, instead of the checkpoint's; an object is left unchanged.
            subfolder: the part of the repo or folder to load.
            variant: of the weight files, as in `model.fp16.safetensors`.
            use_safetensors: True loads only safetensors, False only pickles.
            force_download: download the files again.
            key_mapping: patterns of stored names, and their replacements.
            code_revision: revision of code in another repo.
            generation_config: replaces the checkpoint's.
            output_loading_info: return the model and transformers' report on the weights: missing, unexpected, mismatched.
            other: attributes of the config, such as `use_cache=False`; keywords of transformers that have no effect or are
                refused with the reason (docs/migrating.md lists all); and those of other libraries, each with one warning.

        Raises:
            RabbitError: a ConfigurationError, CheckpointError or ShardError that says what to do.
        """
        name = pretrained_model_name_or_path
        arguments = arguments_of(_SIGNATURE, name, **keywords)
        settings = settings_of(arguments)
        model = load(name, replace(settings, source=replace(settings.source, auto=cls._auto)))
        quantization = quantization_config_of(arguments)
        if quantization is not None and model._checkpoint.request.split.compression is not None:
            model.config.quantization_config = quantization  # as in transformers
        _load_own_adapter(model)
        if arguments["generation_config"] is not None:
            _set_generation_config(model, arguments["generation_config"])
        return (model, loading_info(model._checkpoint)) if arguments["output_loading_info"] else model

    @classmethod
    def from_config(cls, *_: Any, **__: Any) -> NoReturn:
        """Raises TypeError: a model built from its config alone has no weights to stream."""
        raise TypeError(
            "AutoModel.from_config would make random weights, and there are none to stream: use "
            "transformers.AutoModelForCausalLM.from_config, or from_pretrained(name, config=config)"
        )


_SIGNATURE = inspect.signature(AutoModel.from_pretrained)


def read_settings(keywords: Mapping[str, Any], *, planned: bool = False) -> LoadSettings:
    """What `AutoModel.from_pretrained` does with these keywords, without a model's name. See `settings_of`."""
    return settings_of(arguments_of(_SIGNATURE, "", **keywords), planned=planned)


def forecast_with_draft(name: str | Path, settings: LoadSettings, draft: Draft | str) -> Plan:
    """The plan of a model with a draft, or with `"auto"`; a note says what that gains, by assumed guesses.

    Raises DraftError if either does not fit, and what `planning.forecast` raises.
    """
    loader = DraftLoader(str(name), settings, load)
    return forecast_with_auto(loader) if isinstance(draft, str) else forecast_with(draft, loader)


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
    _require_pass(model, checkpoint)
    _tell_new_weights(model, checkpoint)
    _set_draft(model, settings.speculate)
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


def _load_own_adapter(model: Any) -> None:
    """Apply the adapter next to the weights, as transformers does if peft is installed.

    Raises ConfigurationError for a Hub repo, where transformers would load the adapter's base model instead, and
    DamagedCheckpointError for an adapter that cannot be loaded.
    """
    repo = model._checkpoint.repo
    if _ADAPTER not in repo.names:
        return
    if not can_load_adapters():
        logger.warning("the adapter in %s is not applied: pip install peft", repo.folder)
        return
    try:
        if repo.commit is not None:
            raise ConfigurationError(
                f"{repo.name} holds a model and an adapter: load the base model that its {_ADAPTER} names, then "
                f"model.load_adapter({repo.name!r})"
            )
        model.load_adapter(str(repo.folder))
    except RabbitError:
        model.close()
        raise
    except Exception as error:  # peft's code sees whatever the files contain
        model.close()
        raise DamagedCheckpointError(f"{repo.folder / _ADAPTER} cannot be applied: {first_line(error)}") from error


def _require_pass(model: Any, checkpoint: Streamable) -> None:
    try:
        require_pass(checkpoint.architecture, checkpoint.dtype, model._assembly.partition.probe)
    except BaseException:
        model.close()
        raise


def _set_draft(model: Any, speculate: Speculate) -> None:
    """Set the default of `generate`, and attach its draft. Raises DraftError."""
    try:
        model.speculate_by_default(speculate)
    except BaseException:
        model.close()
        raise


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
        _read_generation_config(model, folder, source)
        _end_at(model.generation_config, checkpoint.architecture.chat_ends)


def _read_generation_config(model: Any, folder: str, source: SourceConfig) -> None:
    """The generation config of the folder. Raises DamagedCheckpointError."""
    require_generation_config(Path(folder), getattr(model.config.get_text_config(), "vocab_size", None))
    try:
        read_generation_config(model, folder, trust_remote_code=source.trust_remote_code)
        _drop_empty(model.generation_config)
    except Exception as error:  # the code of a config class sees any value
        raise DamagedCheckpointError(f"{folder}/generation_config.json cannot be used: {first_line(error)}") from error


def _set_generation_config(model: Any, generation_config: Any) -> None:
    if not isinstance(generation_config, GenerationConfig):
        raise ConfigurationError(f"generation_config={generation_config!r} is not a transformers GenerationConfig")
    model.generation_config = GenerationConfig.from_dict(generation_config.to_dict())
    _drop_empty(model.generation_config)


def _drop_empty(generation_config: Any) -> None:
    """Drop empty lists: `generate` rejects them, or fails."""
    for name in ("stop_strings", "bad_words_ids", "sequence_bias", "eos_token_id"):
        value = getattr(generation_config, name, None)
        if isinstance(value, list | dict | str) and not value:
            setattr(generation_config, name, None)


def _end_at(generation_config: Any, tokens: tuple[int, ...]) -> None:
    """Let an answer also end at `tokens`."""
    eos = generation_config.eos_token_id
    known = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    if tokens:
        generation_config.eos_token_id = list(dict.fromkeys([*known, *tokens]))


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
