"""Weights on their way: disk -> host slot -> device slot -> parameter, and away again."""

from rabbit_engine.streaming.binding import Binding, Seat, guard, move, seats_of
from rabbit_engine.streaming.placeholder import Placeholder, placeholder_for
from rabbit_engine.streaming.rows import EmbeddingRows
from rabbit_engine.streaming.slots import claim_slots
from rabbit_engine.streaming.streamer import Profile, Streamer
from rabbit_engine.streaming.unit import Unit, make_unit

__all__ = [
    "Binding",
    "EmbeddingRows",
    "Placeholder",
    "Profile",
    "Seat",
    "Streamer",
    "Unit",
    "claim_slots",
    "guard",
    "make_unit",
    "move",
    "placeholder_for",
    "seats_of",
]
