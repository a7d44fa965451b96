"""llama.cpp on the CPU, its file mapped: `python -m peers.llama_cpp MODEL.gguf [--no-repack]`; write_gguf.py makes that file."""

from __future__ import annotations

import os
from typing import Any

import llama_cpp  # type: ignore[import-not-found, unused-ignore]

from peers.timing import Clock, decode_by_iterator, parser, run


def decode(model: Any, prompt_ids: list[int], count: int) -> Clock:
    """`count` greedy tokens; the prompt is evaluated before the first."""
    return decode_by_iterator(model.generate(prompt_ids, temp=0.0, repeat_penalty=1.0), count)


def _forbid_repacking() -> None:
    """`Llama` has no argument for it: change the parameters that it starts from."""
    defaults = llama_cpp.llama_model_default_params

    def without() -> Any:
        parameters = defaults()
        parameters.use_extra_bufts = False
        return parameters

    llama_cpp.llama_cpp.llama_model_default_params = without


def main() -> None:
    """One thread per core, like torch; the context has just enough room for the prompt and the tokens."""
    arguments = parser(__doc__, "a GGUF file")
    arguments.add_argument("--no-repack", action="store_true", help="Compute on the mapped file: no copy in another layout.")
    options = arguments.parse_args()
    if options.no_repack:
        _forbid_repacking()
    threads = len(os.sched_getaffinity(0))

    def load() -> Any:
        return llama_cpp.Llama(
            str(options.model),
            n_ctx=len(options.prompt_ids) + options.tokens + 1,
            n_threads=threads,
            n_threads_batch=threads,
            use_mmap=True,
            verbose=False,
        )

    run(options, "llama.cpp", f"llama-cpp-python {llama_cpp.__version__}", load, decode)


if __name__ == "__main__":
    main()
