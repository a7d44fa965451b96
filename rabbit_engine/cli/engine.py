"""What the commands drive: modules that load torch, imported when a command first uses one, so that help needs none of them."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch as torch
    import transformers as transformers

    from rabbit_engine import architectures as architectures
    from rabbit_engine import benchmark as benchmark
    from rabbit_engine import chat as chat
    from rabbit_engine import config as config
    from rabbit_engine import demo as demo
    from rabbit_engine import diskrate as diskrate
    from rabbit_engine import doctor as doctor
    from rabbit_engine import forecast as forecast
    from rabbit_engine import hub as hub
    from rabbit_engine import integrity as integrity
    from rabbit_engine import model as model
    from rabbit_engine import names as names
    from rabbit_engine import pace as pace
    from rabbit_engine import plotting as plotting
    from rabbit_engine import prepare as prepare
    from rabbit_engine import sessions as sessions
    from rabbit_engine import shards as shards
    from rabbit_engine import streaming as streaming
    from rabbit_engine.server import listen as listen

_ELSEWHERE = {"listen": "rabbit_engine.server.listen", "torch": "torch", "transformers": "transformers"}


def __getattr__(name: str) -> ModuleType:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_ELSEWHERE.get(name, f"rabbit_engine.{name}"))
    _quieten()
    return module


def _quieten() -> None:
    """Hide transformers' own progress bars; those of downloads are the Hub's, and stay."""
    loaded = sys.modules.get("transformers.utils.logging")
    if loaded is None or not loaded.is_progress_bar_enabled():
        return
    loaded.disable_progress_bar()  # switches the Hub's off too
    import_module("huggingface_hub.utils").enable_progress_bars()
