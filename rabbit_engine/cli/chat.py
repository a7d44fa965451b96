"""`rabbit chat MODEL`: a conversation in the terminal; through a pipe, each line of stdin is a message."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from rabbit_engine.cli import engine, options
from rabbit_engine.cli.groups import takes_groups
from rabbit_engine.cli.loading import CONVERSATION_IN_STAGES, Loading
from rabbit_engine.cli.prefixes import PrefixStoreSize, opened_store
from rabbit_engine.errors import ConfigurationError


@takes_groups
def chat(
    model: options.Model,
    system: Annotated[str, typer.Option(help="The system message; /system changes it.", show_default=False)] = "",
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="The most tokens of an answer; the default is the checkpoint's own, else 1024.")
    ] = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    seed: options.Seed = None,
    prefix_store: PrefixStoreSize = None,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact",
            help=(
                "Compute the last question and answer again with each new one: answers are then, bit for bit, those of the whole "
                "conversation as one prompt."
            ),
        ),
    ] = False,
    history: Annotated[bool, typer.Option(help="Save a history of typed lines to a file.")] = True,
    *,
    loading: Annotated[Loading, CONVERSATION_IN_STAGES],
) -> None:
    """Talk with MODEL in the terminal, streamed from disk layer by layer; /help lists the commands.

    Through a pipe each line is a message: answers go to stdout, everything else to stderr, and the exit code is 1 if one failed.
    """
    asked = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    engine.sessions.Options(**asked)  # type: ignore[arg-type]  # checked before anything is loaded
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    screen = _screen(at_terminal)
    logging.getLogger("rabbit_engine.sessions.prompts").setLevel(logging.ERROR)  # the chat itself reports what it drops
    screen.note(f"loading {model} ...")
    with (
        engine.model.AutoModel.from_pretrained(model, **loading.for_conversations().keywords()) as streamed,
        opened_store(prefix_store) as store,
        engine.sessions.Session(
            streamed, max_requests=1, overflow="truncate", prefix_store=store, continue_last=not exact
        ) as session,
    ):
        require_template(streamed, model)
        screen.note(streamed.plan.reason + ("\n/help lists the commands" if at_terminal else ""))
        interrupt = engine.chat.Interrupt()
        talk = engine.chat.Chat(session, screen, model, system=system, options=asked, interrupt=interrupt)
        if at_terminal:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # restores the terminal
            with interrupt, engine.chat.keys_hidden():
                talk.run(engine.chat.Keyboard(_history(wanted=history), screen.note))
        else:
            talk.run(_lines())
    if talk.failures and not at_terminal:
        raise typer.Exit(1)


def require_template(model: engine.model.StreamedModel, name: str) -> None:
    """Raises ConfigurationError for a model that only continues texts."""
    if getattr(model.tokenizer, "chat_template", None) is None:
        raise ConfigurationError(f"{name} has no chat template: it can only continue texts, as `rabbit run {name} TEXT` does")


def _screen(at_terminal: bool) -> engine.chat.Screen:
    live = at_terminal and os.environ.get("TERM", "") not in ("dumb", "unknown")
    return engine.chat.Screen(sys.stdout, sys.stdout if at_terminal else sys.stderr, live=live)


def _history(*, wanted: bool) -> Path | None:
    return engine.chat.history_file(sys.platform, os.environ, Path.home()) if wanted else None


def _lines() -> Iterable[str]:
    return (line.rstrip("\r\n") for line in sys.stdin)
