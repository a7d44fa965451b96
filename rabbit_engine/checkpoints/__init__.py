"""From a model's name to its files: the Hub, file formats, shards, and the one resolution that loading and planning share."""

from rabbit_engine.checkpoints.compression import encodings_of, shape_to_encode
from rabbit_engine.checkpoints.hub import Repo, find_repo
from rabbit_engine.checkpoints.integrity import checked_files, compare_files, record_sums
from rabbit_engine.checkpoints.packed import as_computed
from rabbit_engine.checkpoints.preparation import execute, loading_info, prepare
from rabbit_engine.checkpoints.reading import HEADERS_ONLY, WHOLE_FILES, Reading
from rabbit_engine.checkpoints.request import SHARDS_FOLDER, ModelRequest, open_request
from rabbit_engine.checkpoints.resolution import InPlace, MustSplit, Resolution, Shards, Source, Streamable, resolve
from rabbit_engine.checkpoints.shards import find_splits, read_manifest, verify_shard
from rabbit_engine.checkpoints.skeleton import Build, build_plain, require_fit

__all__ = [
    "HEADERS_ONLY",
    "SHARDS_FOLDER",
    "WHOLE_FILES",
    "Build",
    "InPlace",
    "ModelRequest",
    "MustSplit",
    "Reading",
    "Repo",
    "Resolution",
    "Shards",
    "Source",
    "Streamable",
    "as_computed",
    "build_plain",
    "checked_files",
    "compare_files",
    "encodings_of",
    "execute",
    "find_repo",
    "find_splits",
    "loading_info",
    "open_request",
    "prepare",
    "read_manifest",
    "record_sums",
    "require_fit",
    "resolve",
    "shape_to_encode",
    "verify_shard",
]
