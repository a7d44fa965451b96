"""Groups of options: dataclasses whose fields are options, declared once and taken by commands as one parameter."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints


class Only:
    """Names the options of a group that a command takes, if not all: `loading: Annotated[Loading, Only("device")]`."""

    def __init__(self, *names: str) -> None:
        self.names = names


@dataclass(frozen=True, slots=True)
class _OptionGroup:
    """A parameter of a command that stands for options of `kind`, a dataclass."""

    kind: Any
    names: tuple[str, ...]

    def take(self, given: dict[str, Any]) -> Any:
        """The options out of what was given."""
        return self.kind(**{name: given.pop(name) for name in self.names})

    def parameters(self) -> Iterator[inspect.Parameter]:
        """The options as parameters."""
        hints, defaults = get_type_hints(self.kind, include_extras=True), {each.name: each.default for each in fields(self.kind)}
        for name in self.names:
            yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=hints[name], default=defaults[name])


def takes_groups(command: Callable[..., None]) -> Callable[..., None]:
    """The command with each parameter that is a group replaced by its options."""
    hints = get_type_hints(command, include_extras=True)
    groups = {name: group for name, hint in hints.items() if (group := _group_of(hint)) is not None}

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        taken = {name: group.take(given) for name, group in groups.items()}
        command(**taken, **given)

    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        own = [parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hints[name])]
        parameters += groups[name].parameters() if name in groups else own
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_options


def _group_of(hint: Any) -> _OptionGroup | None:
    kind, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    if not is_dataclass(kind):
        return None
    only = next((extra.names for extra in extras if isinstance(extra, Only)), None)
    return _OptionGroup(kind, only or tuple(field.name for field in fields(kind)))
