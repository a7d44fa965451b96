"""The streamed model: transformers' own class with streamed weights. The only module that subclasses it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, Self, TypeVar, cast

import torch
from transformers import AutoTokenizer, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase

from rabbit_engine.architectures import capped_length, keeps_tuples
from rabbit_engine.checkpoints import Streamable
from rabbit_engine.decoding import Heads
from rabbit_engine.errors import (
    CannotCopyError,
    CannotGenerateError,
    CannotLoadStateError,
    CannotMoveError,
    CannotPickleError,
    CannotResizeError,
    CannotSaveError,
    MissingExtraError,
    RabbitError,
    TokenizerNotFoundError,
    first_line,
)
from rabbit_engine.model.adapters import load_checked
from rabbit_engine.model.admission import admitted, prompt_of
from rabbit_engine.model.assembly import Assembly
from rabbit_engine.model.drafts import DraftLoader
from rabbit_engine.model.long_prompts import LongPromptMixin
from rabbit_engine.model.protocols import Decoder
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.model.speculating import SpeculatingMixin, decode, parse_speculate, watched_preparation
from rabbit_engine.model.tiered_caches import make_cache, making_pairs, put_in_tiers
from rabbit_engine.planning.plan import Plan
from rabbit_engine.streaming import PassProgress, Placeholder, Profile, move
from rabbit_engine.tokenization import build_tokenizer, load_gguf_tokenizer
from rabbit_engine.transformers_bridge.attention import attention_of, wrapped_attention
from rabbit_engine.transformers_bridge.generation import (
    around_decoding,
    around_new_caches,
    own_cache,
    settings_of,
    without_cache_objects,
)
from rabbit_engine.transformers_bridge.grouped_heads import with_shared_keys
from rabbit_engine.utils.foreign import foreign_code

Method = TypeVar("Method", bound=Callable[..., Any])


def _documented_as(original: Callable[..., Any]) -> Callable[[Method], Method]:
    """`functools.wraps`, with the method's own type."""
    return cast("Callable[[Method], Method]", functools.wraps(original))


class StreamingMixin(SpeculatingMixin, LongPromptMixin):
    """What a streamed model adds to its transformers class, and what it refuses.

    `close()`, the end of a `with` block, or garbage collection ends its thread and frees its memory.
    """

    _assembly: Assembly
    _checkpoint: Streamable
    _tokenizer_source: Mapping[str, Any]
    _own_tokenizer: Any = None
    _attention_reason: str
    _draft_loader: DraftLoader

    @property
    def plan(self) -> Plan:
        """What is resident, streamed and read by row, and the memory it takes."""
        return self._assembly.plan

    @property
    def profile(self) -> Profile:
        """Passes, units, bytes and seconds since the model was loaded; those of layers on other devices of this machine too."""
        return self._assembly.profile()

    @property
    def progress(self) -> PassProgress | None:
        """The progress of the running pass, to display from another thread; None between passes."""
        return self._assembly.binding.passes.progress()

    @property
    def active_attention_implementation(self) -> str:
        """The attention implementation in use: "flash_attention_2", "sdpa" or "eager"."""
        return str(attention_of(self.config))  # type: ignore[attr-defined]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer, loaded on first use; it can be set. Raises TokenizerNotFoundError."""
        if self._own_tokenizer is None:
            with _LOADING_TOKENIZER:
                if self._own_tokenizer is None:
                    header = self._checkpoint.request.gguf
                    checksum = None if header is None else header.checksum
                    converted = self._checkpoint.architecture.tokenizer
                    self._own_tokenizer = load_tokenizer(converted, self._tokenizer_source, checksum)
        return self._own_tokenizer  # type: ignore[no-any-return]

    @tokenizer.setter
    def tokenizer(self, tokenizer: Decoder) -> None:
        self._own_tokenizer = tokenizer

    def load_draft(self, name: str | Path | None, compression: str | None) -> PreTrainedModel:
        """A model that guesses for this one, in memory that is free: see `decoding.TargetModel`. Raises DraftError."""
        return self._draft_loader(name, compression)

    def load_heads(self) -> Heads:
        """The checkpoint's multi-token heads: see `decoding.TargetModel`. Raises DraftError."""
        self.watch_states()
        return self._draft_loader.load_heads()

    def close(self) -> None:
        """End the reader's thread and free the weights' memory, also of drafts that were loaded for it. Idempotent.

        Using the model then raises.
        """
        self._assembly.close()
        self._draft_loader.close()

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._assembly.transfer.closed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @_documented_as(GenerationMixin.generate)
    def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`, with its tensors moved to the model's device.

        A converted model that is exact up to a number of positions ends its answer there. Stop strings and token healing
        work without passing a tokenizer. `speculate="auto"`, or a draft, guesses several tokens a pass; the text stays the
        same. `use_mtp=True` is `speculate=MultiTokenHeads()`. Raises PromptTooLongError, before anything is computed, if the
        caches and activations need more memory than is free, and CannotGenerateError for a class without a head for it.
        """
        if not self.can_generate():  # type: ignore[attr-defined]
            raise CannotGenerateError(f"{type(self).__name__} does not generate text: call the model itself for its outputs")
        speculate = parse_speculate(kwargs.pop("speculate", self._speculate))
        device = self._assembly.device
        positions = self._checkpoint.architecture.positions
        prompt = prompt_of(inputs, kwargs, self.main_input_name)  # type: ignore[attr-defined]
        config = args[0] if args and args[0] is not None else kwargs.get("generation_config")
        asked = settings_of(kwargs, config, self.generation_config)  # type: ignore[attr-defined]
        if "tokenizer" not in kwargs and any(asked(name) for name in _NEED_TOKENIZER):
            kwargs["tokenizer"] = self.tokenizer
        if asked("use_mtp"):
            speculate, kwargs["use_mtp"] = speculate or self._own_heads, False
        if positions is not None and prompt is not None:
            kwargs |= capped_length(positions, prompt.shape[1], asked)
        demand = admitted(runtime_of(self), prompt, kwargs, asked)
        if demand.chunk is not None and asked("prefill_chunk_size") is not None:
            kwargs["prefill_chunk_size"] = None  # transformers would read the weights for each chunk
        cache = make_cache(runtime_of(self), demand)
        kwargs |= own_cache(self.forward, cache, assists=bool(asked("is_assistant")))  # type: ignore[attr-defined]
        with (
            self._speculating(speculate),
            self.computing_parts(demand.chunk),
            making_pairs(self, demand),
            wrapped_attention(with_shared_keys),
        ):
            positional = () if inputs is None and not args else (move(inputs, device), *args)  # some classes name it otherwise
            return super().generate(*positional, **move(kwargs, device))  # type: ignore[misc]

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """transformers' `get_memory_footprint`: bytes of the weights, quantised ones as they are stored."""
        entries = self._assembly.partition.weights.entries.values()
        saved = {entry.name: entry.decoded_bytes - entry.nbytes for entry in entries if entry.is_encoded}
        footprint: int = super().get_memory_footprint(return_buffers)  # type: ignore[misc]
        return footprint - sum(saved.values())

    def load_adapter(self, peft_model_id: object = None, adapter_name: str | None = None, *args: object, **kwargs: object) -> Any:
        """transformers' `load_adapter`.

        Raises CannotLoadStateError if a converted model has other modules than those the adapter was trained on, for an
        adapter of experts that are read one by one, and for one that contains other values of a streamed weight. Raises
        WeightNotLoadedError, which names the kind of adapter (DoRA, PiSSA ...), for one that reads streamed weights, or those of
        layers that run elsewhere.
        """
        load = functools.partial(super().load_adapter, peft_model_id, adapter_name, *args, **kwargs)  # type: ignore[misc]
        return load_checked(self, load, adapter_name or "default", peft_model_id, kwargs)

    def tie_weights(self, *args: object, **kwargs: object) -> None:
        """Do nothing while weights are streamed: those that the checkpoint ties are already shared."""
        if not _streams(self):
            super().tie_weights(*args, **kwargs)  # type: ignore[misc]

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: object, **kwargs: object
    ) -> Any:
        """transformers' `resize_token_embeddings`; raises CannotResizeError if weights are streamed and the size changes."""
        now = self.get_input_embeddings().weight.shape[0]  # type: ignore[attr-defined]
        step = pad_to_multiple_of or 1
        wanted = -(-(new_num_tokens or now) // step) * step
        if wanted != now and _streams(self):
            raise CannotResizeError(
                f"cannot resize the embeddings from {now} to {wanted} tokens: they are streamed from disk. Resize with "
                "transformers.AutoModelForCausalLM, save, and load the result; for padding alone set "
                "tokenizer.pad_token = tokenizer.eos_token"
            )
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, *args, **kwargs)  # type: ignore[misc]

    def set_input_embeddings(self, value: object) -> None:
        """transformers' `set_input_embeddings`; raises CannotResizeError for another module while weights are streamed."""
        _refuse_other(self, value, self.get_input_embeddings())  # type: ignore[attr-defined]
        super().set_input_embeddings(value)  # type: ignore[misc]

    def set_output_embeddings(self, new_embeddings: object) -> None:
        """transformers' `set_output_embeddings`; raises CannotResizeError for another module while weights are streamed."""
        _refuse_other(self, new_embeddings, self.get_output_embeddings())  # type: ignore[attr-defined]
        super().set_output_embeddings(new_embeddings)  # type: ignore[misc]

    def get_compiled_call(self, *_: object, **__: object) -> Any:
        """The call itself, not compiled: streamed weights are not loaded when a compiler looks."""
        return self.__call__

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:  # noqa: ARG002 - torch's own
        """torch's `_apply`, which a module that contains the model calls to move all of its parts: do nothing if a tensor of
        the model's device and dtype stays the same. Raises CannotMoveError."""
        probe = torch.empty(0, dtype=self._checkpoint.dtype, device=self._assembly.device)
        shared = probe.is_shared()
        return self if fn(probe) is probe and probe.is_shared() == shared else self._refuse_move()

    def _refuse_move(self) -> NoReturn:
        raise CannotMoveError(
            f"a streamed model stays on {self._assembly.device} in {self._checkpoint.dtype}: "
            "load it with the device= and dtype= you need; a pipeline over it takes device=model.device"
        )

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Allowed only for the model's own device and dtype. Raises CannotMoveError."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        same_device = device is None or torch.device(device.type, device.index or 0) == _indexed(self._assembly.device)
        if same_device and dtype in (None, self._checkpoint.dtype):
            return self
        return self._refuse_move()

    def cuda(self, device: object = None) -> Self:
        """`to` a CUDA device."""
        return self.to(torch.device("cuda", device) if isinstance(device, int) else device or "cuda")

    def cpu(self) -> Self:
        """`to("cpu")`."""
        return self.to("cpu")

    def half(self, *_: object) -> Self:
        """`to(torch.float16)`."""
        return self.to(torch.float16)

    def float(self, *_: object) -> Self:
        """`to(torch.float32)`."""
        return self.to(torch.float32)

    def bfloat16(self) -> Self:
        """`to(torch.bfloat16)`."""
        return self.to(torch.bfloat16)

    def double(self) -> Self:
        """`to(torch.float64)`."""
        return self.to(torch.float64)

    def type(self, dst_type: object) -> Self:
        """Raises CannotMoveError unless it is the model's own dtype."""
        return self.to(dst_type) if isinstance(dst_type, torch.dtype) else self._refuse_move()

    def to_empty(self, **_: object) -> NoReturn:
        """Raises CannotMoveError."""
        self._refuse_move()

    def __copy__(self) -> NoReturn:
        raise CannotCopyError("a streamed model owns a thread and slots: load it a second time instead of copying it")

    def __deepcopy__(self, memo: object) -> NoReturn:
        self.__copy__()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise CannotPickleError("a streamed model cannot be pickled: send its name, and load it where it is needed")

    def save_pretrained(self, *_: object, **__: object) -> NoReturn:
        """Raises CannotSaveError."""
        raise CannotSaveError(
            f"the weights of a streamed model are already on disk, in {self._checkpoint.folder}: copy the original checkpoint "
            "or that folder; an adapter is saved by PeftModel.save_pretrained"
        )

    def push_to_hub(self, *_: object, **__: object) -> NoReturn:
        """Raises CannotSaveError."""
        self.save_pretrained()

    def load_state_dict(self, *_: object, **__: object) -> NoReturn:
        """Raises CannotLoadStateError."""
        raise CannotLoadStateError(
            "the weights of a streamed model are read from its shards: save them as a checkpoint and load that; "
            "load an adapter with model.load_adapter"
        )


_NEED_TOKENIZER = ("stop_strings", "token_healing")
"""Of a generation config."""

_LOADING_TOKENIZER = threading.RLock()
"""Threads that request a tokenizer at once get the same one; loading it from a GGUF file takes seconds."""


def _streams(model: Any) -> bool:
    """Whether any weight of the model is not loaded between passes."""
    return any(isinstance(weight, Placeholder) for weight in model.parameters())


def _refuse_other(model: object, module: object, present: object) -> None:
    if module is not present and _streams(model):
        raise CannotResizeError(
            "cannot replace the embeddings of a model whose weights are streamed: change and save it with "
            "transformers.AutoModelForCausalLM, and load the result"
        )


def _indexed(device: torch.device) -> torch.device:
    return torch.device(device.type, device.index or 0)


def load_tokenizer(converted: str | None, source: Mapping[str, Any], header_checksum: str | None = None) -> Any:
    """The tokenizer of the checkpoint's folder: built from the files of a converted family, else from `AutoTokenizer`.

    A GGUF file with that checksum of its header is converted only once.

    A tokenizer.json next to them takes precedence: the files were converted already. Raises TokenizerNotFoundError or
    MissingExtraError.
    """
    folder = Path(source["pretrained_model_name_or_path"])
    with foreign_code(functools.partial(_no_tokenizer, folder)):
        if header_checksum is not None:
            return _checked(load_gguf_tokenizer(source, header_checksum), folder)
        if converted is None:
            return _checked(AutoTokenizer.from_pretrained(**source), folder)
        if (folder / "tokenizer.json").is_file():
            return _checked(AutoTokenizer.from_pretrained(**{**source, "trust_remote_code": False}), folder)
        return build_tokenizer(converted, folder)


def _no_tokenizer(folder: Path, error: Exception) -> RabbitError:
    if isinstance(error, ImportError):
        return MissingExtraError(f"the tokenizer needs a package that is not installed: {error}")
    return TokenizerNotFoundError(
        f"{folder} has no tokenizer that can be loaded ({first_line(error)}), "
        "but the model itself runs: set model.tokenizer, or pass token ids"
    )


def _checked(tokenizer: object, folder: Path) -> Any:
    """The tokenizer, if its maximum length is a number, which it compares with every text. Raises TokenizerNotFoundError."""
    most = getattr(tokenizer, "model_max_length", 0)
    if not isinstance(most, int | float):
        raise TokenizerNotFoundError(
            f"{folder}/tokenizer_config.json has model_max_length={most!r}, which is not a number: fix it or download it again; "
            "the model itself runs, with token ids or another model.tokenizer"
        )
    return tokenizer


@functools.cache
def streamed_class(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass of the real class, under its own name and module: transformers picks conversions and kernels by both.

    Remote code that keeps its cache in tuples creates it itself: `generate` passes it none.
    """
    own: dict[str, object] = {
        "__module__": cls.__module__,
        **around_decoding(cls, decode),
        **around_new_caches(cls, put_in_tiers),
    }
    if hasattr(cls, "prepare_inputs_for_generation"):
        own["prepare_inputs_for_generation"] = watched_preparation(cls)
    made = type(cls.__name__, (StreamingMixin, cls), own)
    return without_cache_objects(made) if keeps_tuples(cls) else made
