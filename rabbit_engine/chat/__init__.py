"""A conversation in a terminal, or line by line through a pipe."""

from rabbit_engine.chat.chat import Chat
from rabbit_engine.chat.conversation import Conversation, Said, Saved, read_conversation, write_conversation
from rabbit_engine.chat.interrupt import Interrupt, keys_hidden
from rabbit_engine.chat.keyboard import Keyboard, history_file
from rabbit_engine.chat.screen import Screen

__all__ = [
    "Chat",
    "Conversation",
    "Interrupt",
    "Keyboard",
    "Said",
    "Saved",
    "Screen",
    "history_file",
    "keys_hidden",
    "read_conversation",
    "write_conversation",
]
