"""How fast the device is: copies to it, products with one token, decoding of encoded weights. As findings for the doctor."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rabbit_engine.diagnostics.encodings import FOUR_BIT, EncodingRate
from rabbit_engine.diagnostics.finding import Finding, Number
from rabbit_engine.diagnostics.pace import Products
from rabbit_engine.errors import first_line
from rabbit_engine.quantization.kernels import TORCH_OPERATIONS, kernels_in_use
from rabbit_engine.streaming.transfer.measure import measure_link, measure_products
from rabbit_engine.utils.platform import has_streams
from rabbit_engine.utils.sizes import format_rate

_SLOW_LINK = 6e9
"""Bytes per second: less than half of sixteen lanes of PCIe 3."""


def try_device(device: torch.device) -> tuple[float, float, Finding]:
    """Bytes per second of the link to it (0 on a CPU) and of its products, or two zeros; and the finding."""
    try:
        link = 0.0 if device.type == "cpu" else measure_link(device)
        products = measure_products(device)
    except RuntimeError as error:  # out of memory, no kernel for this GPU, a lost driver
        return 0.0, 0.0, _unusable(device, first_line(error))
    if has_streams(device):
        torch.get_device_module(device).empty_cache()  # it would otherwise be missing in the budget
    value = f"products with one token read {format_rate(products, 1)} of bf16 weights on {device}"
    return link, products, Finding(name="compute rate", status="info", value=value, numbers={"rate": products})


def _unusable(device: torch.device, problem: str) -> Finding:
    shown = " (see nvidia-smi)" if device.type == "cuda" else ""
    advice = f"free its memory{shown} or install a torch built for it; `rabbit run --device cpu` works without"
    return Finding(name="compute rate", status="fail", value=f"{device} does not compute: {problem}", advice=advice)


def judge_link(device: torch.device, rate: float) -> Finding:
    """How fast weights can be copied to the device."""
    if device.type == "cpu":
        return Finding(name="link rate", status="info", value="no copies: the model runs in host memory", numbers={"rate": None})
    if not has_streams(device):
        value = f"not measured on {device}, assumed to be {format_rate(rate, 1)}"
        return Finding(name="link rate", status="info", value=value, numbers={"rate": None, "assumed": rate})
    slow, is_cuda = rate < _SLOW_LINK, device.type == "cuda"
    memory = "pinned host memory" if is_cuda else "host memory"
    return Finding(
        name="link rate",
        status="warn" if slow else "ok",
        value=f"{format_rate(rate, 1)} from {memory} to {device}",
        numbers={"rate": rate},
        advice="the card may sit in a slot of few lanes: nvidia-smi -q shows the link's width" if slow and is_cuda else "",
    )


def products_of(bf16: float, rates: Sequence[EncodingRate]) -> Products:
    """Bytes per second of stored weights in products with one token; four-bit ones may be decoded to bfloat16 first."""
    found = next(rate for rate in rates if rate.name == FOUR_BIT)
    share = 4.5 / 16
    return Products(bf16, found.fused or share / (1 / found.decode + 1 / bf16))


def _gigabytes(rate: float) -> str:
    """Billions, in two digits or whole: an accelerator decodes 150 GB/s."""
    return f"{rate / 1e9:.2g}" if rate < 1e10 else f"{rate / 1e9:.0f}"


def judge_kernels(rates: Sequence[EncodingRate]) -> Finding:
    """What decodes weights on a CPU, and how fast encoded weights are decoded, or multiplied by as they are stored."""
    kernels = kernels_in_use()
    rows = [
        f"{rate.name} {_gigabytes(rate.decode)}{f' ({_gigabytes(rate.fused)} fused)' if rate.fused else ''}" for rate in rates
    ]
    value = f"{kernels}; decoded to bf16, GB/s: {', '.join(rows)}" if rows else f"{kernels}; not measured"
    numbers: dict[str, Number] = {"kernels": kernels}
    for rate in rates:
        numbers |= {f"{rate.name} decode_rate": rate.decode, f"{rate.name} fused_rate": rate.fused}
    slow = kernels == TORCH_OPERATIONS
    advice = 'pip install "rabbit_engine[cpu]" decodes several times faster on a CPU' if slow else ""
    return Finding(name="kernels", status="info", value=value, numbers=numbers, advice=advice)
