"""The library's messages name Python keywords; this rewrites them to name command-line options."""

from __future__ import annotations

import ast
import math
import re

OPTIONS = {
    "attn_implementation": "--attn",
    "cache_dir": "HF_HUB_CACHE",
    "cache_dtype": "--cache-dtype",
    "compression": "--compression",
    "delete_original": "--delete-original",
    "device": "--device",
    "device_map": "--device-map",
    "dtype": "--dtype",
    "gguf_file": "--gguf-file",
    "layer_shards_saving_path": "--saving-path",
    "local_files_only": "HF_HUB_OFFLINE",
    "max_memory": "--max-memory",
    "max_new_tokens": "--max-new-tokens",
    "max_queue": "--max-queue",
    "max_requests": "--max-requests",
    "max_seq_len": "--max-seq-len",
    "overflow": "--overflow",
    "revision": "--revision",
    "seed": "--seed",
    "speculate": "--speculate",
    "split": "--split",
    "task": "--task",
    "temperature": "--temperature",
    "token": "--token",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "trust_remote_code": "--trust-remote-code",
    "workers": "--workers",
}
"""Options by keyword; where there is no option, the equivalent environment variable."""

_DRAFTS = {
    'DraftModel(..., compression="4bit")': "--draft-compression 4bit",
    "DraftModel(...)": "--draft MODEL",
    "speculate=SelfDraft()": "--draft self",
    "Lookup()": "--speculate",
}
"""Options by the drafts that messages suggest."""

_VALUE = r"""\{[^{}]*\}|"[^"]*"|'[^']*'|[\w./:+-]*[\w/+-]"""
_ASSIGNED = re.compile(rf"(?<![\w./-])({'|'.join(OPTIONS)})(?:\[['\"]?(\w+)['\"]?\])?=({_VALUE})?")
_ALONE = re.compile(rf"(?<![\w./-])({'|'.join(name for name in OPTIONS if '_' in name)})(?![\w=.(/-])")
_HOSTS = ("cpu", "mps")
_PLACES = re.compile(r"\{[^{}]*\}")


def as_options(message: str) -> str:
    """`'give max_memory={"cpu": 149550000} or more' -> 'give --max-memory cpu=150MB or more'`."""
    for draft, option in _DRAFTS.items():
        message = message.replace(draft, option)
    message = _ASSIGNED.sub(_assigned, message)
    message = _ALONE.sub(lambda match: OPTIONS[match[1]], message)
    return _PLACES.sub(lambda match: _places(match[0]), message)


def _assigned(match: re.Match[str]) -> str:
    option, place, value = OPTIONS[match[1]], match[2], match[3]
    if value == "None":
        return f"no {option}"
    if value is None or value == "True":
        return option
    joint = " " if option.startswith("--") else "="
    return f"{option}{joint}{f'{place}=' if place else ''}" + _places(value).strip("\"'")


def _places(text: str) -> str:
    """`'{0: "8GiB", "cpu": 1500000}' -> '0=8GiB,cpu=2MB'`; anything but a mapping of sizes is unchanged."""
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    if not isinstance(found, dict) or not found or not all(isinstance(place, int) or place in _HOSTS for place in found):
        return text
    return ",".join(f"{place}={_size(size)}" for place, size in found.items())


def _size(size: object) -> str:
    return f"{math.ceil(size / 1e6)}MB" if isinstance(size, int) else str(size)
