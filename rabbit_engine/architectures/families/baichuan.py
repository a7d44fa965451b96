"""Baichuan and Baichuan2 as Llamas: the 7B with rotary positions, the 13B with ALiBi.

Source of the formats: the modelling code in the families' repositories. All have `model_type: baichuan`; only the 7B
configs have `max_position_embeddings`. Baichuan2 normalises the rows of its head when it first runs.
"""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM, WeightConverter

from rabbit_engine.architectures.architecture import Architecture, Family, RawConfig
from rabbit_engine.architectures.families.alibi import AlibiLlamaConfig, AlibiLlamaForCausalLM
from rabbit_engine.architectures.families.fused import NormalizeRows, SplitQKV
from rabbit_engine.architectures.families.rawconfig import QKV, common, llama_sizes

logger = logging.getLogger(__name__)

_NORMALISED = {64000: False, 125696: True}
"""The released vocabularies: Baichuan's and Baichuan2's."""


def _normalises_head(raw: RawConfig, folder: Path) -> bool:
    """Whether the head's rows are normalised, by the modelling file next to the config, else by the vocabulary or the class."""
    code = _code(folder)
    if code:
        return "NormHead" in code
    if raw["vocab_size"] in _NORMALISED:
        return _NORMALISED[raw["vocab_size"]]
    first = "BaiChuanForCausalLM" in (raw.get("architectures") or ()) or (_has_alibi(raw, folder) and _words_of_13b(raw))
    logger.warning(
        "a Baichuan model with a vocabulary of %s tokens matches neither version: treated as %s, whose head is %snormalised; "
        "if that is wrong, put its modeling_baichuan.py next to the config",
        raw["vocab_size"],
        "Baichuan" if first else "Baichuan2",
        "not " if first else "",
    )
    return not first


def _words_of_13b(raw: RawConfig) -> bool:
    """Whether the config is written like Baichuan-13B's: one key is a list, and one key of Baichuan2-13B is missing."""
    return isinstance(raw.get("gradient_checkpointing"), list) or "tokenizer_class" not in raw


def _has_alibi(raw: RawConfig, folder: Path) -> bool:
    """Whether this is a 13B model: by the code next to the config, else by the key that their configs lack."""
    code = _code(folder)
    return "alibi" in code if code else "max_position_embeddings" not in raw


def _code(folder: Path) -> str:
    """The text of the modelling file next to the config, empty if there is none; it is never run."""
    path = folder / "modeling_baichuan.py"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _convert(raw: RawConfig, folder: Path) -> Architecture:
    longest = raw.get("max_position_embeddings") or raw.get("model_max_length", 4096)
    shared = {**llama_sizes(raw), "max_position_embeddings": longest, **common(raw)}
    head = (WeightConverter("lm_head.weight", "lm_head.weight", [NormalizeRows()]),) if _normalises_head(raw, folder) else ()
    transforms = (*head, WeightConverter("self_attn.W_pack", list(QKV), [SplitQKV()]))
    if _has_alibi(raw, folder):
        return Architecture(cls=AlibiLlamaForCausalLM, config=AlibiLlamaConfig(**shared), transforms=transforms)
    rope = {"rope_type": "default", "rope_theta": float(raw.get("rope_theta", 10000))}
    return Architecture(cls=LlamaForCausalLM, config=LlamaConfig(**shared, rope_parameters=rope), transforms=transforms)


FAMILIES = (
    Family(
        name="Baichuan",
        model_type="baichuan",
        classes=("BaiChuanForCausalLM", "BaichuanForCausalLM"),
        becomes="LlamaForCausalLM or AlibiLlamaForCausalLM",
        convert=_convert,
        tokenizer="baichuan",
    ),
)
