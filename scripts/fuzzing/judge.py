"""One case: change a copy of a checkpoint, load it, and judge the outcome."""

from __future__ import annotations

import logging
import random
import shutil
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from fuzzing.checkpoints import INPUT_IDS, KINDS, Kind
from fuzzing.mutations import Place, mutate, precious
from rabbit_engine import AutoModel, RabbitError

RIGHT = ("refused", "loaded", "as transformers")
WRONG = ("foreign", "unnamed", "wrong", "escaped", "hang", "died")


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of a case: one of RIGHT or WRONG, the change and its file, and the message."""

    outcome: str
    kind: str
    change: str
    said: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """The output of a loaded checkpoint: logits, and for its tokenizer or generation config token ids."""

    logits: torch.Tensor
    ids: Any = None

    def equals(self, other: Answer) -> bool:
        """Bit for bit; NaN is NaN."""
        if self.logits.dtype != other.logits.dtype or self.logits.shape != other.logits.shape or self.ids != other.ids:
            return False
        return bool(((self.logits == other.logits) | (self.logits.isnan() & other.logits.isnan())).all())


def be_quiet() -> None:
    """One thread, no warnings, no bars."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()


def make_bases(root: Path, kinds: list[str]) -> dict[str, Answer]:
    """The unchanged checkpoints below `root`, and the output of each."""
    answers = {}
    for name in kinds:
        kind, folder = KINDS[name], root / name
        folder.mkdir(parents=True)
        kind.make(folder)
        answers[name] = _unchanged(kind, folder, name)
    return answers


def _unchanged(kind: Kind, folder: Path, name: str) -> Answer:
    if kind.readable and not kind.delete_original:
        return _plain(folder, kind, name)
    fresh = folder.with_name(f"{folder.name}-fresh")
    shutil.copytree(folder, fresh)
    with torch.no_grad(), AutoModel.from_pretrained(fresh, device="cpu") as model:
        return Answer(model(INPUT_IDS).logits)


def _plain(folder: Path, kind: Kind, name: str) -> Answer:
    """transformers' output, with weights in their own memory: kernels round by alignment."""
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=kind.gguf_file).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return _answer(model, lambda: AutoTokenizer.from_pretrained(folder), name)


def _streamed(folder: Path, kind: Kind, name: str) -> Answer:
    keywords: dict[str, Any] = {"gguf_file": kind.gguf_file, "delete_original": kind.delete_original}
    with AutoModel.from_pretrained(folder, device="cpu", max_memory={"cpu": "1GiB"}, **keywords) as model:
        return _answer(model, lambda: model.tokenizer, name)


def _answer(model: Any, tokenizer: Callable[[], Any], name: str) -> Answer:
    with torch.no_grad():
        logits = model(INPUT_IDS).logits
        if name == "tokenizer":
            return Answer(logits, tokenizer()("a b")["input_ids"])
        if name == "generation":
            return Answer(logits, model.generate(INPUT_IDS, max_new_tokens=3, do_sample=False).tolist())
    return Answer(logits)


class Case:
    """Case `index` of `seed`: always the same change of the same file."""

    def __init__(self, root: Path, seed: int, index: int, answers: dict[str, Answer]) -> None:
        self._rng = random.Random(f"{seed}:{index}")
        self._name = self._rng.choice(sorted(answers))
        self._kind, self._base, self._before = KINDS[self._name], root / self._name, answers[self._name]
        self._folder = root / "cases" / f"{seed}-{index}" / "model"
        self._change, self._target = "", ""

    def judge(self) -> Verdict:
        """Change, load, compare; the case's folder is removed."""
        try:
            shutil.copytree(self._base, self._folder, symlinks=True)
            outside = self._mutate()
            outcome, said = self._load()
            if sorted(path.name for path in outside.iterdir() if path.read_text() == "mine") != sorted(_OUTSIDE):
                outcome, said = "escaped", f"a file outside the checkpoint was changed; {said}"
            return Verdict(outcome, self._name, f"{self._target}: {self._change}", said)
        finally:
            shutil.rmtree(self._folder.parent, ignore_errors=True)

    def _mutate(self) -> Path:
        outside = self._folder.parent / "outside"
        found = sorted({path for pattern in self._kind.targets for path in self._folder.glob(pattern)})
        path = self._rng.choice(found)
        self._target = path.relative_to(self._folder).as_posix()
        self._change = mutate(Place(path, self._rng, precious(outside)))
        return outside

    def _load(self) -> tuple[str, str]:
        try:
            got = _streamed(self._folder, self._kind, self._name)
        except RabbitError as error:
            return self._refused(error)
        except Exception as error:  # noqa: BLE001 - finding these is the purpose
            return self._foreign(error)
        if got.equals(self._before):
            return "loaded", ""
        if not self._kind.readable or self._kind.delete_original:
            return "wrong", "other logits than before"
        try:
            want = _plain(self._folder, self._kind, self._name)
        except Exception as error:  # noqa: BLE001 - transformers may raise anything
            return "wrong", f"other logits than before, and transformers refuses: {type(error).__name__}: {error}"
        return ("as transformers", "") if got.equals(want) else ("wrong", "other logits than transformers")

    def _refused(self, error: RabbitError) -> tuple[str, str]:
        said = f"{type(error).__name__}: {error}"
        names = (Path(self._target).name, str(self._folder))
        return ("refused" if any(name in said for name in names) else "unnamed"), said

    def _foreign(self, error: Exception) -> tuple[str, str]:
        said = f"{type(error).__name__}: {str(error)[:200]}"
        frames = traceback.extract_tb(error.__traceback__)
        if any(frame.name == "_answer" for frame in frames) and self._kind.readable and self._plain_raises(type(error)):
            return "as transformers", said
        places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
        return "foreign", f"{said} at {' < '.join(places[:-6:-1])}"

    def _plain_raises(self, kind: type[Exception]) -> bool:
        try:
            _plain(self._folder, self._kind, self._name)
        except Exception as error:  # noqa: BLE001 - transformers may raise anything
            return type(error) is kind
        return False


_OUTSIDE = ("precious.txt", "model.safetensors", "config.json")
