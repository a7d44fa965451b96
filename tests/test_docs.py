"""What the documentation shows runs as it is shown."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from test_keywords import RABBITLLM

from rabbit_engine import AutoModel, errors
from rabbit_engine.architectures import converted_families, unregister_family
from rabbit_engine.cli.app import app
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.utils.keywords import RETIRED_KEYWORDS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
WRITTEN = [page for page in PAGES if page.name != "cli.md"]
"""All but the one that is generated from the commands."""


@pytest.fixture
def registered() -> Iterator[None]:
    """Run the example of adding-a-model.md; what it registers is unregistered at the end."""
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "adding-a-model.md").read_text(encoding="utf-8"), re.DOTALL)
    before = converted_families()
    exec(compile(code, "adding-a-model.md", "exec"), {})
    yield
    for family in {*converted_families()} - {*before}:
        unregister_family(family.name)
    assert converted_families() == before


def as_yi(folder: Path) -> None:
    """A tiny Llama in the words of Yi's first release."""
    names = {"input_layernorm": "ln1", "post_attention_layernorm": "ln2"}
    for path in folder.glob("*.safetensors"):
        state = {re.sub("|".join(names), lambda found: names[found[0]], name): tensor for name, tensor in load_file(path).items()}
        save_file(state, path)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("post_attention_layernorm", "ln2").replace("input_layernorm", "ln1"))
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"model_type": "Yi", "architectures": ["YiForCausalLM"], "rope_theta": 5000000.0}
    (folder / "config.json").write_text(json.dumps(raw))


def test_a_family_is_added_as_the_page_says(own_checkpoint: Any, plain: Any, streamed: Any, ids: Any, registered: None) -> None:
    rope = {"rope_type": "default", "rope_theta": 5000000.0}
    folder = own_checkpoint("llama", rope_parameters=rope)
    whole = plain(folder)
    as_yi(folder)
    model = streamed(folder)
    assert runtime_of(model).checkpoint.manifest is None, "streamed from its original files"
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"hidden_act": "gelu"}))
    with pytest.raises(errors.UnsupportedArchitectureError, match="hidden_act='gelu'"):
        streamed(folder)


def test_without_it_the_family_is_unknown(own_checkpoint: Any, streamed: Any) -> None:
    folder = own_checkpoint("llama")
    as_yi(folder)
    with pytest.raises(errors.UnsupportedArchitectureError):
        streamed(folder)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands() -> list[tuple[str, list[str]]]:
    """Every `$ rabbit ...` that a page shows, in words."""
    lines = [(page.name, line) for page in WRITTEN for text in blocks(page, "console") for line in text.splitlines()]
    return [(name, shlex.split(line[2:], comments=True)) for name, line in lines if line.startswith("$ rabbit ")]


@pytest.mark.parametrize("page", [page for page in WRITTEN if blocks(page, "python")], ids=lambda page: page.name)
def test_python_on_a_page_compiles_and_what_it_imports_from_us_is_there(page: Path) -> None:
    for text in blocks(page, "python"):
        for node in ast.walk(ast.parse(text, page.name)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("rabbit_engine"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)


@pytest.fixture
def lent(smollm_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages get the small model, whatever they ask for, and may not close it: all tests share it."""
    model = smollm_model
    known = set(inspect.signature(AutoModel.from_pretrained).parameters)

    def from_pretrained(_: str, **keywords: Any) -> Any:
        assert set(keywords) <= known, keywords
        return model

    monkeypatch.setattr(AutoModel, "from_pretrained", from_pretrained)
    monkeypatch.setattr(type(model), "close", lambda _: None)


@pytest.mark.parametrize("name", ["getting-started.md", "sessions.md", "speculation.md", "migrating.md", "README.md"])
def test_a_page_for_users_runs_from_its_first_block_to_its_last(
    name: str, lent: None, capsys: pytest.CaptureFixture[str]
) -> None:
    page = next(page for page in PAGES if page.name == name)
    names: dict[str, Any] = {"__name__": name}
    for text in blocks(page, "python"):
        exec(compile(text, name, "exec"), names)
    said = capsys.readouterr().out
    assert "Paris" in said or "United States" in said


def test_commands_on_the_pages_are_as_they_are_shown() -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    shown = [(page, [word for word in words[1:] if word != "-v"]) for page, words in commands()]
    assert {words[0] for _, words in shown} >= {"run", "chat", "plan", "doctor", "serve", "models"}
    for page, words in shown:
        command = known[words[0]]
        command = command.commands[words[1]] if hasattr(command, "commands") else command
        names = {name for param in command.params for name in param.opts + param.secondary_opts}
        assert {word for word in words if word.startswith("--")} <= names, f"{page}: {' '.join(words)}"


def test_requests_on_the_page_are_ones_the_server_takes() -> None:
    schema = pytest.importorskip("rabbit_engine.server.openai.schema")
    bodies = [body for page in WRITTEN for text in blocks(page, "console") for body in re.findall(r"-d '(.*?)'", text, re.DOTALL)]
    assert bodies
    for body in bodies:
        asked = schema.parse(schema.ChatRequest, json.loads(body))
        asked.refuse_unsupported()
        assert not set(json.loads(body)) - set(schema.ChatRequest.model_fields), body


def test_every_keyword_of_other_libraries_is_on_the_page_with_its_effect() -> None:
    text = (DOCS / "migrating.md").read_text(encoding="utf-8")
    table = text.partition("## Keyword by keyword")[2].partition("## ")[0]
    rows = {name: row for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1] if "|" in row else "")}
    known = set(inspect.signature(AutoModel.from_pretrained).parameters)
    assert set(rows) >= set(RETIRED_KEYWORDS) | set(RABBITLLM)
    for name, row in rows.items():
        if name in RETIRED_KEYWORDS:
            assert "no effect (a warning)" in row, name
        elif name not in known:
            assert "an error" in row or "first argument" in row, name


def test_every_error_is_documented_and_no_page_names_an_unknown_one() -> None:
    ours = {name for name, found in vars(errors).items() if isinstance(found, type) and issubclass(found, errors.RabbitError)}
    roots = {"RabbitError", "CheckpointError", "ShardError", "StreamingError", "UnsupportedOperationError"}
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    assert ours - roots <= set(re.findall(r"`(\w+Error)\b", text))
    builtin = {"KeyError", "MemoryError", "ZeroDivisionError", "AssertionError"}
    for page in WRITTEN:
        named = set(re.findall(r"`(\w+Error)[`:]", page.read_text(encoding="utf-8")))
        assert named <= ours | builtin, (page.name, named - ours)
