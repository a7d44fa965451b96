"""The token of all Ray clusters that tests start: a process reads its token once, whatever cluster it joins later."""

from __future__ import annotations

import os

TOKEN = "0" * 64


def use_ray_token() -> None:
    """Let clusters of this process ask for the token. Before the first of them."""
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN, RAY_USAGE_STATS_ENABLED="0")
