"""The options for loading a model, of all commands: each is declared once, with its translation for the library."""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rabbit_engine.cli import engine, output
from rabbit_engine.cli.groups import Only
from rabbit_engine.errors import ConfigurationError, DraftError, RabbitError
from rabbit_engine.utils.names import read_name
from rabbit_engine.utils.sizes import parse_bytes

if TYPE_CHECKING:
    from rabbit_engine.decoding import Draft

DEFAULT_TOKENS = 4096
"""Commands that hold conversations reserve memory for this many tokens by default."""

SELF, HEADS = "self", "heads"
"""The names of the drafts that are a copy of the model itself, and its own multi-token heads."""

_SELF_BITS = "4bit"
"""How the copy is stored by default."""

_NUMBERED = re.compile(r"(.*\.)(\d{1,6})-(\d{1,6})", re.ASCII)
_PLACE = re.compile(r"((cuda|xpu):)?\d+|cpu(:\d+)?|mps(:0)?")


def parse_memory(text: str, device: str) -> dict[int | str, int | str]:
    """`"8GiB"` is the budget of the `device` that computes, `"0=8GiB,cpu=24GiB"` names each. Raises ValueError."""
    if "=" not in text:
        parse_bytes(text)
        kind, _, index = device.partition(":")
        return {kind if kind in ("cpu", "mps") else int(index) if index.isdigit() else 0: text}
    places: dict[int | str, int | str] = {}
    for part in text.split(","):
        place, is_named, size = (word.strip() for word in part.partition("="))
        if not is_named or not _PLACE.fullmatch(place):
            raise ValueError(f"{part!r} names no device: write 8GiB, or 0=8GiB,cpu=24GiB")
        parse_bytes(size)
        places[int(place) if place.isdigit() else place] = size
    return places


def _check_memory(text: str | None) -> str | None:
    try:
        if text is not None:
            parse_memory(text, "cpu")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return text


def parse_map(text: str) -> str | dict[str, int | str]:
    """`"auto"` or a device as it is; `"model.layers.0-15=0,model.layers.16-29=1"` names modules, with ranges of numbers.
    Raises ValueError."""
    if "=" not in text:
        return text
    places: dict[str, int | str] = {}
    for part in text.split(","):
        module, is_named, place = (word.strip() for word in part.partition("="))
        if not is_named or not _PLACE.fullmatch(place):
            raise ValueError(f"{part!r} places no module: write auto, or model.layers.0-15=0,model.layers.16-29=1")
        places |= dict.fromkeys(_modules(module), int(place) if place.isdigit() else place)
    return places


def _modules(name: str) -> list[str]:
    found = _NUMBERED.fullmatch(name)
    if found is None:
        return [name]
    first, last = int(found[2]), int(found[3])
    if last < first:
        raise ValueError(f"{name!r}: the range ends before it begins")
    return [f"{found[1]}{number}" for number in range(first, last + 1)]


def _check_map(text: str | None) -> str | None:
    try:
        if text is not None:
            parse_map(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return text


def _check_draft(name: str | None) -> str | None:
    try:
        if name not in (None, SELF, HEADS):
            read_name(name)
    except RabbitError as error:
        raise DraftError(f"--draft: {error}") from error
    return name


def _parse_folder(text: str) -> Path:
    """Reject an empty text, which Path takes for the current folder: it is more likely an unset variable."""
    if not text:
        raise typer.BadParameter("the path is empty: name a folder")
    if os.path.isfile(text):  # noqa: PTH113 - Path's own raises for a name that is too long
        raise typer.BadParameter(f"{text} is a file: name a folder")
    return Path(text)


def _parse_folders(text: str) -> str:
    """Reject one folder: that is --saving-path. Several are kept as text, which the option's type must be."""
    if len([_parse_folder(part) for part in text.split(",")]) < 2:
        raise typer.BadParameter(f"{text} is one folder: name several, separated by commas, or use --saving-path")
    return text


Device = Annotated[str | None, typer.Option(help="cuda:0, xpu:0, mps or cpu; the default is the best available.")]
Dtype = Annotated[str | None, typer.Option(help="The default is the checkpoint's own.")]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        "-m",
        callback=_check_memory,
        help="Memory for weights: 8GiB of the device, or 0=8GiB,cpu=24GiB; 0=8GiB,1=6GiB divide the layers.",
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        metavar="auto|MAP",
        callback=_check_map,
        help="Divide the layers among devices: auto (balanced) or sequential over those of --max-memory, or all there are; "
        "model.layers.0-15=0,model.layers.16-29=1 says which.",
    ),
]
MaxSeqLen = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens, over all running texts, to reserve memory for: 4096, but none with --max-memory."),
]
CacheDtypeName = Annotated[
    Literal["int8"] | None,
    typer.Option(help="Keep the keys and values of texts in 8 bits: longer texts, and answers may differ.", case_sensitive=False),
]
Attention = Annotated[
    Literal["auto", "flash_attention_2", "sdpa", "eager"], typer.Option(help="How attention is computed.", case_sensitive=False)
]
Split = Annotated[
    Literal["auto", "always", "never"],
    typer.Option(help="Make shards first; auto does if the files cannot be streamed as they are.", case_sensitive=False),
]
Compression = Annotated[
    Literal["4bit", "8bit", "lossless"] | None,
    typer.Option(help="Store the weights smaller, once, in shards, and stream those.", case_sensitive=False),
]
SavingPath = Annotated[
    Path | None,
    typer.Option(parser=_parse_folder, metavar="<dir>", help="Where the shards go; the default is next to the checkpoint."),
]
Onto = Annotated[
    str | None,
    typer.Option(
        parser=_parse_folders,
        metavar="<dir>,<dir>...",
        help="Spread the shards over folders on several disks, which are read at once. Name the same ones for every command.",
    ),
]
GgufFile = Annotated[str | None, typer.Option(help="The GGUF file of the folder or repo.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit.")]
Token = Annotated[str | None, typer.Option(help="For gated repos; by default from HF_TOKEN.", show_default=False)]
TrustRemoteCode = Annotated[bool, typer.Option(help="Run code from the repository.")]
Speculate = Annotated[
    bool, typer.Option("--speculate", help="Guess tokens ahead and verify several in each pass: fewer passes, the same text.")
]
DraftName = Annotated[
    str | None,
    typer.Option(
        callback=_check_draft,
        metavar="MODEL",
        help="Speculate with a small model of the same tokenizer, whole in memory; self: with a 4-bit copy of the model; "
        "heads: with its own multi-token heads.",
    ),
]
DraftCompression = Annotated[
    Literal["4bit", "8bit"] | None, typer.Option(help="Store the draft's weights smaller, once.", case_sensitive=False)
]
Cluster = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Divide the layers among the machines of a Ray cluster: auto, HOST:PORT, ray://HOST:PORT; -m is for each.",
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """The options as typed. A command takes those that its parameter names: `Annotated[Loading, Only("device")]`."""

    device: Device = None
    dtype: Dtype = None
    max_memory: MaxMemory = None
    device_map: DeviceMap = None
    max_seq_len: MaxSeqLen = None
    cache_dtype: CacheDtypeName = None
    attn: Attention = "auto"
    split: Split = "auto"
    compression: Compression = None
    saving_path: SavingPath = None
    onto: Onto = None
    gguf_file: GgufFile = None
    revision: Revision = None
    token: Token = None
    trust_remote_code: TrustRemoteCode = False
    speculate: Speculate = False
    draft: DraftName = None
    draft_compression: DraftCompression = None
    cluster: Cluster = None

    def __post_init__(self) -> None:
        if self.onto is not None and self.saving_path is not None:
            raise ConfigurationError("--onto and --saving-path both say where shards go: leave out one of them")
        if self.draft_compression is not None and self.draft is None:
            raise ConfigurationError("--draft-compression is for the model of --draft, which is not given")
        if self.draft_compression is not None and self.draft == HEADS:
            raise ConfigurationError("--draft-compression is for models: --draft heads uses the checkpoint's own files")

    @property
    def guesses(self) -> Draft | str | None:
        """`speculate` in the library's form. A model guesses together with lookup: joined trees accept more than either's."""
        if self.draft is None:
            return "auto" if self.speculate else None
        return engine.decoding.Merged(engine.decoding.Lookup(), self._named_draft(self.draft))

    def _named_draft(self, name: str) -> Draft:
        if name == HEADS:
            return engine.decoding.MultiTokenHeads()
        if name == SELF:
            return engine.decoding.SelfDraft(self.draft_compression or _SELF_BITS)
        return engine.decoding.DraftModel(name, compression=self.draft_compression)

    @property
    def budget(self) -> dict[int | str, int | str] | None:
        """`max_memory` in the library's form."""
        if self.max_memory is None:
            return None
        return parse_memory(self.max_memory, self.device or str(engine.platform.best_device()))

    def for_conversations(self) -> Loading:
        """The same, with memory reserved for DEFAULT_TOKENS unless a number of tokens or a budget is given."""
        default = None if self.max_memory is not None else DEFAULT_TOKENS
        return replace(self, max_seq_len=self.max_seq_len or default)

    def keywords(self) -> dict[str, Any]:
        """The keywords of `AutoModel.from_pretrained`."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "max_memory": self.budget,
            "device_map": None if self.device_map is None else parse_map(self.device_map),
            "max_seq_len": self.max_seq_len,
            "cache_dtype": self.cache_dtype,
            "attn_implementation": self.attn,
            "split": self.split,
            "compression": self.compression,
            "layer_shards_saving_path": self.saving_path if self.onto is None else self.onto.split(","),
            "gguf_file": self.gguf_file,
            "revision": self.revision,
            "token": self.token,
            "trust_remote_code": self.trust_remote_code,
            "speculate": self.guesses,
            "cluster": self.cluster,
        }

    def keywords_of_headers(self) -> dict[str, Any]:
        """Those that say what a model is, on any machine: the memory, the device and guesses do not."""
        left_out = ("max_memory", "device_map", "max_seq_len", "cache_dtype", "speculate", "cluster")
        return {**{name: value for name, value in self.keywords().items() if name not in left_out}, "device": "cpu"}


LOADING = Only(*(field.name for field in fields(Loading) if field.name not in ("split", "max_seq_len", "cluster")))
CONVERSATION = Only("max_seq_len", *LOADING.names)
IN_STAGES = Only("cluster", *LOADING.names)
CONVERSATION_IN_STAGES = Only("cluster", *CONVERSATION.names)


@contextmanager
def loaded(model: str, loading: Loading, **keywords: Any) -> Iterator[engine.model.StreamedModel]:
    """The streamed model, closed at the end; `keywords` go to `AutoModel.from_pretrained` before those of the options. Prints the
    plan on stderr."""
    output.note(f"loading {model} ...")
    with engine.model.AutoModel.from_pretrained(model, **{**loading.keywords(), **keywords}) as streamed:
        output.note(streamed.plan.reason)
        yield streamed
