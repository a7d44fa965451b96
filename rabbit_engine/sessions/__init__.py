"""Many conversations with one model: each pass over the weights serves all of them."""

from rabbit_engine.sessions.answer import Piece, Reply
from rabbit_engine.sessions.forks import Fork
from rabbit_engine.sessions.messages import read_messages
from rabbit_engine.sessions.options import MOST_ALTERNATIVES, Options
from rabbit_engine.sessions.prompts import Message
from rabbit_engine.sessions.sampling import TokenLogprob
from rabbit_engine.sessions.session import Session
from rabbit_engine.sessions.underway import Events, Request, Ticket

__all__ = [
    "MOST_ALTERNATIVES",
    "Events",
    "Fork",
    "Message",
    "Options",
    "Piece",
    "Reply",
    "Request",
    "Session",
    "Ticket",
    "TokenLogprob",
    "read_messages",
]
