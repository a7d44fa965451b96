"""Connects this process to a Ray cluster, which is the only place that knows how."""

from __future__ import annotations

import logging
import os
import sys
from types import ModuleType

from rabbit_engine.errors import ClusterError, first_line
from rabbit_engine.utils.extras import missing_extra

LOCAL = "local"
"""The address that starts a cluster of this machine alone, which ends with the process."""


def require_ray() -> ModuleType:
    """The module `ray`. Raises MissingExtraError if it cannot be imported."""
    try:
        import ray
    except ImportError as error:
        raise missing_extra("a cluster", "cluster", error) from error
    return ray


def connect(address: str) -> ModuleType:
    """Connect to the cluster at `address`, unless this process is connected already, and return the module `ray`.

    `address` is "auto" (the cluster that this machine is part of), "HOST:PORT" of its head, "ray://HOST:PORT" of its client
    server, or "local". Requests carry the token of Ray's own authentication, which a cluster must be started with: see
    docs/cluster.md. Raises MissingExtraError without Ray, ClusterError if no cluster answers.
    """
    if "ray" not in sys.modules:  # which reads them as it is imported; else its own defaults hold
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no reports to Ray's makers
    ray = require_ray()
    if ray.is_initialized():
        return ray
    try:
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False, configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {address!r} ({first_line(error)}): start one with `ray start --head` and "
            "RAY_AUTH_MODE=token, or give the address of one that runs"
        ) from error
    return ray
