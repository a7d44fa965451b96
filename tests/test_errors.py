"""The tree of errors, as its docstring draws it and as users of transformers catch them."""

from __future__ import annotations

import re

import pytest

from rabbit_engine import errors
from rabbit_engine.utils.foreign import foreign_code

_LINE = re.compile(r"^(?P<indent>[│ ]*)(?:[├└]── )?(?P<name>\w+Error)(?: \((?P<built_in>\w+)\))?(?: |$)")


def _drawn() -> list[tuple[str, str, str | None]]:
    """(class, its parent, the built-in error it is too) of each line of the partitioner."""
    rows, above = [], dict[int, str]()
    for line in (errors.__doc__ or "").split("```")[1].strip().splitlines():
        found = _LINE.match(line)
        assert found, line
        depth = 0 if found["name"] == "RabbitError" else len(found["indent"]) // 4 + 1
        rows.append((found["name"], above.get(depth - 1, "Exception"), found["built_in"]))
        above[depth] = found["name"]
    return rows


@pytest.mark.parametrize(("name", "parent", "built_in"), _drawn())
def test_the_drawn_tree_is_the_tree(name: str, parent: str, built_in: str | None) -> None:
    bases = [base.__name__ for base in getattr(errors, name).__bases__]
    assert bases == [parent, *([built_in] if built_in else [])]


def test_every_error_is_drawn() -> None:
    defined = {name for name, item in vars(errors).items() if isinstance(item, type) and issubclass(item, BaseException)}
    assert defined == {name for name, _, _ in _drawn()}


@pytest.mark.parametrize("name", [name for name, *_ in _drawn() if issubclass(getattr(errors, name), OSError)])
def test_an_os_error_keeps_its_message_and_has_no_number(name: str) -> None:
    error = getattr(errors, name)("x.json is cut off")
    assert (str(error), error.errno, error.args) == ("x.json is cut off", None, ("x.json is cut off",))


@pytest.mark.parametrize(
    ("name", "caught"),
    [
        ("CheckpointNotFoundError", OSError),
        ("GatedCheckpointError", OSError),
        ("HubUnreachableError", OSError),
        ("MissingFileError", OSError),
        ("DamagedCheckpointError", OSError),
        ("TokenizerNotFoundError", OSError),
        ("ShardsNotFoundError", OSError),
        ("DamagedShardError", OSError),
        ("UnsupportedArchitectureError", ValueError),
        ("MismatchedWeightsError", ValueError),
        ("UnsafePickleError", ValueError),
        ("CompressionUnavailableError", ValueError),
        ("MissingExtraError", ImportError),
    ],
)
def test_users_of_transformers_catch_them(name: str, caught: type[Exception]) -> None:
    with pytest.raises(caught):
        raise getattr(errors, name)("as transformers raises it")


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (KeyError("head"), errors.DamagedCheckpointError),
        (OSError("read"), errors.DamagedCheckpointError),
        (MemoryError(), MemoryError),
        (errors.ModelClosedError("closed"), errors.ModelClosedError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_foreign_code_is_blamed_for_its_own_errors_alone(raised: BaseException, seen: type[BaseException]) -> None:
    with (
        pytest.raises(BaseException) as caught,  # noqa: PT011 - its type is compared
        foreign_code(lambda error: errors.DamagedCheckpointError(str(error))),
    ):
        raise raised
    assert type(caught.value) is seen
