"""How each keyword of transformers' `from_pretrained` is handled: done, accepted without effect, or refused.

The table is compared with transformers' own source in tests/test_keywords.py, and printed in docs/migrating.md.
"""

from __future__ import annotations

import difflib
import functools
import logging
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rabbit_engine.errors import ConfigurationError, UnknownKeywordError

logger = logging.getLogger(__name__)

Treatment = Literal["done", "accepted", "refused"]


@dataclass(frozen=True, slots=True)
class Keyword:
    """One keyword of transformers, how it is handled and why; a refused one is accepted with a value in `harmless`."""

    name: str
    treatment: Treatment
    reason: str
    harmless: tuple[Any, ...] = (None, False)


_TORCH_ONLY = "ignored, as in transformers: only PyTorch weights are read"
_ALWAYS = "always on: the model is built without weights, which are read straight to their places"
_ONE_DEVICE = "layers run on one device"
_KERNELS = "kernels from the Hub would replace modules whose weights are streamed"
_INTERNAL = "used by transformers' internal calls"

KEYWORDS = (
    Keyword("config", "done", "a config object (left unchanged), a folder, a file or a repo id"),
    Keyword("cache_dir", "done", "cache folder of the Hub"),
    Keyword("force_download", "done", "downloads the files again; has no effect on a local folder"),
    Keyword("local_files_only", "done", "downloads nothing"),
    Keyword("token", "done", "for gated and private repos"),
    Keyword("revision", "done", "a branch, tag or commit"),
    Keyword("code_revision", "done", "revision of code in another repo, with trust_remote_code"),
    Keyword("trust_remote_code", "done", "runs modelling code from the repo"),
    Keyword("subfolder", "done", "the part of the repo or folder to load; split separately"),
    Keyword("variant", "done", "`model.<variant>.safetensors`, also in parts; split separately"),
    Keyword("use_safetensors", "done", "True loads only safetensors, False only pickles"),
    Keyword("gguf_file", "done", "the file to load from a folder or repo with several"),
    Keyword("dtype", "done", "dtype of the weights and the computation"),
    Keyword("torch_dtype", "done", "the older name of dtype"),
    Keyword(
        "device_map", "done", '"auto", "balanced", "balanced_low_0", "sequential", one device, or a map of layers to several'
    ),
    Keyword("max_memory", "done", 'the memory limit for weights, by device; "disk" is ignored'),
    Keyword("attn_implementation", "done", '"auto", "flash_attention_2", "sdpa" or "eager"; others are refused'),
    Keyword("experts_implementation", "done", "for experts in memory; streamed ones are computed one at a time"),
    Keyword("generation_config", "done", "replaces the checkpoint's"),
    Keyword("output_loading_info", "done", "returns the model and the same dictionary"),
    Keyword("key_mapping", "done", "renames stored weights"),
    Keyword("adapter_kwargs", "refused", "load the base model, then call model.load_adapter", (None, {})),
    Keyword("adapter_name", "refused", "load the base model, then call model.load_adapter", (None, "default")),
    Keyword(
        "num_labels", "done", "set like any attribute of the config, such as use_cache, rope_parameters or output_attentions"
    ),
    Keyword("output_attentions", "done", "an attribute of the config"),
    Keyword("model_type", "done", "an attribute of the config"),
    Keyword("name_or_path", "accepted", _INTERNAL),
    Keyword("low_cpu_mem_usage", "accepted", _ALWAYS),
    Keyword("offload_folder", "accepted", "weights are read from the checkpoint's own files"),
    Keyword("offload_state_dict", "accepted", _ALWAYS),
    Keyword("offload_buffers", "accepted", "buffers are small and stay in memory"),
    Keyword("disable_mmap", "accepted", "always on: files are read, never mapped"),
    Keyword(
        "ignore_mismatched_sizes",
        "accepted",
        "weights of another shape are always an error: random ones would give a meaningless answer",
    ),
    Keyword("weights_only", "refused", "a pickle that contains more than tensors is never loaded", (None, True)),
    Keyword("from_tf", "accepted", _TORCH_ONLY),
    Keyword("from_flax", "accepted", _TORCH_ONLY),
    Keyword("mirror", "accepted", "ignored, as in transformers"),
    Keyword("resume_download", "accepted", "always on"),
    Keyword("proxies", "accepted", "ignored, as in huggingface_hub 1: set HTTPS_PROXY"),
    Keyword("tqdm_class", "accepted", "downloads show huggingface_hub's own bars"),
    Keyword("_fast_init", "accepted", "ignored, as in transformers"),
    Keyword("_commit_hash", "accepted", _INTERNAL),
    Keyword("_from_auto", "accepted", _INTERNAL),
    Keyword("_from_pipeline", "accepted", _INTERNAL),
    Keyword("_configuration_file", "refused", "give config=, which may be a file"),
    Keyword("state_dict", "refused", "weights are streamed from files: save them as a checkpoint and load that"),
    Keyword("quantization_config", "done", "a BitsAndBytesConfig: quantised once by bitsandbytes, in shards; others are refused"),
    Keyword("load_in_4bit", "done", "short for BitsAndBytesConfig(load_in_4bit=True)"),
    Keyword("load_in_8bit", "done", "short for BitsAndBytesConfig(load_in_8bit=True)"),
    Keyword("distributed_config", "refused", _ONE_DEVICE),
    Keyword("device_mesh", "refused", _ONE_DEVICE),
    Keyword("tp_plan", "refused", _ONE_DEVICE),
    Keyword("tp_size", "refused", _ONE_DEVICE, (None, 1)),
    Keyword("use_kernels", "refused", _KERNELS),
    Keyword("kernel_config", "refused", _KERNELS),
    Keyword("allow_all_kernels", "refused", _KERNELS),
    Keyword("fusion_config", "refused", "fused modules would read weights that are streamed separately", (None, False, {})),
    Keyword("use_auth_token", "refused", "give token=", (None, False)),
    Keyword("use_flash_attention_2", "refused", 'give attn_implementation="flash_attention_2"'),
    Keyword("return_unused_kwargs", "refused", "a keyword that is not an attribute of the config is an error"),
)
"""Keywords of transformers' `PreTrainedModel.from_pretrained` and its auto classes, and some of older releases."""

OWN_KEYWORDS = (
    "device",
    "compression",
    "fused_products",
    "layer_shards_saving_path",
    "delete_original",
    "split",
    "prefetching",
    "profiling_mode",
    "show_layer_progress",
    "max_seq_len",
    "cache_dtype",
    "cut",
    "speculate",
    "cluster",
    "hf_token",
)
"""Keywords that transformers does not have."""

RETIRED_KEYWORDS = {
    "prefetch_pin_memory": "it is not needed: host slots are pinned once, at load, if the device benefits",
    "use_gds": "it is not needed: reads go through host slots that are allocated once",
    "cache_layers": 'use max_memory={"cpu": "24GiB"}, which limits the memory for weights',
    "offload_small_layers": "it is not needed: embeddings are read by row, the rest follows max_memory",
    "offload_small_layers_use_cpu_cache": "it is not needed: embeddings are read by row, the rest follows max_memory",
    "persister": "it is not needed: shards are safetensors files, see layer_shards_saving_path",
    "kv_cache_dir": 'use generate(cache_implementation="offloaded"), which keeps the KV cache in host memory',
}
"""Keywords of other layer-streaming libraries that have no effect here, and what replaces them."""


def take_keywords(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The `keywords` that may be attributes of the model's config; the others are accepted, with a warning if retired.

    Raises ConfigurationError, with the reason, for a refused one.
    """
    table = {row.name: row for row in KEYWORDS}
    overrides: dict[str, Any] = {}
    for name, value in keywords.items():
        row = table.get(name)
        if name in RETIRED_KEYWORDS:
            if value is not None:
                warn_retired(name)
        elif row is None or row.treatment == "done":
            overrides[name] = value
        elif row.treatment == "accepted":
            logger.debug("%s=%r: %s", name, value, row.reason)
        elif not (isinstance(value, bool | int | str | dict | None) and value in row.harmless):
            raise ConfigurationError(f"{name}={value!r} is refused: {row.reason}")
    return overrides


def refuse_unknown(unknown: Iterable[str], known: Iterable[str]) -> None:
    """Raise UnknownKeywordError for the first of `unknown` keywords, suggesting the nearest of `known`."""
    first = next(iter(unknown), None)
    if first is None:
        return
    names = [*OWN_KEYWORDS, *(row.name for row in KEYWORDS), *known, *RETIRED_KEYWORDS]
    nearest = difflib.get_close_matches(first, names, n=1, cutoff=0.6)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "help(AutoModel.from_pretrained) lists them"
    raise UnknownKeywordError(f"from_pretrained has no keyword {first!r}, and the model's config has no such attribute; {hint}")


@functools.cache
def warn_retired(keyword: str) -> None:
    """Warn, once a process, that a keyword of RabbitLLM has no effect; say what to use instead."""
    warnings.warn(f"{keyword} has no effect here; {RETIRED_KEYWORDS[keyword]}", UserWarning, stacklevel=5)
