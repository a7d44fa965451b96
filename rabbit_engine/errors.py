"""Every error this library raises on purpose.

```
RabbitError
├── ConfigurationError (ValueError)                 what the caller asked for cannot be
│   ├── UnknownKeywordError (TypeError)             a keyword nobody knows
│   ├── CompressionUnavailableError                 compression and quantised checkpoints: not in this version
│   ├── DeviceUnavailableError                      the device asked for is not on this machine
│   ├── AttentionUnavailableError                   the attention implementation asked for does not work here
│   ├── BudgetError                                 the memory budget is below the smallest that can work
│   └── PromptTooLongError                          more tokens than the model, or the memory for its cache, has room for
├── MissingExtraError (ImportError)                 an optional package is not installed
├── UnreadableFileError (OSError)                   the disk or the system refuses a file: an I/O error, a permission
├── DamagedFileError (OSError)                      a file is cut off, replaced, or not of its format
├── CheckpointError                                 the source of the weights
│   ├── CheckpointNotFoundError (FileNotFoundError) no such repo, revision or folder, or nothing to load in it
│   ├── GatedCheckpointError (OSError)              the repo wants an accepted licence and a token
│   ├── HubUnreachableError (ConnectionError)       the Hub does not answer and the files are not in the cache
│   ├── MissingFileError (FileNotFoundError)        a file that an index names, or that was there at load, is gone
│   ├── DamagedCheckpointError (DamagedFileError)   cut off, or not the format its name says
│   ├── UnsafePickleError (ValueError)              a pickle that wants more than tensors
│   ├── UnsupportedArchitectureError (ValueError)   no class builds this config, or it needs code we may not run
│   ├── MismatchedWeightsError (ValueError)         weights missing or of another shape than the model's
│   └── TokenizerNotFoundError (OSError)            the model runs, but nothing here can make it a tokenizer
├── ShardError                                      the split weights
│   ├── NotEnoughDiskError (OSError)                counted before the first byte is written
│   ├── ShardsNotWritableError (PermissionError)    the folder for the shards is read-only
│   ├── ShardsNotFoundError (FileNotFoundError)     no split where one was asked for
│   └── DamagedShardError (DamagedFileError)        size, header or checksum differ from the manifest
└── StreamingError (RuntimeError)                   while a model is loaded
    ├── WeightNotLoadedError                        a weight was used while it was away
    ├── ModelClosedError                            the model was used after close()
    ├── QueueFullError                              a session has as many requests waiting as it takes
    ├── SessionClosedError                          a session was used after close()
    ├── TextTooLongError                            a position past those that a converted model computes right
    └── UnsupportedOperationError                   something a streamed model cannot do
        ├── CannotMoveError                         to(), cuda(), half(), to_empty() ...
        ├── CannotCopyError                         copy and deepcopy
        ├── CannotPickleError                       pickle, torch.save
        ├── CannotSaveError                         save_pretrained, push_to_hub
        ├── CannotLoadStateError                    load_state_dict
        ├── CannotMergeError                        merge_and_unload, merge_adapter
        ├── CannotResizeError                       resize_token_embeddings, set_input_embeddings ...
        ├── CannotExportError                       torch.jit.trace
        └── CannotTrainError                        gradients through streamed layers
```

In parentheses are the built-in errors that each is besides, as users of transformers catch them: what is missing or cannot be
read is an `OSError`, what cannot be is a `ValueError`.
"""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line; its class where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class RabbitError(Exception):
    """Root of the tree: `except RabbitError` catches everything raised here on purpose."""


class ConfigurationError(RabbitError, ValueError):
    """What the caller asked for cannot be."""


class UnknownKeywordError(ConfigurationError, TypeError):
    """A keyword nobody knows; the message names the nearest known one."""


class CompressionUnavailableError(ConfigurationError):
    """Compression, or a checkpoint that is quantised already: not in this version."""


class DeviceUnavailableError(ConfigurationError):
    """The device asked for is not on this machine."""


class AttentionUnavailableError(ConfigurationError):
    """The attention implementation asked for does not work here; the message says why."""


class BudgetError(ConfigurationError):
    """The memory budget cannot work; the message says the smallest that can, `smallest_bytes` holds it."""

    def __init__(self, message: str, smallest_bytes: int = 0) -> None:
        super().__init__(message)
        self.smallest_bytes = smallest_bytes


class PromptTooLongError(ConfigurationError):
    """A prompt and its answer are longer than the model's positions, or than the memory for its cache allows."""


class MissingExtraError(RabbitError, ImportError):
    """An optional package is not installed; the message names the extra."""


class UnreadableFileError(RabbitError, OSError):
    """The system refuses to read a file of the model; the message says what it answered."""


class DamagedFileError(RabbitError, OSError):
    """A file of the model is cut off, was replaced, or is not of its format; callers see it as one of its subclasses."""


class CheckpointError(RabbitError):
    """Something is wrong with the source of the weights."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """No such repo, revision or folder, or nothing in it that can be loaded."""


class GatedCheckpointError(CheckpointError, OSError):
    """The repo wants an accepted licence and a token."""


class HubUnreachableError(CheckpointError, ConnectionError):
    """The Hub does not answer (or must not be asked) and the files are not in the cache."""


class MissingFileError(CheckpointError, FileNotFoundError):
    """A file that an index names is not there, or one that was there at load is gone."""


class DamagedCheckpointError(CheckpointError, DamagedFileError):
    """A file of the checkpoint is cut off or is not the format its name says."""


class UnsafePickleError(CheckpointError, ValueError):
    """A pickle that wants more than tensors; it was not loaded."""


class UnsupportedArchitectureError(CheckpointError, ValueError):
    """No installed class builds this config, or it needs code that was not allowed to run."""


class MismatchedWeightsError(CheckpointError, ValueError):
    """Weights are missing, or have another shape than the model's."""


class TokenizerNotFoundError(CheckpointError, OSError):
    """The checkpoint holds no tokenizer, or none that can be loaded; the model itself runs."""


class ShardError(RabbitError):
    """Something is wrong with the split weights."""


class NotEnoughDiskError(ShardError, OSError):
    """The disk has no room; counted before the first byte is written."""


class ShardsNotWritableError(ShardError, PermissionError):
    """The folder for the shards cannot be written."""


class ShardsNotFoundError(ShardError, FileNotFoundError):
    """There is no split where one was asked for."""


class DamagedShardError(ShardError, DamagedFileError):
    """A shard's size, header or checksum differs from its manifest."""


class StreamingError(RabbitError, RuntimeError):
    """Something went wrong while a model is loaded."""


class WeightNotLoadedError(StreamingError):
    """A weight was used while it was away; the message names it."""


class ModelClosedError(StreamingError):
    """The model was used after `close()` or the end of its `with` block."""


class QueueFullError(StreamingError):
    """A session has as many requests waiting as it takes; one is likely to be done in `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class SessionClosedError(StreamingError):
    """A session was used after `close()`, or closed before the answer was there."""


class TextTooLongError(StreamingError):
    """A text longer than the positions that a converted model computes as its family's own code does."""


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


class CannotMergeError(UnsupportedOperationError):
    """Merging an adapter into weights that are read anew every pass."""


class CannotResizeError(UnsupportedOperationError):
    """Other embeddings, or of another size, in a model whose weights are streamed."""


class CannotExportError(UnsupportedOperationError):
    """Tracing a streamed model: its weights would be recorded as what the memory holds at that moment."""


class CannotTrainError(UnsupportedOperationError):
    """Gradients through streamed layers: slots are overwritten behind autograd's back."""
