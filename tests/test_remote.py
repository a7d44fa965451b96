"""Code that a checkpoint brings, with the caches of its time: `layer_past`, `kv_cache`, tuples."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_matrix import speculation_of

from rabbit_engine import AutoModel, errors
from rabbit_engine.transformers_bridge.forwards import cache_of

CODE = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

class OldConfig(PretrainedConfig):
    model_type = "old_lm"
    def __init__(self, vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        super().__init__(**kwargs)

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.norm = nn.LayerNorm(config.hidden_size)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, PAST=None, use_cache=False):
        shape = x.shape
        q, k, v = (t.view(shape[0], shape[1], self.heads, -1).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        if PAST is not None:
            k, v = torch.cat([PAST[0], k], 2), torch.cat([PAST[1], v], 2)
        seen = k.shape[2] - shape[1]
        mask = torch.ones(shape[1], k.shape[2], dtype=torch.bool, device=x.device).tril(seen)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(shape)
        return x + self.out(y), (k, v) if use_cache else None

class OldModel(PreTrainedModel):
    config_class = OldConfig
    base_model_prefix = "transformer"
    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(64, config.hidden_size)
        self.h = nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)])
        self.post_init()

    def forward(self, input_ids, past_key_values=None, use_cache=False):
        pasts = past_key_values or (None,) * len(self.h)
        seen = 0 if pasts[0] is None else pasts[0][0].shape[2]
        x = self.wte(input_ids) + self.wpe(torch.arange(seen, seen + input_ids.shape[1], device=input_ids.device))
        presents = ()
        for block, past in zip(self.h, pasts):
            x, present = block(x, PAST=past, use_cache=use_cache)
            presents += (present,)
        return x, presents if use_cache else None

class OldForCausalLM(PreTrainedModel):
    config_class = OldConfig
    def __init__(self, config):
        super().__init__(config)
        self.transformer = OldModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
    def get_input_embeddings(self):
        return self.transformer.wte
    def get_output_embeddings(self):
        return self.lm_head
    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
        if past_key_values:
            input_ids = input_ids[:, -1:]
        return {"input_ids": input_ids, "past_key_values": past_key_values, "use_cache": kwargs.get("use_cache")}
    def forward(self, input_ids=None, past_key_values=None, use_cache=None, attention_mask=None, return_dict=None, **kwargs):
        x, presents = self.transformer(input_ids, past_key_values, bool(use_cache))
        return CausalLMOutputWithPast(logits=self.lm_head(x), past_key_values=presents)
"""


@pytest.fixture
def old(tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint with its own model code, whose blocks call their cache `past`; `replaced` edits its code."""

    def make(past: str = "layer_past", **replaced: str) -> Path:
        folder = tmp_path / f"old_{past}_{len(replaced)}"
        folder.mkdir()
        code = CODE.replace("PAST", past)
        for words, others in replaced.values() if isinstance(next(iter(replaced.values()), None), tuple) else ():
            assert words in code
            code = code.replace(words, others)
        (folder / "modeling_old.py").write_text(code)
        config = {
            "model_type": "old_lm",
            "architectures": ["OldForCausalLM"],
            "transformers_version": "4.30.2",
            "torch_dtype": "float32",
            "auto_map": {"AutoConfig": "modeling_old.OldConfig", "AutoModelForCausalLM": "modeling_old.OldForCausalLM"},
        }
        (folder / "config.json").write_text(json.dumps(config))
        namespace: dict[str, Any] = {"__name__": "old"}
        exec(CODE.replace("PAST", past), namespace)  # the code of this very file
        torch.manual_seed(0)
        model = namespace["OldForCausalLM"](namespace["OldConfig"]())
        save_file({name: tensor.normal_(std=0.3) for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
        return folder

    return make


@pytest.mark.parametrize("past", ["layer_past", "kv_cache"])
@pytest.mark.parametrize("split", ["auto", "always"])
def test_tuples_and_older_keywords_work(past: str, split: str, old: Any, streamed: Any, ids: torch.Tensor) -> None:
    model = streamed(old(past), trust_remote_code=True, split=split)
    assert model.plan.streamed
    steps = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    lengths: list[int] = []
    model.transformer.wte.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    cached = model.generate(ids, **steps)
    assert lengths == [12] + [1] * 7
    assert torch.equal(cached, model.generate(ids, use_cache=False, **steps))
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :5], use_cache=True)
        assert isinstance(cache_of(first), tuple)
        rest = model(ids[:, 5:], past_key_values=cache_of(first), use_cache=True)
    assert torch.allclose(torch.cat([first.logits, rest.logits], dim=1), whole, atol=1e-5)


LAYERS = """
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

class LayersConfig(LlamaConfig):
    model_type = "layers_lm"

class Layer(LlamaDecoderLayer):
    def forward(self, hidden_states, attention_mask=None, PAST=None, **kwargs):
        return super().forward(hidden_states, attention_mask=attention_mask, past_key_values=PAST, **kwargs)

class LayersForCausalLM(LlamaForCausalLM):
    config_class = LayersConfig
    def __init__(self, config):
        super().__init__(config)
        for index in range(config.num_hidden_layers):
            self.model.layers[index] = Layer(config, index)
        self.post_init()
    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None, **kwargs):
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        return {"input_ids": input_ids[:, seen:], "past_key_values": past_key_values, "attention_mask": attention_mask}
"""


@pytest.mark.parametrize("past", ["past_key_values", "past_key_value"])
def test_a_cache_arrives_whatever_a_layer_calls_it(
    past: str, own_checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor
) -> None:
    """A layer that takes the rest as `**kwargs` would forget the text without an error."""
    folder = own_checkpoint("llama")
    steps = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = plain(folder).generate(ids, **steps)
    (folder / "modeling_layers.py").write_text(LAYERS.replace("PAST", past))
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "modeling_layers.LayersConfig", "AutoModelForCausalLM": "modeling_layers.LayersForCausalLM"}
    config |= {"model_type": "layers_lm", "architectures": ["LayersForCausalLM"], "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    model = streamed(folder, trust_remote_code=True)
    lengths: list[int] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    assert torch.equal(model.generate(ids, **steps), expected)
    assert lengths == [12] + [1] * 7


POSITIONS = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

class PositionsConfig(LlamaConfig):
    model_type = "positions_lm"

class PositionsForCausalLM(LlamaForCausalLM):
    config_class = PositionsConfig
    def forward(self, input_ids=None, cache_position=None, **kwargs):
        assert len(cache_position) == input_ids.shape[1]
        return super().forward(input_ids=input_ids, position_ids=cache_position[None], **kwargs)
    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, cache=None, attention_mask=None, **kwargs):
        past = past_key_values if cache is None else cache
        seen = past.get_seq_length() if past is not None else 0
        positions = torch.arange(seen, input_ids.shape[1])
        name = "past_key_values" if cache is None else "cache"
        return {"input_ids": input_ids[:, seen:], name: past, "attention_mask": attention_mask, "cache_position": positions}
"""


def test_code_that_counts_positions_itself_verifies_chains(own_checkpoint: Any, streamed: Any, ids: torch.Tensor) -> None:
    folder = own_checkpoint("llama")
    (folder / "modeling_positions.py").write_text(POSITIONS)
    config = json.loads((folder / "config.json").read_text())
    classes = {
        "AutoConfig": "modeling_positions.PositionsConfig",
        "AutoModelForCausalLM": "modeling_positions.PositionsForCausalLM",
    }
    config |= {"model_type": "positions_lm", "architectures": ["PositionsForCausalLM"], "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    model = streamed(folder, trust_remote_code=True)
    assert speculation_of(model, {"input_ids": ids}) == "chain"


def test_tuples_are_decoded_without_guesses(old: Any, streamed: Any, ids: torch.Tensor) -> None:
    model = streamed(old(), trust_remote_code=True)
    assert speculation_of(model, {"input_ids": ids}) == "plain: no cache of transformers' own"


@pytest.mark.parametrize(
    ("words", "others", "where"),
    [
        ("import torch\n", "import torch\nfrom transformers import NoSuchName\n", "while it was imported"),
        (
            "super().__init__(config)\n        self.wte",
            "super().__init__(config)\n        self.no_such()\n        self.wte",
            "built",
        ),
        ("x, presents = self.transformer(", "self.config.no_such_word\n        x, presents = self.transformer(", "in forward"),
    ],
)
def test_code_that_is_too_old_is_an_error_that_says_so(words: str, others: str, where: str, old: Any, ids: torch.Tensor) -> None:
    folder = old("layer_past", change=(words, others))
    with pytest.raises(errors.UnsupportedArchitectureError, match=rf"own code failed .*{where}.*written for transformers 4.30.2"):
        AutoModel.from_pretrained(folder, device="cpu", trust_remote_code=True)(ids)


def test_a_package_that_its_code_needs_is_named(old: Any) -> None:
    folder = old("layer_past", change=("import torch\n", "import torch\nimport no_such_package\n"))
    with pytest.raises(errors.MissingExtraError, match="no_such_package"):
        AutoModel.from_pretrained(folder, device="cpu", trust_remote_code=True)


def test_a_callers_mistake_stays_the_callers(old: Any, streamed: Any) -> None:
    model = streamed(old("layer_past"), trust_remote_code=True)
    with pytest.raises(TypeError):
        model.generate(torch.zeros(1, 4, dtype=torch.long), max_new_tokens="two")
