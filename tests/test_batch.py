"""A batch over a file: every line is answered once, however often the process is killed; broken lines fail alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion
from tasks import encoded, open_both
from test_tasks import T5
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from rabbit_engine import Session, batch, errors
from rabbit_engine.batches import inputs
from rabbit_engine.batches.inputs import InputFile, InputLine
from rabbit_engine.batches.outputs import OutputFile
from rabbit_engine.batches.settings import BatchSettings
from rabbit_engine.server.openai.bodies import Bodies

SETTINGS = BatchSettings.of({"model": 'a"b&c é', "dtype": torch.float16, "task": None})
HARNESS = Path(__file__).with_name("killed_batch.py")
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}w9"
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that knows 96 words and has a chat template."""
    folder = families.save("llama", tmp_path_factory.mktemp("talker"))
    tokenizer = Tokenizer(WordLevel({f"w{index}": index for index in range(96)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", chat_template=TEMPLATE).save_pretrained(folder)
    return folder


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """`files(line, ...)`: an input of these lines (objects, or texts as they are) and the path of its output."""

    def write(*lines: object) -> tuple[Path, Path]:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (tmp_path / "in.jsonl").write_text("".join(f"{text}\n" for text in texts))
        return tmp_path / "in.jsonl", tmp_path / "out.jsonl"

    return write


def chat(custom_id: str, text: str, **body: Any) -> dict[str, Any]:
    """A line of OpenAI's format."""
    asked = {"model": "any", "messages": [{"role": "user", "content": text}], "max_tokens": 4, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": asked}


def prompt(number: int) -> dict[str, Any]:
    """A plain line."""
    return {"custom_id": f"c{number}", "prompt": f"w{number % 90 + 3} w5 w7", "max_tokens": 1 + number % 4}


def read(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts(rows: Rows) -> dict[str, str]:
    return {row["custom_id"]: row["response"]["body"]["choices"][0]["text"] for row in rows}


def test_each_line_gets_the_answer_that_a_session_gives(talker: Path, streamed: Any, files: Any) -> None:
    model = streamed(talker)
    source, target = files(chat("a", "w3 w4"), {"prompt": "w5 w6", "max_tokens": 3, "n": 2}, chat("b", "w8", max_tokens=2))
    report = batch(model, source, target)
    rows = {row["custom_id"]: row for row in read(target)}
    assert set(rows) == {"a", "line-2", "b"}
    assert all(list(row) == ["id", "custom_id", "response", "error"] and row["error"] is None for row in rows.values())
    assert {row["response"]["status_code"] for row in rows.values()} == {200}
    with Session(model) as session:
        expected = {"a": session.chat("w3 w4", max_new_tokens=4), "b": session.chat("w8", max_new_tokens=2)}
        (continued,) = session.generate("w5 w6", max_new_tokens=3)
    for name, reply in expected.items():
        body = ChatCompletion.model_validate(rows[name]["response"]["body"])
        assert (body.choices[0].message.content, body.usage.completion_tokens) == (reply.text, len(reply.tokens))
    body = Completion.model_validate(rows["line-2"]["response"]["body"])
    assert [choice.text for choice in body.choices] == [continued.text] * 2
    assert (report.lines, report.failed, report.resumed, report.tokens) == (3, 0, 0, 12)


def test_a_broken_line_fails_and_the_others_go_on(talker: Path, streamed: Any, files: Any) -> None:
    lines = ['{"custom_id": "cut', "[1]", {"custom_id": 7, "prompt": "w3"}, {"text": "w3"}, chat("stream", "w3", stream=True)]
    lines += [{**chat("url", "w3"), "url": "/v1/images"}, {**chat("get", "w3"), "method": "GET"}, {"url": "/v1/completions"}]
    lines += [{"custom_id": "range", "prompt": "w3", "top_p": 2}, {"custom_id": "long", "prompt": "w3 " * 300}]
    lines += [
        {"custom_id": "classify", "url": "/v1/classify", "body": {"input": "w3"}},
        chat("empty", "w3", messages=[]),
        prompt(1),
        '{"custom_id": "\\ud83d"}',
    ]
    source, target = files(*lines)
    report = batch(streamed(talker), source, target)
    found = {row["custom_id"]: row for row in read(target)}
    assert (len(found), report.failed) == (len(lines), len(lines) - 1)
    assert found.pop("c1")["error"] is None
    assert all(row["response"]["status_code"] == 400 and row["error"]["message"] for row in found.values())
    told = {name: row["error"]["message"] for name, row in found.items()}
    expected = {
        "line-1": "not valid JSON",
        "line-2": "not a JSON object",
        "line-3": "custom_id is not a text",
        "line-4": "nothing tells the line's task",
        "stream": "stream is not supported",
        "url": "url is '/v1/images': possible are /v1/chat/completions",
        "get": "method is 'GET'",
        "line-8": "body is not a JSON object",
        "range": "top_p",
        "long": "300 tokens",
        "classify": "has no head for labels of texts",
        "empty": "messages",
        "line-14": "not valid JSON",
    }
    assert all(text in told[name] for name, text in expected.items()), told
    assert found["long"]["error"]["code"] == "context_length_exceeded"


def test_plain_lines_are_of_the_task_that_is_given(talker: Path, streamed: Any, files: Any) -> None:
    source, target = files({"prompt": "w3 w4", "max_tokens": 4}, chat("a", "w3 w4"), {"input": "w3"})
    batch(streamed(talker), source, target, task="chat")
    plain, line, other = sorted(read(target), key=lambda row: row["id"])
    assert plain["response"]["body"]["choices"] == line["response"]["body"]["choices"]
    assert other["error"]["message"] == "the line asks for embed, the batch for chat"
    with pytest.raises(errors.ConfigurationError, match="task='talk': expected one of chat, complete, embed"):
        batch(talker, source, target, task="talk")  # type: ignore[arg-type]


def test_texts_are_embedded_and_scored_as_by_a_session(talker: Path, streamed: Any, files: Any) -> None:
    model = streamed(talker)
    asked = {"custom_id": "e", "url": "/v1/embeddings", "body": {"model": "any", "input": ["w3 w4", "w5"]}}
    score = {"custom_id": "c", "context": "w3 w4", "continuation": " w5 w6"}
    source, target = files(asked, score, {"custom_id": "s", "url": "/v1/score", "body": {"input": ["w3 w4 w5", ["w3", " w4"]]}})
    batch(model, source, target)
    found = {row["custom_id"]: row["response"]["body"] for row in read(target)}
    with Session(model) as session:
        vectors = session.embed(["w3 w4", "w5"])
        scores = {"c": [session.score(("w3 w4", " w5 w6"))], "s": session.score(["w3 w4 w5", ("w3", " w4")])}
    embedded = CreateEmbeddingResponse.model_validate(found["e"])
    assert [each.embedding for each in embedded.data] == vectors.tolist()
    assert embedded.usage.prompt_tokens == 3
    for name, expected in scores.items():
        assert [each["logprob"] for each in found[name]["data"]] == [each.logprob for each in expected]
        assert [tuple(each["token_logprobs"]) for each in found[name]["data"]] == [each.token_logprobs for each in expected]


def test_texts_are_classified_and_ranked_as_by_a_session(streamed: Any, files: Any, tmp_path: Path) -> None:
    sizes = {"vocab_size": 96, "dim": 32, "hidden_dim": 48, "n_heads": 4, "n_layers": 2, "num_labels": 1}
    model, _ = open_both(tmp_path / "model", streamed, ("DistilBertForSequenceClassification", "DistilBertConfig", sizes))
    asked = {"custom_id": "r", "query": "w5", "documents": ["w6 w7", "w8", "w9 w10 w11"], "top_n": 2}
    source, target = files({"custom_id": "c", "url": "/v1/classify", "body": {"input": ["w5 w6", ["w7", "w8"]]}}, asked)
    batch(model, source, target)
    found = {row["custom_id"]: row["response"]["body"] for row in read(target)}
    with Session(model) as session:
        labels, ranked = session.classify(["w5 w6", ("w7", "w8")]), session.rerank("w5", asked["documents"], top=2)
    assert [(each["label"], each["score"]) for each in found["c"]["data"]] == [(each.label, each.score) for each in labels]
    assert [(each["index"], each["relevance_score"]) for each in found["r"]["results"]] == [
        (each.index, each.score) for each in ranked
    ]
    files({"text": "w5 w6"})
    batch(model, source, tmp_path / "plain.jsonl", task="classify")
    assert read(tmp_path / "plain.jsonl")[0]["response"]["body"]["data"][0]["score"] == labels[0].score
    for task in ("chat", "score"):
        with pytest.raises(TypeError, match=r"does not generate text|has no head for the next token"):
            batch(model, source, tmp_path / f"{task}.jsonl", task=task)


def test_an_encoder_decoder_continues_texts(streamed: Any, files: Any, tmp_path: Path) -> None:
    """Its encoder reads the prompt; it also embeds. A chat needs a template, which it has not."""
    model, oracle = open_both(tmp_path / "model", streamed, ("T5ForConditionalGeneration", "T5Config", T5))
    source, target = files({"prompt": "w5 w6 w7", "max_tokens": 5}, chat("c", "w5"), {"input": "w8 w9"}, {"input": [[8, 9]]})
    assert batch(model, source, target).failed == 1
    generated, refused, words, ids = (row["response"]["body"] for row in sorted(read(target), key=lambda row: row["id"]))
    expected = oracle.generate(**encoded("w5 w6 w7"), max_new_tokens=5, do_sample=False)[0]
    assert generated["choices"][0]["text"] == model.tokenizer.decode(expected, skip_special_tokens=True)
    assert generated["usage"]["completion_tokens"] == len(expected) - 1  # without the one it begins with
    assert "has no chat template" in refused["error"]["message"]
    with Session(model) as session:
        assert words["data"][0]["embedding"] == session.embed("w8 w9").tolist()
        assert ids["data"][0]["embedding"] == session.embed([8, 9]).tolist()
    with pytest.raises(errors.ConfigurationError, match=r'T5ForConditionalGeneration has no chat template.*task="complete"'):
        batch(model, source, tmp_path / "chat.jsonl", task="chat")


def test_a_killed_batch_goes_on_without_losing_or_repeating_a_line(
    talker: Path, streamed: Any, files: Any, tmp_path: Path
) -> None:
    source, target = files(*map(prompt, range(24)))
    command = [sys.executable, str(HARNESS), str(talker), str(source), str(target), "2", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    lines = list(map(int, done.stdout.split()))
    assert lines[:2] == [1, 3]  # child n wrote n whole lines and a part of one
    assert (sorted(lines), lines[-1]) == (lines, 24)
    assert len(read(target)) == 24
    batch(streamed(talker), source, tmp_path / "whole.jsonl")
    assert texts(read(target)) == texts(read(tmp_path / "whole.jsonl"))


def test_an_output_cut_anywhere_loses_at_most_its_last_line(files: Any) -> None:
    path, output = files(prompt(1), "{broken", prompt(2))
    source = InputFile(path)
    ends = [0]
    with OutputFile(output, source, SETTINGS) as target:
        for line in source.lines():
            target.append(line, "é", {}, {"code": "x"} if line.number == 2 else None)
            ends.append(output.stat().st_size)
    whole = output.read_bytes()
    for length in range(len(whole) + 1):
        output.write_bytes(whole[:length])
        kept = sum(end <= length for end in ends) - 1
        with OutputFile(output, source, SETTINGS) as target:
            assert (target.count, target.failed) == (kept, int(kept > 1))
            assert [target.has(line) for line in source.lines()] == [index < kept for index in range(3)]
        assert output.read_bytes() == whole[: ends[kept]]


def test_lines_that_failed_are_answered_again(talker: Path, streamed: Any, files: Any, monkeypatch: Any) -> None:
    source, target = files(*map(prompt, range(6)))
    model, whole = streamed(talker), Bodies.text_requests

    def fail(bodies: Bodies, asked: Any) -> Any:
        return whole(bodies, asked) if asked.prompt < "w5" else 1 / 0

    with monkeypatch.context() as patched:
        patched.setattr(Bodies, "text_requests", fail)
        assert batch(model, source, target).failed == 4
    before = read(target)
    assert batch(model, source, target).resumed == 6  # nobody asked for another try
    report = batch(model, source, target, retry_failed=True)
    assert (report.lines, report.resumed, report.failed) == (6, 2, 0)
    rows = read(target)
    assert rows[:2] == [row for row in before if row["error"] is None]
    assert sorted(texts(rows)) == [f"c{number}" for number in range(6)]
    content = target.read_bytes()
    assert batch(talker, source, target, retry_failed=True, device="there is none").resumed == 6
    assert target.read_bytes() == content


def test_taking_failed_lines_out_may_be_killed_anywhere(files: Any, monkeypatch: Any) -> None:
    path, output = files(prompt(1), "{broken", prompt(2), prompt(3))
    source, seen = InputFile(path), []
    with OutputFile(output, source, SETTINGS) as target:
        for line in source.lines():
            target.append(line, "é", {}, {"code": "x"} if line.number < 3 else None)
    output.chmod(0o640)
    output.write_bytes((whole := output.read_bytes()) + whole[:50])  # killed in the middle of a line
    kept = b"".join(whole.splitlines(keepends=True)[2:])
    for name in ("fsync", "replace", "open", "close", "ftruncate"):
        monkeypatch.setattr(os, name, partial(_watch, getattr(os, name), lambda: seen.append(output.read_bytes())))
    with (
        OutputFile(output, source, SETTINGS, retry_failed=True) as target,
        pytest.raises(errors.ConfigurationError, match="another process is writing"),
    ):
        OutputFile(output, source, SETTINGS)
    assert (target.count, target.failed, target.retried) == (2, 0, 2)
    assert {content[: len(whole)] for content in seen} == {whole, kept}
    assert (output.read_bytes(), output.stat().st_mode & 0o777) == (kept, 0o640)
    output.with_name(f".{output.name}.scratch").write_bytes(whole[:30])  # left by a killed process
    for content in (whole, kept):
        output.write_bytes(content)
        with OutputFile(output, source, SETTINGS, retry_failed=True) as target:
            assert [target.has(line) for line in source.lines()] == [False, False, True, True]
    assert list(output.parent.glob(".*")) == [] or content == kept


def _watch(call: Any, watch: Callable[[], object], *given: Any, **named: Any) -> Any:
    """Call it, looking before and after."""
    watch()
    try:
        return call(*given, **named)
    finally:
        watch()


def test_a_finished_batch_loads_nothing_and_lines_added_to_its_input_follow(talker: Path, streamed: Any, files: Any) -> None:
    source, target = files(prompt(1), prompt(2))
    batch(talker, source, target, device="cpu")
    before = target.read_bytes()
    report = batch(talker, source, target, device="there is none")
    assert (report.lines, report.resumed, report.tokens) == (2, 2, 0)
    files(prompt(1), prompt(2), "", prompt(3))
    report = batch(streamed(talker), source, target)
    assert (report.lines, report.resumed) == (3, 2)
    assert target.read_bytes().startswith(before)
    assert set(texts(read(target))) == {"c1", "c2", "c3"}


def test_an_output_of_other_input_or_other_options_is_refused_and_unchanged(talker: Path, files: Any, tmp_path: Path) -> None:
    source, target = files(prompt(1), prompt(2))
    batch(talker, source, target, device="cpu")
    before = target.read_bytes()
    for change, told in (
        ({"max_new_tokens": 7}, "was begun with max_new_tokens=1024, and this batch has max_new_tokens=7: repeat the former"),
        ({"task": "score", "overflow": "truncate"}, "with overflow=refuse, no task, and .* overflow=truncate, task=score:"),
        ({"dtype": torch.float16}, "was begun with no dtype, and this batch has dtype=float16:"),
    ):
        with pytest.raises(errors.ConfigurationError, match=told):
            batch(talker, source, target, **{"device": "cpu", **change})
    (tmp_path / "other").symlink_to(talker)
    (other := tmp_path / "copied").mkdir()
    with pytest.raises(errors.ConfigurationError, match=rf"was begun with model={talker.name}, and this batch has model=copied:"):
        batch(other, source, target)
    assert batch(tmp_path / "other", source, target).resumed == 2  # the same model under another path
    for lines in ([prompt(1)], [prompt(2), prompt(1)], [prompt(1), {**prompt(2), "seed": 1}]):
        files(*lines)
        with pytest.raises(errors.ConfigurationError, match="belongs to other input: its line"):
            batch(talker, source, target, device="cpu")
    assert target.read_bytes() == before


def test_files_that_are_no_batch_are_refused(talker: Path, files: Any, tmp_path: Path) -> None:
    source, target = files(prompt(1))
    for content in ("notes", "notes\n", '{"id": "batch_x"}\n'):
        target.write_text(content)
        with pytest.raises(errors.ConfigurationError, match="was not written by a batch"):
            batch(talker, source, target)
        assert target.read_text() == content
    for wrong, told in ((source, "is the input"), (tmp_path, "cannot write"), (tmp_path / "none" / "out", "cannot write")):
        with pytest.raises(errors.ConfigurationError, match=told):
            batch(talker, source, wrong)
    with pytest.raises(errors.ConfigurationError, match="cannot read"):
        batch(talker, tmp_path / "none.jsonl", target)


def test_lines_with_the_same_custom_id_are_named(talker: Path, files: Any) -> None:
    source, target = files(prompt(1), {"prompt": "w3"}, "{broken", prompt(2), {**prompt(3), "custom_id": "c2"})
    with pytest.raises(errors.ConfigurationError, match="lines 4 and 5 have the same custom_id, 'c2'"):
        batch(talker, source, target)
    assert not target.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such lock")
def test_two_processes_never_write_the_same_output(talker: Path, files: Any) -> None:
    source, target = files(prompt(1))
    with (
        OutputFile(target, InputFile(source), SETTINGS),
        pytest.raises(errors.ConfigurationError, match="another process is writing"),
    ):
        batch(talker, source, target)


def test_only_a_few_lines_are_in_memory_however_many_there_are(talker: Path, streamed: Any, files: Any, monkeypatch: Any) -> None:
    source, target = files(*({**prompt(number), "max_tokens": 1} for number in range(240)))
    alive: set[int] = set()
    most = 0

    class Watched(InputLine):
        def __init__(self, number: int, raw: bytes) -> None:
            nonlocal most
            super().__init__(number, raw)
            alive.add(id(self))
            most = max(most, len(alive))

        def __del__(self) -> None:
            alive.discard(id(self))

    monkeypatch.setattr(inputs, "InputLine", Watched)
    batch(streamed(talker), source, target, max_requests=4)
    assert len(read(target)) == 240
    assert 2 <= most <= 2 * 4 + 3  # the queue, the one being read, the one before it, and the one last written


def test_a_line_that_is_read_and_answered_takes_a_few_bytes(files: Any) -> None:
    """However long it is and its answer: 9 bytes, and 24 more while the names are compared."""

    def peak(lines: int) -> int:
        path, output = files(*({**prompt(number), "user": "x" * 300} for number in range(lines)))
        tracemalloc.start()
        for _ in range(2):  # the second start finds all of them answered
            source = InputFile(path)
            with OutputFile(output, source, SETTINGS) as target:
                for line in source.lines():
                    if not target.has(line):
                        target.append(line, "c", {"body": "y" * 300}, None)
                assert target.count == lines
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        output.unlink()
        return most

    assert (peak(4000) - peak(1000)) / 3000 < 64


def test_the_command_answers_a_file_and_says_what_it_did(talker: Path, files: Any, rabbit: Any) -> None:
    source, target = files(prompt(1), "{broken")
    done = rabbit("batch", talker, source, target, "--device", "cpu")
    assert (done.code, done.out) == (0, "")
    assert done.err.splitlines()[-1].startswith("1 of 2 lines answered, 1 failed; 2 tokens in 0:00:")
    again = rabbit("batch", talker, source, target, "--device", "cpu")
    assert again.err.splitlines()[0] == f"{target} answers 2 lines already"
    assert again.err.splitlines()[-1].startswith("1 of 2 lines answered, 1 failed (2 lines were done before); 0 tokens")
    refused = rabbit("batch", talker, source, target, "--device", "cpu", "--max-new-tokens", 5)
    assert refused.code == 2
    assert "was begun with --max-new-tokens 1024, and this batch has --max-new-tokens 5: repeat" in refused.err
    retried = rabbit("batch", talker, source, target, "--device", "cpu", "--retry-failed")
    assert retried.err.splitlines()[:2] == [f"{target} answers 1 lines already", "1 failed before: answered again"]
    assert sorted(row["custom_id"] for row in read(target)) == ["c1", "line-2"]


def test_the_command_keeps_beginnings_of_several_lines_unless_told_not_to(
    talker: Path, files: Any, rabbit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rabbit_engine import prefixes

    class Opened(prefixes.PrefixStore):
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            opened.append(keywords["repeated_only"])
            super().__init__(*arguments, **{**keywords, "block_tokens": 4})

    opened: list[bool] = []
    monkeypatch.setattr(prefixes.store, "PrefixStore", Opened)
    monkeypatch.setenv("RABBIT_ENGINE_PREFIXES", str(tmp_path / "prefixes"))
    lines = [{"custom_id": f"c{number}", "prompt": f"w5 w6 w7 w8 w{number}", "max_tokens": 1} for number in range(10, 13)]
    source, target = files(*lines)
    assert rabbit("batch", talker, source, target, "--device", "cpu", "--prefix-store", "off").code == 0
    assert opened == []
    target.unlink()
    assert rabbit("batch", talker, source, target, "--device", "cpu", "--max-requests", 1).code == 0
    assert opened == [True]
    assert len(list((tmp_path / "prefixes").rglob("*.safetensors"))) == 1
