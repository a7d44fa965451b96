"""`rabbit run MODEL PROMPT`: the answer on stdout as it comes."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rabbit_engine.cli import options
from rabbit_engine.errors import ConfigurationError
from rabbit_engine.model import AutoModel


def parse_memory(text: str | None) -> dict[int | str, int | str] | None:
    """`"8GiB"` is the device's budget; `"0=8GiB,cpu=24GiB"` names each place."""
    if text is None:
        return None
    if "=" not in text:
        return {0: text, "cpu": text}
    places = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
    return {int(place) if place.isdigit() else place: size for place, size in places.items()}


def encode(model: Any, prompt: str, chat: bool | None) -> Any:
    """The prompt as token ids [1, length], through the chat template where there is one (and `chat` does not forbid it)."""
    template = getattr(model.tokenizer, "chat_template", None)
    if chat and template is None:
        raise ConfigurationError("this model has no chat template: leave out --chat")
    if template is None or chat is False:
        return model.tokenizer(prompt, return_tensors="pt")
    messages = [{"role": "user", "content": prompt}]
    return model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def sampling(temperature: float | None, top_p: float | None, top_k: int | None, seed: int | None) -> dict[str, Any]:
    """Greedy unless a sampling option is given."""
    if seed is not None:
        from transformers import set_seed

        set_seed(seed)
    named = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    given = {name: value for name, value in named.items() if value is not None}
    return {"do_sample": bool(given) or seed is not None, **given}


def run(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(help="What to ask; - reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Use the chat template; the default is to, where there is one."),
    ] = None,
    temperature: Annotated[float | None, typer.Option(min=0.01, help="Sample, at this temperature.")] = None,
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
    progress: Annotated[bool, typer.Option(help="Show each pass over the layers.")] = False,
) -> None:
    """Answer PROMPT with MODEL, streamed from disk layer by layer."""
    from transformers import TextStreamer

    text = typer.get_text_stream("stdin").read() if prompt == "-" else prompt
    with AutoModel.from_pretrained(
        model,
        device=device,
        dtype=dtype,
        max_memory=parse_memory(max_memory),
        attn_implementation=attn,
        layer_shards_saving_path=saving_path,
        gguf_file=gguf_file,
        revision=revision,
        token=token,
        trust_remote_code=trust_remote_code,
        show_layer_progress=progress,
    ) as streamed:
        inputs = encode(streamed, text, chat)
        streamer = TextStreamer(streamed.tokenizer, skip_prompt=True, skip_special_tokens=True)
        chosen = sampling(temperature, top_p, top_k, seed)
        streamed.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **chosen)
