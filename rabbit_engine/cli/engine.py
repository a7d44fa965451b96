"""The modules that load torch, each imported when a command first uses it, so that --help needs none of them."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch as torch
    import transformers as transformers

    from rabbit_engine import architectures as architectures
    from rabbit_engine import batches as batches
    from rabbit_engine import chat as chat
    from rabbit_engine import checkpoints as checkpoints
    from rabbit_engine import config as config
    from rabbit_engine import decoding as decoding
    from rabbit_engine import model as model
    from rabbit_engine import prefixes as prefixes
    from rabbit_engine import sessions as sessions
    from rabbit_engine import streaming as streaming
    from rabbit_engine.cluster import connection as connection
    from rabbit_engine.diagnostics import benchmark as benchmark
    from rabbit_engine.diagnostics import cluster as cluster
    from rabbit_engine.diagnostics import demo as demo
    from rabbit_engine.diagnostics import doctor as doctor
    from rabbit_engine.diagnostics import finding as finding
    from rabbit_engine.diagnostics import pace as pace
    from rabbit_engine.diagnostics import plotting as plotting
    from rabbit_engine.diagnostics import speculation as speculation
    from rabbit_engine.model import capabilities as capabilities
    from rabbit_engine.model import sent_files as sent_files
    from rabbit_engine.planning import forecast as forecast
    from rabbit_engine.planning import machines as machines
    from rabbit_engine.server import listen as listen
    from rabbit_engine.server import replicas as replicas
    from rabbit_engine.streaming.transfer import disk_rate as disk_rate
    from rabbit_engine.transformers_bridge import generation as generation
    from rabbit_engine.utils import platform as platform

_MODULES = {
    "architectures": "rabbit_engine.architectures",
    "batches": "rabbit_engine.batches",
    "benchmark": "rabbit_engine.diagnostics.benchmark",
    "capabilities": "rabbit_engine.model.capabilities",
    "chat": "rabbit_engine.chat",
    "cluster": "rabbit_engine.diagnostics.cluster",
    "checkpoints": "rabbit_engine.checkpoints",
    "cluster_machines": "rabbit_engine.cluster.machines",
    "config": "rabbit_engine.config",
    "connection": "rabbit_engine.cluster.connection",
    "decoding": "rabbit_engine.decoding",
    "demo": "rabbit_engine.diagnostics.demo",
    "disk_rate": "rabbit_engine.streaming.transfer.disk_rate",
    "doctor": "rabbit_engine.diagnostics.doctor",
    "finding": "rabbit_engine.diagnostics.finding",
    "forecast": "rabbit_engine.planning.forecast",
    "generation": "rabbit_engine.transformers_bridge.generation",
    "listen": "rabbit_engine.server.listen",
    "machines": "rabbit_engine.planning.machines",
    "model": "rabbit_engine.model",
    "model_cluster": "rabbit_engine.model.cluster",
    "pace": "rabbit_engine.diagnostics.pace",
    "platform": "rabbit_engine.utils.platform",
    "plotting": "rabbit_engine.diagnostics.plotting",
    "prefixes": "rabbit_engine.prefixes",
    "speculation": "rabbit_engine.diagnostics.speculation",
    "replicas": "rabbit_engine.server.replicas",
    "sent_files": "rabbit_engine.model.sent_files",
    "sessions": "rabbit_engine.sessions",
    "stored_copies": "rabbit_engine.cluster.stored",
    "streaming": "rabbit_engine.streaming",
    "torch": "torch",
    "transformers": "transformers",
}


def __getattr__(name: str) -> ModuleType:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_MODULES[name])
    _quieten()
    return module


def _quieten() -> None:
    """Hide transformers' own progress bars; those of downloads belong to the Hub, and stay."""
    loaded = sys.modules.get("transformers.utils.logging")
    if loaded is None or not loaded.is_progress_bar_enabled():
        return
    loaded.disable_progress_bar()  # switches the Hub's off too
    import_module("huggingface_hub.utils").enable_progress_bars()
