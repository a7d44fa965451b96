"""One random change of one file: its bytes, its JSON, or the header that its format has."""

from __future__ import annotations

import io
import json
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
HTML = b"<!DOCTYPE html><html><head><title>Sign in</title></head><body>Please sign in</body></html>"
INTERESTING = (0, 1, 2, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


@dataclass(frozen=True, slots=True)
class Place:
    """The file to change, the randomness to change it with, and a file outside the checkpoint to name."""

    path: Path
    rng: random.Random
    outside: Path


def mutate(place: Place) -> str:
    """Change the file; returns what was done."""
    suffix = place.path.suffix
    own = {".json": [json_value] * 8, ".safetensors": [header_value] * 6 + [saved_anew] * 2}
    own |= {".bin": [pickled_anew] * 3 + [cut] * 2, ".gguf": [number_in_header] * 5 + [flip_in_header] * 3 + [cut]}
    anywhere: list[Callable[[Place], str]] = [cut, flip, overwrite, stand_in, stand_in, grow]
    return place.rng.choice([*own.get(suffix, []), *anywhere])(place)


def cut(place: Place) -> str:
    """Truncate anywhere; often near the beginning."""
    size = place.path.stat().st_size
    length = place.rng.randrange(min(size, place.rng.choice((16, 400, size))))
    place.path.write_bytes(place.path.read_bytes()[:length])
    return f"cut to {length} of {size} bytes"


def grow(place: Place) -> str:
    """Append bytes."""
    extra = place.rng.randbytes(place.rng.choice((1, 8, 4096)))
    place.path.write_bytes(place.path.read_bytes() + extra)
    return f"{len(extra)} bytes too many"


def flip(place: Place) -> str:
    """Flip one to four bits. In a shard only those of its header: `rabbit verify` covers its data."""
    raw = bytearray(place.path.read_bytes())
    return _flip(place, raw, _checked_bytes(place.path, raw))


def flip_in_header(place: Place) -> str:
    """Flip bits of a GGUF file's header."""
    raw = bytearray(place.path.read_bytes())
    return _flip(place, raw, min(len(raw), 2600))


def _flip(place: Place, raw: bytearray, end: int) -> str:
    bits = [place.rng.randrange(8 * end) for _ in range(place.rng.randint(1, 4))] if end else []
    for bit in bits:
        raw[bit // 8] ^= 1 << bit % 8
    place.path.write_bytes(raw)
    return f"flipped bits {bits}"


def overwrite(place: Place) -> str:
    """Random or zero bytes over a range."""
    raw = bytearray(place.path.read_bytes())
    end = _checked_bytes(place.path, raw)
    start = place.rng.randrange(end or 1)
    length = min(place.rng.choice((1, 4, 64)), end - start)
    raw[start : start + length] = place.rng.choice((bytes(length), place.rng.randbytes(length)))
    place.path.write_bytes(raw)
    return f"overwrote {length} bytes at {start}"


def _checked_bytes(path: Path, raw: bytearray) -> int:
    """The part of the file that is checked when it is loaded: all of it, or a shard's header."""
    is_shard = path.suffix == ".safetensors" and "rabbit_shards" in path.parts
    return 8 + int.from_bytes(raw[:8], "little") if is_shard else len(raw)


def stand_in(place: Place) -> str:
    """Replace it with something else."""
    what = place.rng.choice(("nothing", "empty", "folder", "pointer", "page", "noise", "dangling link"))
    place.path.unlink()
    contents = {"empty": b"", "pointer": LFS_POINTER, "page": HTML, "noise": place.rng.randbytes(300)}
    if what == "folder":
        place.path.mkdir()
    elif what == "dangling link":
        place.path.symlink_to(place.path.with_name("gone"))
    elif what in contents:
        place.path.write_bytes(contents[what])
    return f"{what} in its place"


def json_value(place: Place) -> str:
    """Change one to three values or keys, anywhere."""
    try:
        tree = json.loads(place.path.read_bytes())
    except ValueError:
        return cut(place)
    text, done = _changed_json(tree, place)
    place.path.write_bytes(text)
    return done


def header_value(place: Place) -> str:
    """The same in the header of a safetensors file; or the header's length."""
    raw = place.path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    if place.rng.random() < 0.1:
        claimed = place.rng.choice(INTERESTING)
        place.path.write_bytes(claimed.to_bytes(8, "little") + raw[8:])
        return f"header length {claimed}"
    text, done = _changed_json(json.loads(raw[8 : 8 + size]), place)
    place.path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    return f"header: {done}"


def _changed_json(tree: Any, place: Place) -> tuple[bytes, str]:
    if place.rng.random() < 0.06:
        text, done = place.rng.choice(
            ((b"[" * 100_000, "nested deep"), (b'{"a": ' * 50_000 + b"1" + b"}" * 50_000, "objects nested deep"))
        )
        return text, done
    if place.rng.random() < 0.06:
        value = strange(None, place)
        return json.dumps(value).encode(), f"all of it is {str(value)[:40]!r}"
    if place.rng.random() < 0.04 and isinstance(tree, dict):
        key = place.rng.choice(list(tree))
        return f"{json.dumps(tree)[:-1]}, {json.dumps(key)}: {json.dumps(strange(tree[key], place))}}}".encode(), f"{key} twice"
    changes = [_change(tree, place) for _ in range(place.rng.choice((1, 1, 1, 2, 3)))]
    return json.dumps(tree).encode(), "; ".join(changes)


def _change(tree: Any, place: Place) -> str:
    """Replace, remove, rename or add one thing."""
    holders = [holder for holder in _holders(tree) if holder]
    if not holders:
        return "nothing to change"
    holder = place.rng.choice(holders[:1] * 3 + holders)
    key = place.rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    what = place.rng.choice(("replace", "replace", "replace", "remove", "rename", "add"))
    if what == "remove":
        del holder[key]
        return f"removed {key!r}"
    if isinstance(holder, dict) and what == "rename":
        other = place.rng.choice((f"{key}x", "", place.rng.choice(list(holder)), str(place.outside)))
        holder[other] = holder.pop(key)
        return f"renamed {key!r} to {other!r}"
    if what == "add":
        value = strange(holder[key], place)
        if isinstance(holder, dict):
            holder[f"{key}.more"] = value
        else:
            holder.append(value)
        return f"added {str(value)[:60]!r} to {str(key)[:60]!r}"
    old, holder[key] = holder[key], strange(holder[key], place)
    return f"{key!r}: {str(old)[:60]!r} -> {str(holder[key])[:60]!r}"


def _holders(tree: Any) -> list[Any]:
    if not isinstance(tree, dict | list):
        return []
    below = tree.values() if isinstance(tree, dict) else tree
    return [tree, *(holder for value in below for holder in _holders(value))]


def strange(value: Any, place: Place) -> Any:
    """A value of another type or size than `value`."""
    names = (
        str(place.outside),
        "../outside/precious.txt",
        "../../outside/precious.txt",
        "~/x",
        "a\0b",
        "\ud800",
        "x" * 5000,
        "",
        "no.such",
    )
    numbers = (-1, 0, 1, 1.5, 1e400, float("nan"), 10**30, 3_000_000, 2**63, -(2**63))
    pool: list[Any] = [*numbers, *names, None, True, False, [], {}, [value], {"a": value}, [[[[[[[[]]]]]]]], str(value)]
    if isinstance(value, int | float) and not isinstance(value, bool):
        pool += [float(value), -value, value + 1, value * 1000, bool(value), f"{value}"] * 2
    if isinstance(value, list):
        pool += [value[:-1], value[::-1], [float(v) if isinstance(v, int) else v for v in value], value * 2] * 2
    return place.rng.choice(pool)


def number_in_header(place: Place) -> str:
    """A special number over four or eight bytes of a GGUF file's header."""
    raw = bytearray(place.path.read_bytes())
    width = place.rng.choice((4, 8))
    at = place.rng.choice((4, 8, 16, place.rng.randrange(min(2600, len(raw) - 8))))
    number = place.rng.choice(INTERESTING) % 2 ** (8 * width)
    raw[at : at + width] = number.to_bytes(width, "little")
    place.path.write_bytes(raw)
    return f"{number} in {width} bytes at {at}"


def saved_anew(place: Place) -> str:
    """A whole safetensors file with one tensor of another dtype, shape or name."""
    from safetensors.torch import load_file, save_file

    state = load_file(place.path)
    done = _change_tensors(state, place.rng)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, place.path, metadata={"format": "pt"})
    return done


def pickled_anew(place: Place) -> str:
    """A whole pickle of something other than named tensors."""
    state: Any = torch.load(place.path, weights_only=True)
    key = place.rng.choice(list(state))
    others: dict[str, Any] = {
        "a list": [1, 2],
        "a tensor": state[key],
        "nothing": None,
        "nested": {"state_dict": state},
        "keys that are numbers": dict(enumerate(state.values())),
        "a key that is a number": {**state, 7: state[key]},
        "a value that is a number": {**state, key: 1.5},
        "a value that is a list": {**state, key: [state[key]]},
        "sparse": {**state, key: state[key].to_sparse()},
        "on the meta device": {**state, key: state[key].to("meta")},
        "a parameter": {**state, key: torch.nn.Parameter(state[key])},
        "not contiguous": {**state, key: state[key].t()} if state[key].dim() == 2 else state,
        "expanded": {**state, key: state[key][:1].expand_as(state[key])},
    }
    name = place.rng.choice([*others, "tensors", "tensors", "plain pickle", "old format"])
    if name == "tensors":
        name = _change_tensors(state, place.rng)
    elif name == "plain pickle":
        place.path.write_bytes(pickle.dumps({"a": 1}))
        return name
    buffer = io.BytesIO()
    torch.save(others.get(name, state), buffer, _use_new_zipfile_serialization=name != "old format")
    place.path.write_bytes(buffer.getvalue())
    return name


def _change_tensors(state: dict[str, torch.Tensor], rng: random.Random) -> str:
    key = rng.choice(list(state))
    tensor = state[key]
    dtypes = (torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn)
    what = rng.choice(("dtype", "dtype", "all dtypes", "shape", "gone", "renamed", "extra", "empty", "scalar"))
    if what == "dtype":
        state[key] = tensor.to(dtype := rng.choice(dtypes))
        return f"{key} as {dtype}"
    if what == "all dtypes":
        dtype = rng.choice(dtypes)
        state.update({name: value.to(dtype) for name, value in state.items()})
        return f"all tensors as {dtype}"
    changed = {"shape": tensor.reshape(-1), "empty": tensor.reshape(-1)[:0], "scalar": tensor.reshape(-1)[0].clone()}
    if what in changed:
        state[key] = changed[what].clone()
    elif what == "extra":
        state["model.extra.weight"] = tensor.clone()
    else:
        state |= {} if what == "gone" else {f"{key}x": tensor}
        del state[key]
    return f"{key}: {what}"


def precious(outside: Path) -> Path:
    """A folder outside the checkpoint that must not change; the file in it that names lead to."""
    shutil.rmtree(outside, ignore_errors=True)
    outside.mkdir(parents=True)
    for name in ("precious.txt", "model.safetensors", "config.json"):
        (outside / name).write_text("mine")
    return outside / "precious.txt"
