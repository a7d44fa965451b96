"""What the documentation shows runs as it is shown."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rabbit_engine import errors
from rabbit_engine.architectures import registry

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def registered() -> Iterator[None]:
    """Run the example of adding-a-model.md; the registry is put back at the end."""
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "adding-a-model.md").read_text(encoding="utf-8"), re.DOTALL)
    before = list(registry._CONVERTED)
    exec(compile(code, "adding-a-model.md", "exec"), {})
    yield
    registry._CONVERTED[:] = before


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
    assert model._prepared.manifest is None, "streamed from its original files"
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
