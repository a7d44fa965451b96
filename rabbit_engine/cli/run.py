"""`rabbit run MODEL PROMPT`: the answer on stdout as it comes."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from rabbit_engine.cli import engine, options
from rabbit_engine.cli.loading import loaded
from rabbit_engine.errors import ConfigurationError, first_line


def encode(model: Any, prompt: str, chat: bool | None) -> Any:
    """The prompt as token ids [1, length], through the chat template where there is one (and `chat` does not forbid it)."""
    template = getattr(model.tokenizer, "chat_template", None)
    if chat and template is None:
        raise ConfigurationError("this model has no chat template: leave out --chat")
    if template is None or chat is False:
        return model.tokenizer(prompt, return_tensors="pt")
    messages = [{"role": "user", "content": prompt}]
    try:
        return model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    except Exception as error:  # a template is anybody's code
        raise ConfigurationError(f"the model's chat template fails ({first_line(error)}): give --no-chat") from error


def sampling(temperature: float | None, top_p: float | None, top_k: int | None, seed: int | None) -> dict[str, Any]:
    """Greedy unless a sampling option is given, and at a temperature so low that logits would overflow."""
    if temperature is not None and temperature < options.COLDEST:
        return {"do_sample": False}
    named = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    given = {name: value for name, value in named.items() if value is not None}
    return {"do_sample": bool(given) or seed is not None, **given}


def write_answer(model: Any, inputs: Any, **keywords: Any) -> None:
    """Generate, and write the text as it comes; where the checkpoint asks for beams or several texts, the best one at the end."""
    config = model.generation_config
    if all(getattr(config, name, None) in (None, 1) for name in ("num_beams", "num_return_sequences")):
        streamer = engine.transformers.TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
        model.generate(**inputs, streamer=streamer, **keywords)
        return
    found = model.generate(**inputs, **keywords, return_dict_in_generate=False)
    typer.echo(model.tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def run(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(help="What to ask; - reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Use the chat template; the default is to, where there is one."),
    ] = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    seed: options.Seed = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    max_memory: options.MaxMemory = None,
    attn: options.Attention = "auto",
    saving_path: options.SavingPath = None,
    gguf_file: options.GgufFile = None,
    revision: options.Revision = None,
    token: options.Token = None,
    trust_remote_code: options.TrustRemoteCode = False,
    progress: Annotated[bool, typer.Option(help="Show each pass over the layers, on a terminal.")] = False,
) -> None:
    """Answer PROMPT with MODEL, streamed from disk layer by layer."""
    text = sys.stdin.read() if prompt == "-" else prompt
    with loaded(
        model,
        max_memory=max_memory,
        attn=attn,
        saving_path=saving_path,
        device=device,
        dtype=dtype,
        gguf_file=gguf_file,
        revision=revision,
        token=token,
        trust_remote_code=trust_remote_code,
        show_layer_progress=progress and sys.stderr.isatty(),
    ) as streamed:
        inputs = encode(streamed, text, chat)
        if seed is not None:
            engine.torch.manual_seed(seed)
        write_answer(streamed, inputs, max_new_tokens=max_new_tokens, **sampling(temperature, top_p, top_k, seed))
