"""Checks of command-line programs against a server. Those that call tools ask a tiny model that is made to say what they need.

A check returns None if its program is not on PATH.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
import transformers

from rabbit_engine import AutoModel, Session

Serving = Callable[[Session], AbstractContextManager[str]]
Check = Callable[[Session, str], bool | None]

NAME = "small"
SECRET = "swordfish"
END = "<|im_end|>"
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}{% for m in messages %}"
    "{% if m.role == 'system' and not loop.first %}{{ raise_exception('System message must be at the beginning.') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content or [] %}{{ part.text }}{% endfor %}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As strict as Qwen3.5's about system messages."""

SIZES: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 200_000,
}


@contextmanager
def speaking(words: Any, answers: Sequence[str]) -> Iterator[Session]:
    """A session of a tiny random model with the words of a tokenizer, whose answers, one after another, are these texts."""
    with tempfile.TemporaryDirectory() as folder:
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(folder)
        words.save_pretrained(folder)
        Path(folder, "chat_template.jinja").write_text(TEMPLATE)
        end = words.convert_tokens_to_ids(END)
        Path(folder, "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
        with AutoModel.from_pretrained(folder, device="cpu") as model:
            tokens = [token for text in answers for token in (*words(text)["input_ids"], end)]
            forward = model.lm_head.forward

            def forced(states: torch.Tensor) -> torch.Tensor:
                logits: torch.Tensor = forward(states)
                logits[..., tokens.pop(0) if tokens else end] = 1e4
                return logits

            model.lm_head.forward = forced
            with Session(model, max_requests=1) as session:
                yield session


def call_of(tool: str, **arguments: str) -> str:
    """What a model writes to call a tool."""
    return f"<tool_call>\n{json.dumps({'name': tool, 'arguments': arguments})}\n</tool_call>"


def run(command: Sequence[str], folder: Path, **environment: str) -> str | None:
    """What a program prints in a folder that is also its home; None if it is not on PATH."""
    program = shutil.which(command[0])
    if program is None:
        return None
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False, timeout=60).stdout.strip()
    print(f"{version.splitlines()[-1] if version else command[0]}: {' '.join(command)}", flush=True)
    found = subprocess.run(
        [program, *command[1:]],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), "TERM": "dumb", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    print(found.stdout[-600:] or found.stderr[-600:])
    return found.stdout


class Programs:
    """The checks; `serving` serves a session under NAME at an address that ends with /v1."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self.checks: dict[str, Check] = {
            "claude": self.check_claude,
            "cn": self.check_continue,
            "aider": self.check_aider,
            "llm": check_llm,
            "vscode": check_vscode,
        }

    def check_claude(self, session: Session, _: str) -> bool | None:
        """Claude Code reads a file that the model asks for, with all of its own prompt and tools."""
        with self._folder() as folder, self._says(session, [self._read("Read", "file_path", folder), f"It is {SECRET}."]) as url:
            base = {"ANTHROPIC_BASE_URL": url.removesuffix("/v1"), "ANTHROPIC_AUTH_TOKEN": "none"}
            models = [f"ANTHROPIC_{name}MODEL" for name in ("", "DEFAULT_OPUS_", "DEFAULT_SONNET_", "DEFAULT_HAIKU_")]
            quiet = {"DISABLE_TELEMETRY": "1", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}
            asked = ["claude", "-p", "What is the password in secret.txt?", "--output-format", "json"]
            found = run(asked, folder, **base, **dict.fromkeys(models, NAME), **quiet)
            if found is None:
                return None
            told = json.loads(found)
            return (told["is_error"], told["num_turns"], told["result"]) == (False, 2, f"It is {SECRET}.")

    def check_continue(self, session: Session, _: str) -> bool | None:
        """Continue's command line reads a file that the model asks for."""
        with self._folder() as folder, self._says(session, [self._read("Read", "filepath", folder), f"It is {SECRET}."]) as url:
            model = f"{{name: {NAME}, provider: openai, model: {NAME}, apiBase: '{url}', apiKey: none, roles: [chat]}}"
            Path(folder, "config.yaml").write_text(f"name: Local\nversion: 1.0.0\nschema: v1\nmodels:\n  - {model}\n")
            asked = ["cn", "-p", "What is the password in secret.txt?", "--config", "config.yaml"]
            found = run(asked, folder, CONTINUE_TELEMETRY_ENABLED="0")
            return None if found is None else f"It is {SECRET}." in found

    def check_aider(self, session: Session, _: str) -> bool | None:
        """aider edits a file."""
        with self._folder() as folder, self._says(session, [f"secret.txt\n```\n{SECRET}, changed\n```"]) as url:
            quiet = ["--no-show-model-warnings", "--no-check-update", "--no-analytics", "--no-show-release-notes", "--no-git"]
            asked = [
                "aider",
                "--model",
                f"openai/{NAME}",
                *quiet,
                "--yes-always",
                "--edit-format",
                "whole",
                "--message",
                "Change it.",
            ]
            found = run([*asked, "secret.txt"], folder, OPENAI_API_BASE=url, OPENAI_API_KEY="none")
            return None if found is None else Path(folder, "secret.txt").read_text() == f"{SECRET}, changed\n"

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            Path(folder, "secret.txt").write_text(f"The password is {SECRET}.\n")
            yield Path(folder)

    @contextmanager
    def _says(self, session: Session, answers: Sequence[str]) -> Iterator[str]:
        with speaking(session.model.tokenizer, answers) as spoken, self._serving(spoken) as url:
            yield url

    @staticmethod
    def _read(tool: str, argument: str, folder: Path) -> str:
        return call_of(tool, **{argument: str(folder / "secret.txt")})


def check_llm(_: Session, url: str) -> bool | None:
    """Simon Willison's llm answers, and fills a schema."""
    with tempfile.TemporaryDirectory() as folder:
        model = f"{{model_id: {NAME}, model_name: {NAME}, api_base: '{url}', supports_schema: true}}"
        Path(folder, "extra-openai-models.yaml").write_text(f"- {model}\n")
        asked = ["llm", "-m", NAME, "-o", "max_tokens", "60", "-o", "temperature", "0"]
        told = run([*asked, "What is the capital of France?"], Path(folder), LLM_USER_PATH=folder)
        filled = run([*asked, "--schema", "name, size int", "Describe Paris"], Path(folder), LLM_USER_PATH=folder)
        return None if told is None or filled is None else "Paris" in told and set(json.loads(filled)) == {"name", "size"}


def check_vscode(_: Session, url: str) -> bool:
    """The requests of Copilot's Ollama provider, as its public source has them: not the editor itself."""
    base = url.removesuffix("/v1")
    version = [int(part) for part in httpx.get(f"{base}/api/version").json()["version"].split(".")]
    (model,) = httpx.get(f"{base}/api/tags").json()["models"]
    shown = httpx.post(f"{base}/api/show", json={"model": model["model"]}, timeout=60).json()
    family = shown["model_info"]["general.architecture"]
    room = shown["model_info"][f"{family}.context_length"]
    function = {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}
    asked = {
        "model": model["model"],
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        "temperature": 0.1,
        "top_p": 1,
        "n": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
        "tools": [{"type": "function", "function": function}],
        "tool_choice": "auto",
        "max_tokens": 8,
    }
    found = httpx.post(f"{url}/chat/completions", json=asked, headers={"Authorization": "Bearer none"}, timeout=300)
    print(
        f"vscode: {version}, {model['model']}, {room} tokens, {shown['capabilities']}, {shown['model_info']['general.basename']}"
    )
    return version >= [0, 6, 4] and found.status_code == 200 and "[DONE]" in found.text and '"usage"' in found.text
