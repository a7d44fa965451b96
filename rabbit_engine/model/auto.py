"""`AutoModel`: from keywords to a streamed model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, overload

import torch

from rabbit_engine.checkpoints import loading_info
from rabbit_engine.config import DEFAULT_CUT, Cut
from rabbit_engine.decoding import Draft
from rabbit_engine.devices import MaxMemory
from rabbit_engine.model.adapters import load_own_adapter
from rabbit_engine.model.choosing import forecast_with, forecast_with_auto
from rabbit_engine.model.cluster import load_on_cluster
from rabbit_engine.model.compression import quantization_config_of
from rabbit_engine.model.devices import load_on_devices
from rabbit_engine.model.drafts import DraftLoader
from rabbit_engine.model.generation_config import set_generation_config
from rabbit_engine.model.loading import load
from rabbit_engine.model.settings import LoadSettings, settings_of
from rabbit_engine.model.speculating import Speculate
from rabbit_engine.model.streamed import StreamedModel
from rabbit_engine.planning.plan import Plan
from rabbit_engine.utils.overloads import arguments_of, signed_as_overload


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
        layer_shards_saving_path: str | Path | Sequence[str | Path] | None = None,
        delete_original: bool = False,
        split: str = "auto",
        prefetching: bool = True,
        profiling_mode: bool = False,
        show_layer_progress: bool = False,
        max_seq_len: int | None = None,
        cache_dtype: str | None = None,
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
        cluster: str | None = None,
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
            layer_shards_saving_path: where the shards go; None puts them next to the checkpoint. A list of folders on several
                disks spreads every layer over them, and they are read at once: name the same ones whenever it is loaded.
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
            cache_dtype: "int8" keeps the keys and values of texts in 8.5 bits a number, but the newest 256 to 511 tokens;
                answers may differ. None keeps them as they are computed.
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
            device_map: "auto" (also "balanced", "sequential") divides the layers among the devices that `max_memory` names,
                or all of the machine; a mapping of modules says which has what; or one device. See docs/devices.md.
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
            cluster: the address of a Ray cluster over whose machines the layers are divided: "auto", "HOST:PORT" of its head,
                "ray://HOST:PORT", or "local". `max_memory` then holds for each machine. See docs/cluster.md.
            output_loading_info: return the model and transformers' report on the weights: missing, unexpected, mismatched.
            other: attributes of the config, such as `use_cache=False`; keywords of transformers that have no effect or are
                refused with the reason (docs/migrating.md lists all); and those of other libraries, each with one warning.

        Raises:
            RabbitError: a ConfigurationError, CheckpointError or ShardError that says what to do.
        """
        name = pretrained_model_name_or_path
        arguments = arguments_of(_SIGNATURE, name, **keywords)
        settings = settings_of(arguments)
        settings = replace(settings, source=replace(settings.source, auto=cls._auto))
        cluster = arguments["cluster"]
        if cluster is not None:
            model = load_on_cluster(name, settings, cluster)
        else:
            model = load(name, settings) if settings.row is None else load_on_devices(name, settings, settings.row)
        quantization = quantization_config_of(arguments)
        if quantization is not None and model._checkpoint.request.split.compression is not None:
            model.config.quantization_config = quantization  # as in transformers
        load_own_adapter(model)
        if arguments["generation_config"] is not None:
            set_generation_config(model, arguments["generation_config"])
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
