"""Every error that this library raises on purpose.

```
RabbitError
├── ConfigurationError (ValueError)                 an invalid argument or combination of arguments
│   ├── UnknownKeywordError (TypeError)             an unknown keyword
│   ├── CompressionUnavailableError                 compression, or a checkpoint quantised in a format that is not supported
│   ├── DeviceUnavailableError                      the requested device is not on this machine
│   ├── AttentionUnavailableError                   the requested attention implementation does not work here
│   ├── ConstraintError                             a schema, regex or grammar that cannot be served; it names the part
│   ├── DraftError                                  a draft that cannot be loaded, or guess for the model: another tokenizer
│   ├── BudgetError                                 the memory budget is below the smallest that can work
│   └── PromptTooLongError                          more tokens than the model, or the memory for its cache, has room for
├── MissingExtraError (ImportError)                 an optional package is not installed
├── UnreadableFileError (OSError)                   the system cannot read a file: an I/O error, a permission
├── DamagedFileError (OSError)                      a file is truncated, replaced, or not of its format
├── CheckpointError                                 the source of the weights
│   ├── CheckpointNotFoundError (FileNotFoundError) no such repo, revision or folder, or nothing to load in it
│   ├── GatedCheckpointError (OSError)              the repo requires an accepted licence and a token
│   ├── HubUnreachableError (ConnectionError)       the Hub does not answer and the files are not in the cache
│   ├── MissingFileError (FileNotFoundError)        a file that an index names, or that existed at load, is missing
│   ├── DamagedCheckpointError (DamagedFileError)   truncated, or not of the format that its name implies
│   ├── UnsafePickleError (ValueError)              a pickle that contains more than tensors
│   ├── UnsupportedArchitectureError (ValueError)   no class builds this config, or it needs code that may not run
│   ├── MismatchedWeightsError (ValueError)         weights are missing or have another shape than the model's
│   └── TokenizerNotFoundError (OSError)            the model runs, but no tokenizer can be loaded for it
├── ShardError                                      the split weights
│   ├── NotEnoughDiskError (OSError)                checked before the first byte is written
│   ├── ShardsNotWritableError (PermissionError)    the folder for the shards is read-only
│   ├── ShardsNotFoundError (FileNotFoundError)     no split where one was requested
│   └── DamagedShardError (DamagedFileError)        size, header or checksum differ from the manifest
├── PrefixStoreError (OSError)                      the folder of stored prefixes cannot be locked or cleared
├── ClusterError (ConnectionError)                  no cluster answers, or it cannot run the model
│   ├── MachinesDifferError (ValueError)            machines have other versions of a package or of the model
│   └── StageLostError                              a machine with layers of the model is gone, and no other can take them
└── StreamingError (RuntimeError)                   while a model is loaded
    ├── WeightNotLoadedError                        a weight was used while it was not in memory
    ├── ModelClosedError                            the model was used after close()
    ├── CacheStorageError (OSError)                 keys and values of a text cannot be kept on disk
    ├── QueueFullError                              a session's queue of waiting requests is full
    ├── SessionClosedError                          a session was used after close()
    ├── TextTooLongError                            a position past those that a converted model computes exactly
    └── UnsupportedOperationError                   something a streamed model cannot do
        ├── CannotMoveError                         to(), cuda(), half(), to_empty() ...
        ├── CannotCopyError                         copy and deepcopy
        ├── CannotPickleError                       pickle, torch.save
        ├── CannotSaveError                         save_pretrained, push_to_hub
        ├── CannotLoadStateError                    load_state_dict
        ├── CannotGenerateError (TypeError)         generate of a class without a head for text
        ├── WrongHeadError (TypeError)              a task that the model has no head for
        ├── CannotMergeError                        merge_and_unload, merge_adapter
        ├── CannotResizeError                       resize_token_embeddings, set_input_embeddings ...
        ├── CannotExportError                       torch.jit.trace
        ├── FarStatesError                          a cache in blocks, of a class that computes attention itself
        └── CannotTrainError                        gradients through streamed layers
```

In parentheses are the built-in errors that each also derives from, as users of transformers catch them: what is missing or
cannot be read is an `OSError`, what is invalid is a `ValueError`.
"""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of another library's error, or its class name if the message is empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class RabbitError(Exception):
    """Root of the tree: `except RabbitError` catches everything raised here on purpose."""


class ConfigurationError(RabbitError, ValueError):
    """An argument, or a combination of arguments, is invalid."""


class UnknownKeywordError(ConfigurationError, TypeError):
    """An unknown keyword; the message names the nearest known one."""


class CompressionUnavailableError(ConfigurationError):
    """Compression, or a checkpoint quantised in a format that is not supported; the message names those that are."""


class DeviceUnavailableError(ConfigurationError):
    """The requested device is not on this machine."""


class AttentionUnavailableError(ConfigurationError):
    """The requested attention implementation does not work here; the message says why."""


class ConstraintError(ConfigurationError):
    """A schema, regular expression, list of choices or grammar cannot be served; the message names the part that cannot.

    `part` is the JSON pointer of that part of a schema ("#/properties/age"), otherwise empty.
    """

    def __init__(self, message: str, part: str = "") -> None:
        super().__init__(message)
        self.part = part


class DraftError(ConfigurationError):
    """A draft cannot be loaded, is larger than the memory for it, or cannot guess for the model: its tokenizer differs."""


class BudgetError(ConfigurationError):
    """The memory budget is too small; the message and `smallest_bytes` give the smallest that works."""

    def __init__(self, message: str, smallest_bytes: int = 0) -> None:
        super().__init__(message)
        self.smallest_bytes = smallest_bytes


class PromptTooLongError(ConfigurationError):
    """A prompt and its answer are longer than the model's positions, or than the memory for its cache allows. `tokens` is what
    they need at least, and `most` what fits, if that is known."""

    def __init__(self, message: str, *, tokens: int | None = None, most: int | None = None) -> None:
        super().__init__(message)
        self.tokens, self.most = tokens, most


class MissingExtraError(RabbitError, ImportError):
    """An optional package is not installed; the message names the extra."""


class UnreadableFileError(RabbitError, OSError):
    """The system cannot read a file of the model; the message gives its error."""


class DamagedFileError(RabbitError, OSError):
    """A file of the model is truncated, was replaced, or is not of its format; raised as one of its subclasses."""


class CheckpointError(RabbitError):
    """Something is wrong with the source of the weights."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """No such repo, revision or folder, or nothing in it that can be loaded."""


class GatedCheckpointError(CheckpointError, OSError):
    """The repo requires an accepted licence and a token."""


class HubUnreachableError(CheckpointError, ConnectionError):
    """The Hub does not answer (or downloads are off) and the files are not in the cache."""


class MissingFileError(CheckpointError, FileNotFoundError):
    """A file that an index names, or that existed at load, is missing."""


class DamagedCheckpointError(CheckpointError, DamagedFileError):
    """A file of the checkpoint is truncated, or not of the format that its name implies."""


class UnsafePickleError(CheckpointError, ValueError):
    """A pickle that contains more than tensors; it was not loaded."""


class UnsupportedArchitectureError(CheckpointError, ValueError):
    """No installed class builds this config, or it needs code that was not allowed to run."""


class MismatchedWeightsError(CheckpointError, ValueError):
    """Weights are missing, or have another shape than the model's."""


class TokenizerNotFoundError(CheckpointError, OSError):
    """The checkpoint holds no tokenizer, or none that can be loaded; the model itself runs."""


class ShardError(RabbitError):
    """Something is wrong with the split weights."""


class NotEnoughDiskError(ShardError, OSError):
    """The disk has too little space; checked before the first byte is written."""


class ShardsNotWritableError(ShardError, PermissionError):
    """The folder for the shards is not writable."""


class ShardsNotFoundError(ShardError, FileNotFoundError):
    """There is no split where one was requested."""


class DamagedShardError(ShardError, DamagedFileError):
    """A shard's size, header or checksum differs from its manifest."""


class PrefixStoreError(RabbitError, OSError):
    """The folder of a prefix store is locked by another process, or cannot be cleared."""


class ClusterError(RabbitError, ConnectionError):
    """No cluster answers at the address, or it cannot run what was asked."""


class MachinesDifferError(ClusterError, ValueError):
    """Machines of a cluster have other versions of a package, or of the model; the message names them."""


class StageLostError(ClusterError):
    """A machine that held layers of a model is gone, and no other can take them; the message says what is missing."""


class StreamingError(RabbitError, RuntimeError):
    """Something went wrong while a model is loaded."""


class CacheStorageError(StreamingError, OSError):
    """The keys and values of a text cannot be written to the disk or read from it: it is full, or failing."""


class WeightNotLoadedError(StreamingError):
    """A weight was used while it was not in memory; the message names it."""


class ModelClosedError(StreamingError):
    """The model was used after `close()` or the end of its `with` block."""


class QueueFullError(StreamingError):
    """A session's queue of waiting requests is full; a slot is likely to be free in `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class SessionClosedError(StreamingError):
    """A session was used after `close()`, or was closed before the answer was complete."""


class TextTooLongError(StreamingError):
    """A text is longer than the positions up to which a converted model matches its family's own code."""


class UnsupportedOperationError(StreamingError):
    """Something a streamed model cannot do; the message says what to do instead."""


class CannotMoveError(UnsupportedOperationError):
    """Moving or casting a streamed model."""


class CannotCopyError(UnsupportedOperationError):
    """Copying a streamed model."""


class CannotPickleError(UnsupportedOperationError):
    """Pickling a streamed model."""


class CannotSaveError(UnsupportedOperationError):
    """Saving a streamed model: its weights are on disk already."""


class CannotLoadStateError(UnsupportedOperationError):
    """Loading a state dict into a streamed model."""


class CannotGenerateError(UnsupportedOperationError, TypeError):
    """Generating text with a class that has no head for it."""


class WrongHeadError(UnsupportedOperationError, TypeError):
    """A task that the model has no head for; the message says what its head computes."""


class CannotMergeError(UnsupportedOperationError):
    """Merging an adapter into weights that are read again in every pass."""


class CannotResizeError(UnsupportedOperationError):
    """Replacing or resizing the embeddings of a streamed model."""


class CannotExportError(UnsupportedOperationError):
    """Tracing a streamed model: its weights would be recorded as whatever the memory holds at that moment."""


class FarStatesError(UnsupportedOperationError):
    """A class computes with the states of a cache in blocks by other code than transformers' attention functions."""


class CannotTrainError(UnsupportedOperationError):
    """Gradients through streamed layers: slots are overwritten before the backward pass."""
