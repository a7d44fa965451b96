"""The models of `rabbit serve`: their names, and how they are opened, on this machine or on any."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rabbit_engine.cli import engine, output
from rabbit_engine.cli.loading import Loading, loaded
from rabbit_engine.cli.prefixes import opened_store
from rabbit_engine.errors import CheckpointNotFoundError, ConfigurationError, HubUnreachableError
from rabbit_engine.utils.names import read_name

if TYPE_CHECKING:
    from rabbit_engine.checkpoints import Resolution
    from rabbit_engine.model.sent_files import SentFiles
    from rabbit_engine.prefixes import PrefixStore


@dataclass(frozen=True, slots=True)
class Offered:
    """The models by the names that clients use, how they are loaded, and how sessions answer: here, or on any machine."""

    named: Mapping[str, str]
    loading: Loading
    answering: Mapping[str, Any]
    hosting: Mapping[str, Any]
    prefix_store: str | None
    found: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """More keywords for the models that were fetched."""

    @contextmanager
    def host(self) -> Iterator[engine.listen.Host]:
        """The models for a server; the only one is loaded. They are closed at the end."""
        with opened_store(self.prefix_store) as store:
            hosted = engine.listen.Host(list(self.named), self._opening(store), describe=self.describe, **self.hosting)
            if len(self.named) == 1:
                hosted.preload(hosted.default)
            with closing(hosted):
                yield hosted

    def _opening(self, store: PrefixStore | None) -> Callable[[str], Any]:
        """Opens a session with a model, which is loaded, and closed at the end."""

        @contextmanager
        def open_session(name: str) -> Iterator[engine.sessions.Session]:
            with (
                loaded(self.named[name], self.loading.for_conversations(), **self.found.get(name, {})) as streamed,
                engine.sessions.Session(streamed, prefix_store=store, **self.answering) as session,
            ):
                output.note(str(streamed.plan))
                yield session

        return open_session

    def describe(self, name: str) -> engine.capabilities.Capabilities:
        """What a model is, from its config and headers."""
        return engine.capabilities.capabilities(
            self.named[name], **{**self.loading.keywords_of_headers(), **self.found.get(name, {})}
        )

    def own_files(self) -> dict[str, Resolution]:
        """The models whose files this machine has, by the names that clients use."""
        found = {name: engine.sent_files.own_model(model, self._keywords_of_files()) for name, model in self.named.items()}
        return {name: own for name, own in found.items() if own is not None}

    @contextmanager
    def host_on(self, files: Mapping[str, SentFiles]) -> Iterator[engine.listen.Host]:
        """`host` on a machine of a cluster, which first fetches those of the `files` that it lacks."""
        with ExitStack() as opened:
            try:
                hosted = opened.enter_context(self._located(files).host())
            except (CheckpointNotFoundError, HubUnreachableError) as error:
                here = socket.gethostname()
                raise type(error)(
                    f"{here}: {error}. No files were sent to it: put them there, or give the command on a machine of the cluster "
                    "that has them"
                ) from error
            yield hosted

    def _located(self, files: Mapping[str, SentFiles]) -> Offered:
        """The same with the models as this machine loads them."""
        keywords = self._keywords_of_files()
        found = {name: engine.sent_files.located(self.named[name], keywords, sent) for name, sent in files.items()}
        named = {**self.named, **{name: model for name, (model, _) in found.items()}}
        return replace(self, named=named, found={name: more for name, (_, more) in found.items()})

    def _keywords_of_files(self) -> dict[str, Any]:
        """Those that say which files are read: the device does if they are compressed for it."""
        device = "cpu" if self.loading.compression is None else self.loading.device
        return {**self.loading.keywords_of_headers(), "device": device}

    def anywhere(self) -> Offered:
        """The same from any folder."""
        draft, saving_path = self.loading.draft, self.loading.saving_path
        anywhere = replace(self.loading, draft=draft and _from_anywhere(draft), saving_path=absolute(saving_path))
        return replace(self, named={name: _from_anywhere(model) for name, model in self.named.items()}, loading=anywhere)


def _from_anywhere(model: str) -> str:
    """A folder or file with its whole path; the name of a repo stays."""
    return str(Path(model).absolute()) if Path(model).exists() else model


def name_models(given: Sequence[str], name: str | None) -> dict[str, str]:
    """The models by the names that clients use. Raises ConfigurationError for names that say nothing or are used twice."""
    if name is not None and len(given) > 1:
        raise ConfigurationError(f"--name is for one model, not for {len(given)}: write NAME=MODEL instead")
    found: dict[str, str] = {}
    for text in given:
        before, is_named, after = text.partition("=")
        called, model = (before, after) if is_named and not Path(text).exists() else (name or text, text)
        read_name(model)
        if not called:
            raise ConfigurationError(f"{text!r}: write NAME=MODEL")
        if called in found:
            raise ConfigurationError(f"two models are called {called!r}: write NAME=MODEL to set different names")
        found[called] = model
    return found


def absolute(path: Path | None) -> Path | None:
    """The same file from any folder; `-` stays."""
    return path if path is None or str(path) == "-" else path.absolute()
