"""bfloat16 without loss: the bits of the original in fewer bytes, in compiled code and in torch operations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rabbit_engine.quantization.kernels import can_run, torch_operations
from rabbit_engine.quantization.lossless import ROLES, Lossless, compress, lossless_entry
from rabbit_engine.storage.tensorfiles import each_row, read_header, read_tensor


def decoded(components: dict[str, torch.Tensor], shape: torch.Size) -> torch.Tensor:
    out = torch.full(shape, torch.nan, dtype=torch.bfloat16)
    Lossless().decode([components[role] for role in ROLES], out, torch.empty(0, dtype=torch.uint8))
    return out


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16)


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(96, 256, generator=generator) * 0.02
    scaled = normal * torch.logspace(-1, 0, 96)[:, None]
    strange = normal.clone()
    strange[3, 7:12] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0])
    strange[95, 255], strange[0, 0] = 3e38, 1e-40
    rare = torch.full((64, 1024), 0.5)
    rare[5, 9] = rare[60, 1023] = 1e-9  # 60,000 values apart
    stack = torch.randn(3, 24, 64, generator=generator)
    found = {"normal": normal, "rows of other scales": scaled, "strange": strange, "rare": rare, "stack": stack}
    return {name: weight.bfloat16() for name, weight in found.items()}


@pytest.mark.parametrize("name", list(weights()))
def test_every_bit_comes_back(name: str) -> None:
    weight = weights()[name]
    components = compress(weight)
    assert components is not None
    assert can_run(weight.device)
    assert torch.equal(bits(decoded(components, weight.shape)), bits(weight))
    with torch_operations():
        assert torch.equal(bits(decoded(components, weight.shape)), bits(weight))


def test_normal_weights_take_seven_tenths_of_their_bytes() -> None:
    weight = (torch.randn(512, 1024, generator=torch.Generator().manual_seed(1)) * 0.02).bfloat16()
    components = compress(weight)
    assert components is not None
    assert sum(tensor.nbytes for tensor in components.values()) < 0.71 * weight.nbytes


def noise() -> torch.Tensor:
    return torch.randint(-(2**15), 2**15, (64, 64)).short().view(torch.bfloat16)


@pytest.mark.parametrize(
    "weight",
    [torch.randn(8, 8), torch.randn(64).bfloat16(), torch.randn(8, 12).bfloat16(), noise()],
    ids=["float32", "a vector", "columns", "noise"],
)
def test_what_gains_nothing_stays_as_it_is(weight: torch.Tensor) -> None:
    assert compress(weight) is None


def test_rows_and_experts_are_cut_from_it(tmp_path: Path) -> None:
    matrix, stack = torch.randn(600, 256).bfloat16(), torch.randn(3, 24, 64).bfloat16()
    tensors = {
        f"{name}.{role}": part
        for name, weight in {"a": matrix, "b": stack}.items()
        for role, part in (compress(weight) or {}).items()
    }
    save_file(tensors, tmp_path / "w")
    stored = {entry.name: entry for entry in read_header(tmp_path / "w").tensors}
    first, second = (lossless_entry(name, torch.bfloat16, {role: stored[f"{name}.{role}"] for role in ROLES}) for name in "ab")
    assert not isinstance(first, str)
    assert not isinstance(second, str)
    assert first.rows_together == 200
    assert torch.equal(read_tensor(first.rows(200, 600)), matrix[200:])
    assert torch.equal(torch.cat([read_tensor(row) for row in each_row(second)]), stack)


@pytest.mark.parametrize("role", ROLES)
def test_any_bytes_decode_within_the_weight(role: str) -> None:
    """Damage cannot write past the weight: a checksum is verified only when asked for."""
    weight = weights()["strange"]
    components = compress(weight)
    assert components is not None
    generator = torch.Generator().manual_seed(2)
    low, high = (-(2**31), 2**31) if role == "groups" else (0, 256)
    damaged = torch.randint(low, high, components[role].shape, generator=generator).to(components[role].dtype)
    memory = torch.zeros(3, *weight.shape, dtype=torch.bfloat16)
    stored = [{**components, role: damaged}[name] for name in ROLES]
    Lossless().decode(stored, memory[1], torch.empty(0, dtype=torch.uint8))
    assert not memory[[0, 2]].any()
    compiled = bits(memory[1]).clone()
    with torch_operations():
        assert torch.equal(bits(decoded({**components, role: damaged}, weight.shape)), compiled)


def test_components_that_do_not_fit_are_named(tmp_path: Path) -> None:
    components = compress(torch.randn(64, 64).bfloat16())
    assert components is not None
    save_file({**components, "short": components["codes"][:, 1:].contiguous()}, tmp_path / "w")
    stored = {entry.name: entry for entry in read_header(tmp_path / "w").tensors}
    parts = {role: stored[role] for role in ROLES}
    assert "escapes are missing" in str(lossless_entry("w", torch.bfloat16, {r: e for r, e in parts.items() if r != "escapes"}))
    assert "codes [64, 23]" in str(lossless_entry("w", torch.bfloat16, {**parts, "codes": stored["short"]}))
    assert "only bfloat16" in str(lossless_entry("w", torch.float16, parts))
    assert "dtypes" in str(lossless_entry("w", torch.bfloat16, {**parts, "groups": stored["codes"]}))
