"""Parses the name of a model: a repo id, a folder, a weight file, or a URL copied from the Hub."""

from __future__ import annotations

import difflib
import os.path
import re
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path, PureWindowsPath
from urllib.parse import unquote, urlsplit

from rabbit_engine.errors import CheckpointNotFoundError, ConfigurationError

_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co", "www.hf.co")
_WEIGHTS = re.compile(
    r"(?:model|pytorch_model)(?:\.(?!safetensors|bin)([^.]+?))?(?:-\d+-of-\d+)?\.(safetensors|bin)(?:\.index(?:\.([^.]+))?\.json)?"
)
"""File names of weights and indexes; groups: the variant, the kind, the variant of an index."""

_NEXT_TO_WEIGHTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class Address:
    """A repo id or a folder, and the part of it that the name selects; None for what the name does not specify."""

    name: str
    revision: str | None = None
    subfolder: str | None = None
    gguf_file: str | None = None
    variant: str | None = None
    use_safetensors: bool | None = None


def read_name(name: object) -> Address:
    """The repo or folder that `name` refers to.

    Raises ConfigurationError for an invalid name, and CheckpointNotFoundError for a path that does not exist, suggesting
    the nearest one.
    """
    if not isinstance(name, str | PathLike) or isinstance(name, bytes):
        raise ConfigurationError(f"{name!r} is not a model name: pass a repo id, a folder or a .gguf file")
    text = str(fspath(name)).strip()
    if not text:
        raise ConfigurationError("the model name is empty: pass a repo id, a folder or a .gguf file")
    if "://" in text or text.split("/")[0].lower() in _HOSTS:
        return _read_url(text)
    path = _existing(Path(os.path.expanduser(text)))  # noqa: PTH111 - Path.expanduser raises for an unknown user
    if os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises for a name that is too long
        return _read_file(path)
    if os.path.isdir(path):  # noqa: PTH112
        return Address(str(path) if "\\" in text else text)
    if _must_be_path(text):
        raise CheckpointNotFoundError(f"{path} does not exist{_likely(path)}")
    return Address(text.rstrip("/"))


def _existing(path: Path) -> Path:
    """The path itself, or its translation from Windows notation if only that exists."""
    written = Path(PureWindowsPath(path).as_posix())
    return written if not os.path.exists(path) and os.path.exists(written) else path  # noqa: PTH110


def _must_be_path(text: str) -> bool:
    is_path = text.startswith(("/", ".", "~")) or "\\" in text or text.rstrip("/").count("/") > 1
    return is_path or text.lower().endswith((".gguf", ".safetensors", ".bin", ".json"))


_GIVE = "give a folder, a .gguf file, or a repo id (organisation/name)"


def _likely(path: Path) -> str:
    """A suggestion: the GGUF files of the folder if a GGUF file is missing, else the nearest name."""
    if path.suffix.lower() == ".gguf" and path.parent.is_dir():
        found = sorted(other.name for other in path.parent.glob("*.gguf"))
        return f": {_GIVE}; the GGUF files there: {', '.join(found) or 'none'}"
    missing = next((part for part in (*reversed(path.parents), path) if not part.exists()), path)
    there = "" if missing == path else f" (there is no {missing})"
    return nearest_path(path) or f"{there}: {_GIVE}"


def _read_file(path: Path) -> Address:
    """The address of a weight file's folder. Raises CheckpointNotFoundError for any other file."""
    folder, weights = str(path.parent), _weights_of(path.name)
    if path.suffix.lower() == ".gguf":
        return Address(folder, gguf_file=path.name)
    if weights is not None and (path.parent / "config.json").is_file():
        return replace(weights, name=folder)
    if path.name in _NEXT_TO_WEIGHTS:
        return Address(folder)
    raise CheckpointNotFoundError(f"{path} is a file: pass a model folder (with a config.json), or a .gguf file")


def _read_url(text: str) -> Address:
    """`https://huggingface.co/org/name/tree/main/part`, `hf://org/name@main/part`."""
    url = urlsplit(text if "://" in text else f"https://{text}")
    parts = [unquote(part) for part in url.path.split("/") if part]
    if url.scheme == "hf":
        parts = [part for part in (unquote(url.netloc), *parts) if part]
    elif (url.hostname or "") not in _HOSTS:
        raise ConfigurationError(f"{text} is not a Hub URL: download the model and pass its folder")
    if parts[:1] == ["models"]:
        parts = parts[1:]
    if not parts or parts[0] in ("datasets", "spaces", "collections", "papers", "docs", "blog"):
        raise ConfigurationError(f"{text} is not the URL of a model")
    if url.scheme == "hf":
        return _part_of(text, parts[:2], parts[2:])
    kinds = [
        index for index in (1, 2) if parts[index : index + 1] and parts[index] in ("tree", "blob", "resolve", "raw", "commit")
    ]
    if not kinds:
        return _part_of(text, parts[:2], [])
    at = kinds[0]
    revision, taken = _revision(parts[at + 1 :])
    inside = parts[at + 1 + taken :]
    return _part_of(text, parts[:at], [*inside, ""] if parts[at] == "tree" else inside, revision)


def _revision(parts: list[str]) -> tuple[str, int]:
    """A revision and the number of URL parts it spans: three for a pull request's."""
    taken = 3 if parts[:1] == ["refs"] else 1
    return "/".join(parts[:taken]), taken


def _part_of(text: str, repo: list[str], inside: list[str], revision: str | None = None) -> Address:
    """The address of a part of a repo: a subfolder, or the folder of the file at the end."""
    if repo[-1].count("@") == 1 and revision is None:
        repo[-1], revision = repo[-1].split("@")
    file = inside.pop() if inside and ("." in inside[-1] or not inside[-1]) else ""
    address = Address("/".join(repo), revision=revision or None)
    if file.lower().endswith(".gguf"):
        return replace(address, gguf_file="/".join([*inside, file]))
    address, weights = replace(address, subfolder="/".join(inside) or None), _weights_of(file)
    if weights is not None:
        return replace(address, variant=weights.variant, use_safetensors=weights.use_safetensors)
    if file.endswith((".safetensors", ".bin", ".pt", ".pth")):
        raise CheckpointNotFoundError(f"{text} is a file that no model can be loaded from: pass the repo's URL")
    return address


def _weights_of(file: str) -> Address | None:
    """The variant and kind of files that a weight file's name selects; None for any other file."""
    match = _WEIGHTS.fullmatch(file)
    return Address("", variant=match[1] or match[3], use_safetensors=match[2] == "safetensors") if match else None


def nearest_path(path: Path) -> str:
    """`; did you mean /data/llama?`: the closest sibling of the first part that does not exist; empty if there is none."""
    for parent, part in zip(path.parents, (path, *path.parents), strict=False):
        if parent.is_dir():
            return _nearest_in(parent, part.name)
    return ""


def _nearest_in(folder: Path, name: str) -> str:
    try:
        siblings = [entry.name for entry in folder.iterdir()]
    except OSError:
        return ""
    folded = {sibling.lower(): sibling for sibling in siblings}
    nearest = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.6)
    return f"; did you mean {folder / folded[nearest[0]]}?" if nearest else ""
