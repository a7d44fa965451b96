"""Machines that Ray joins: connecting to them, what each has, and the stages of a model on them. It loads no model itself."""

from rabbit_engine.cluster.connection import connect, require_ray

__all__ = ["connect", "require_ray"]
