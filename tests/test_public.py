"""The public face: what is exported, what an import does, and that the drawings tell the truth."""

from __future__ import annotations

import ast
import importlib
import inspect
import pickle
import pydoc
import re
import subprocess
import sys
import typing
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import rabbit_engine
from rabbit_engine import AutoModel, errors
from rabbit_engine.model import StreamedModel
from rabbit_engine.utils.sizes import format_bytes, format_rate, parse_bytes

ROOT = Path(__file__).parents[1]


def test_every_public_name_is_there_and_listed() -> None:
    for name in rabbit_engine.__all__:
        assert getattr(rabbit_engine, name).__name__ == name
    assert set(rabbit_engine.__all__) <= set(dir(rabbit_engine))
    public = {name for name, value in vars(rabbit_engine).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert public - {"TYPE_CHECKING", "import_module"} == set(rabbit_engine.__all__)
    with pytest.raises(AttributeError, match="'rabbit_engine' has no attribute 'Automodel'"):
        rabbit_engine.Automodel  # noqa: B018
    assert pickle.loads(pickle.dumps(rabbit_engine.Options(seed=3))) == rabbit_engine.Options(seed=3)


def test_type_checkers_see_the_names_where_they_come_from() -> None:
    (block,) = [node for node in ast.parse(Path(rabbit_engine.__file__).read_text()).body if isinstance(node, ast.If)]
    seen = {alias.name: str(node.module) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert all(getattr(importlib.import_module(home), name) is getattr(rabbit_engine, name) for name, home in seen.items())
    assert {*seen, "RabbitError"} == set(rabbit_engine.__all__)


def test_types_are_shipped() -> None:
    assert (ROOT / "rabbit_engine" / "py.typed").is_file()


def test_from_pretrained_has_types_that_an_editor_completes() -> None:
    model, with_info = (
        inspect.signature(found.__func__)  # classmethods
        for found in typing.get_overloads(AutoModel.from_pretrained)
    )
    assert (model.return_annotation, with_info.return_annotation) == ("StreamedModel", "tuple[StreamedModel, dict[str, Any]]")
    assert with_info.parameters["output_loading_info"].annotation == "Literal[True]"
    assert inspect.signature(AutoModel.from_pretrained) == model.replace(parameters=[*model.parameters.values()][1:])


def test_types_of_from_pretrained_resolve_at_run_time() -> None:
    hints = typing.get_type_hints(AutoModel.from_pretrained)
    assert hints["return"] == StreamedModel | tuple[StreamedModel, dict[str, Any]]


def test_help_explains_every_keyword_with_its_default() -> None:
    signature, text = pydoc.plain(pydoc.render_doc(AutoModel.from_pretrained)).split("A transformers model", 1)
    for name, parameter in inspect.signature(AutoModel.from_pretrained).parameters.items():
        assert str(parameter) in signature
        assert re.search(rf"^ +{name}: \S", text, re.MULTILINE), name
    assert "max_memory: 'MaxMemory | None' = None" in signature


def test_no_two_classes_share_a_name() -> None:
    trees = [ast.parse(path.read_text()) for path in (ROOT / "rabbit_engine").rglob("*.py")]
    names = Counter(node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert [name for name, count in names.items() if count > 1] == []


def test_no_package_exports_a_name_that_hides_a_module_of_it() -> None:
    for package in (ROOT / "rabbit_engine").rglob("__init__.py"):
        imports = [node for node in ast.parse(package.read_text()).body if isinstance(node, ast.ImportFrom)]
        exported = {alias.asname or alias.name for node in imports for alias in node.names}
        modules = {path.stem for path in package.parent.iterdir() if path.suffix == ".py" or path.is_dir()}
        assert exported & modules == set()


def test_import_prints_nothing_starts_nothing_and_takes_no_device() -> None:
    code = "import sys, threading; import rabbit_engine; assert 'torch' not in sys.modules; assert rabbit_engine.AutoModel"
    code += "; import torch; assert threading.active_count() == 1; assert not torch.cuda.is_initialized()"
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_the_tree_of_errors_is_as_drawn() -> None:
    drawn: dict[str, str] = {}
    stack: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^([│ ├└─]*)(\w+Error)\b", line)
        if match:
            depth = len(match[1])
            stack = [item for item in stack if item[0] < depth]
            drawn[match[2]] = stack[-1][1] if stack else "Exception"
            stack.append((depth, match[2]))
    classes = {name: cls for name, cls in vars(errors).items() if inspect.isclass(cls)}
    assert drawn == {name: cls.__mro__[1].__name__ for name, cls in classes.items()}
    assert all(cls.__doc__ for cls in classes.values())


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (23_900_000_000, "23.90 GB"), (1.5e12, "1.50 TB")]
)
def test_sizes_as_text(count: float, text: str) -> None:
    assert format_bytes(count) == text


def test_rates() -> None:
    assert format_rate(4.36e9, 2.5) == "1.74 GB/s"
    assert format_rate(1, 0) == "-"


@pytest.mark.parametrize(
    ("texts", "count"),
    [
        (["8G", "8GB", "8gb", "8 GB", " 8Gb ", "8e9", 8e9, "8000MB", "0.008TB"], 8 * 10**9),
        (["8GiB", "8gib", "8Gi", "8 GiB", "8192MiB", 2**33, str(2**33)], 2**33),
        (["150mb", "150MB", "150m", ".15G", 150_000_000], 150_000_000),
        (["1.5GiB"], 3 * 2**29),
        (["0", 0, "0GB", "0.4"], 0),
        (["9007199254740993"], 9007199254740993),
    ],
)
def test_sizes_are_bytes_however_they_are_written(texts: list[str | float], count: int) -> None:
    assert [parse_bytes(text) for text in texts] == [count] * len(texts)


@pytest.mark.parametrize(
    "text",
    ["lots", "", "GB", "-1GB", -1, "8Gbit", "8GBB", "1,5GB", "80%", "8 G B", None, True, float("nan"), "inf", "1e300"],
)
def test_an_invalid_size_is_an_error_that_shows_the_format(text: Any) -> None:
    with pytest.raises(ValueError, match="write 8GiB, 8GB or a number of bytes"):
        parse_bytes(text)


def test_the_readme_is_python_that_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")
