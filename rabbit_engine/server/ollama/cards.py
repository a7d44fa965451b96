"""What Ollama's clients are told about models: the lists of those that are served and loaded, and the details of one."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from rabbit_engine.server.hosting import LATEST, Host, Served
from rabbit_engine.server.ollama.facts import UNKNOWN, ModelFacts, described_facts, facts_of
from rabbit_engine.server.ollama.wire import timestamp

_LONGEST = timedelta(days=292 * 365)
"""When a model that stays forever is unloaded, as Ollama says it."""


class Cards:
    """Describes the models of a host. What was learnt from a loaded model is kept."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._known: dict[str, ModelFacts] = {}

    def served(self) -> list[dict[str, object]]:
        """All models."""
        return [self._card(name, self.facts(name)) for name in self._host.names]

    def loaded(self) -> list[dict[str, object]]:
        """The models in memory, with the time when each is unloaded if it is not used."""
        return [self._loaded_card(served) for served in reversed(self._host.loaded)]

    def details(self, name: str) -> dict[str, object]:
        """What is known of one."""
        facts = self.facts(name)
        return {
            "modelfile": f"# {tagged(name)} is served by rabbit_engine\nFROM {name}\n",
            "parameters": facts.parameters,
            "template": facts.template,
            "details": facts.details,
            "model_info": {"general.basename": name, **facts.info},
            "capabilities": list(facts.capabilities),
            "modified_at": self._since(),
        }

    def facts(self, name: str) -> ModelFacts:
        """What is known of a model."""
        for served in self._host.loaded:
            if served.name == name and name not in self._known:
                self._known[name] = facts_of(served.session)
        if name not in self._known and (found := self._host.descriptions.find(name)) is not None:
            return described_facts(found)
        return self._known.get(name, UNKNOWN)

    async def learn(self, names: Sequence[str]) -> None:
        """Find what is not known of models that were never loaded; what takes long is known later."""
        loaded = {served.name for served in self._host.loaded}
        await self._host.descriptions.learn(name for name in names if name not in self._known and name not in loaded)

    def _loaded_card(self, served: Served) -> dict[str, object]:
        plan = served.session.model.plan
        device = plan.device_bytes + plan.reserved_bytes
        return {
            **self._card(served.name, self.facts(served.name)),
            "size": device + plan.host_bytes,
            "size_vram": 0 if plan.device == "cpu" else device,
            "expires_at": _expires(served),
            "context_length": served.session.most_tokens,
        }

    def _card(self, name: str, facts: ModelFacts) -> dict[str, object]:
        return {
            "name": tagged(name),
            "model": tagged(name),
            "modified_at": self._since(),
            "size": facts.weights_bytes,
            "digest": hashlib.sha256(name.encode()).hexdigest(),
            "details": facts.details,
        }

    def _since(self) -> str:
        return timestamp(datetime.fromtimestamp(self._host.created, UTC))


def tagged(name: str) -> str:
    """A name with a tag: clients append one to names without, and look for that in the list."""
    return name if ":" in name.rpartition("/")[2] else name + LATEST


def _expires(served: Served) -> str:
    """When an idle model is unloaded; one in use, that time from now."""
    end_s = time.monotonic() + served.keep_alive_s if served.users else served.idle_until_s
    left_s = min(end_s - time.monotonic(), _LONGEST.total_seconds())
    return timestamp(datetime.now(UTC) + timedelta(seconds=max(0.0, left_s)))
