"""What of transformers only `rabbit_engine.transformers_bridge` may use, found in the source of any other module."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from functools import cache

import transformers
from tiny import llama, mixtral
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import nn

PUBLIC_MODULES = frozenset({"transformers", "transformers.utils.logging"})
"""Nothing is imported from the others: what transformers documents of them is in `transformers` too."""

ALSO_PUBLIC = frozenset({"__version__", "logging"})
"""Names of `transformers`, in addition to the classes and functions of its `__all__`."""

UNSTABLE = frozenset(
    {
        *("all_tied_weights_keys", "get_expanded_tied_weights_keys", "initialize_weights", "adjust_generation_fn"),
        *("get_interface", "post_expert_norm", "has_post_expert_norm", "transformers_modules"),
        *("_is_hf_initialized", "_hf_peft_config_loaded", "_supports_cache_class", "_supports_flash_attn_2"),
        *("_apply_gate", "_weight_conversions", "_supports_default_dynamic_cache", "_supports_logits_to_keep"),
    }
)
"""Names without an underscore, of tensors, and of other versions, which the objects below do not show."""


@cache
def private_names() -> frozenset[str]:
    """The attributes with an underscore that transformers' models, configs, tokenizers and auto classes have, and UNSTABLE."""
    model, auto = llama(), transformers.AutoModelForCausalLM
    objects = [
        *(model, model.config, model.generation_config, model.model.layers[0].self_attn, mixtral().model.layers[0].mlp.experts),
        *(auto, auto._model_mapping, transformers.AttentionInterface, transformers.DynamicCache()),
        *(transformers.PreTrainedTokenizer, transformers.TokenizersBackend(tokenizer_object=Tokenizer(BPE()))),
    ]
    names = {name for thing in objects for name in dir(thing) if name.startswith("_") and not name.startswith("__")}
    return frozenset(names - set(dir(nn.Linear(1, 1))) - {"_abc_impl"} | UNSTABLE)


def private_uses(source: str) -> list[str]:
    """Each use in a module of what only the bridge may use, as `line 3: model._from_config`."""
    finder = _Finder()
    finder.visit(ast.parse(source))
    return finder.found


class _Finder(ast.NodeVisitor):
    def __init__(self) -> None:
        self.found: list[str] = []
        self._inherit: set[str] = set()  # names of this module for classes that are transformers', or inherit from one
        self._inheriting = [False]  # for each class around the node

    def _add(self, node: ast.stmt | ast.expr, what: str) -> None:
        self.found.append(f"line {node.lineno}: {what}")

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split(".")[0] == "transformers" and alias.name not in PUBLIC_MODULES:
                self._add(node, f"import {alias.name}")

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        if module.split(".")[0] == "transformers":
            self._inherit |= {alias.asname or alias.name for alias in node.names}
            for alias in node.names:
                if module not in PUBLIC_MODULES or (module == "transformers" and not is_public(alias.name)):
                    self._add(node, f"from {module} import {alias.name}")
        elif "transformers_bridge" in module:
            self._inherit |= {alias.asname or alias.name for alias in node.names}

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        bases = {ast.unparse(base).split(".")[-1] for base in node.bases}
        inherits = bool(bases & self._inherit) or node.name.endswith("Mixin")
        if inherits:
            self._inherit.add(node.name)
            for name in _defined(node):
                if name in private_names():
                    self._add(node, f"{node.name} overrides {name}")
        self._inheriting.append(inherits)
        self.generic_visit(node)
        self._inheriting.pop()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        own = ast.unparse(node.value) in ("self", "cls") and not self._inheriting[-1]
        if node.attr in private_names() and not own:
            self._add(node, ast.unparse(node))
        if ast.unparse(node.value).split(".")[-1] == "transformers" and not is_public(node.attr):
            self._add(node, ast.unparse(node))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if not isinstance(value, str):
            return
        module = re.fullmatch(r"transformers\.([\w.]*\w)\.?", value)
        if value in private_names() or (module and value not in PUBLIC_MODULES and not is_public(module[1])):
            self._add(node, repr(value))


def _defined(node: ast.ClassDef) -> Iterator[str]:
    for child in node.body:
        if isinstance(child, ast.FunctionDef):
            yield child.name
        targets = child.targets if isinstance(child, ast.Assign) else [child.target] if isinstance(child, ast.AnnAssign) else []
        yield from (target.id for target in targets if isinstance(target, ast.Name))


@cache
def is_public(name: str) -> bool:
    """Whether `name` of `transformers` is a class or function that it exports, and no module."""
    exported = name in transformers.__all__ and importlib.util.find_spec(f"transformers.{name}") is None
    return exported or name in ALSO_PUBLIC
