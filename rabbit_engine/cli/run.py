"""`rabbit run MODEL PROMPT`: the answer on stdout as it is generated."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Any, cast

import typer

from rabbit_engine.cli import engine, options, output
from rabbit_engine.cli.groups import takes_groups
from rabbit_engine.cli.loading import IN_STAGES, Loading, loaded
from rabbit_engine.errors import ConfigurationError, RabbitError, first_line
from rabbit_engine.utils.foreign import foreign_code


def encode(model: engine.model.StreamedModel, prompt: str, chat: bool | None) -> engine.transformers.BatchEncoding:
    """The prompt as token ids [1, length], through the chat template if there is one (unless `chat` is False).

    Raises ConfigurationError for an empty prompt, or ids outside the vocabulary, and CannotGenerateError for a class that does
    not continue texts.
    """
    engine.sessions.encoding.require_text_generation(model)
    inputs = _tokenized(model, prompt, chat)
    vocabulary = int(model.config.get_text_config().vocab_size)
    engine.sessions.encoding.require_ids(inputs["input_ids"].flatten().tolist(), vocabulary)
    return inputs


def _tokenized(model: engine.model.StreamedModel, prompt: str, chat: bool | None) -> engine.transformers.BatchEncoding:
    template = getattr(model.tokenizer, "chat_template", None)
    if chat and template is None:
        raise ConfigurationError("this model has no chat template: leave out --chat")
    if template is None or chat is False:
        plain: engine.transformers.BatchEncoding = model.tokenizer(prompt, return_tensors="pt")
        return plain
    messages = [{"role": "user", "content": prompt}]
    with foreign_code(lambda error: ConfigurationError(f"the model's chat template fails ({first_line(error)}): give --no-chat")):
        found = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        return cast("engine.transformers.BatchEncoding", found)


def sampling(temperature: float | None, top_p: float | None, top_k: int | None, seed: int | None) -> dict[str, float | bool]:
    """Sampling keywords: greedy without options, and at temperatures so low that logits would overflow."""
    if temperature is not None and temperature < options.COLDEST:
        return {"do_sample": False}
    named = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    given = {name: value for name, value in named.items() if value is not None}
    return {"do_sample": bool(given) or seed is not None, **given}


def constrained(model: engine.model.StreamedModel, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords for an answer that follows what was asked for. Raises ConstraintError and MissingExtraError."""
    if not asked:
        return {}
    processor = engine.sessions.constrained.constrain(model, **asked)
    return {"logits_processor": [processor], "stopping_criteria": [processor.completion]}


def write_answer(model: engine.model.StreamedModel, inputs: engine.transformers.BatchEncoding, **keywords: object) -> None:
    """Generate one text and write it as it comes; with beam search, the best one at the end.

    Raises ConfigurationError for settings that `generate` rejects.
    """
    config = getattr(model, "generation_config", None)  # a class that does not generate has none
    if config is None or config.num_beams in (None, 1):
        streamer = engine.transformers.TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
        _generate(model, inputs, streamer=streamer, **keywords)
        return
    found = _generate(model, inputs, **keywords, return_dict_in_generate=False)
    begins = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]  # a decoder begins with a token of its own
    typer.echo(model.tokenizer.decode(found[0, begins:], skip_special_tokens=True))


def _generate(model: engine.model.StreamedModel, inputs: engine.transformers.BatchEncoding, **keywords: object) -> Any:
    try:
        return model.generate(**inputs, num_return_sequences=1, **keywords)
    except RabbitError:
        raise
    except (ValueError, ImportError) as error:
        if not engine.generation.refused_by_generate(error):
            raise
        raise ConfigurationError(
            f"generate rejects the settings of the command and of the checkpoint's generation_config.json ({first_line(error)}): "
            "change them there"
        ) from error


@takes_groups
def run(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens to generate.")] = 128,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Use the chat template; on by default if there is one."),
    ] = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    seed: options.Seed = None,
    schema: options.Schema = None,
    regex: options.Regex = None,
    choice: options.Choice = None,
    *,
    loading: Annotated[Loading, IN_STAGES],
    progress: Annotated[bool, typer.Option(help="Show each pass over the layers, on a terminal.")] = False,
) -> None:
    """Answer PROMPT with MODEL, streamed from disk layer by layer."""
    text = sys.stdin.read() if prompt == "-" else prompt
    asked: dict[str, Any] = {name: value for name, value in (("schema", schema), ("regex", regex), ("choices", choice)) if value}
    if asked:
        engine.sessions.Options(**asked)  # what is no constraint is refused before a model is loaded
    with loaded(model, loading, show_layer_progress=progress and sys.stderr.isatty()) as streamed:
        inputs = encode(streamed, text, chat)
        if seed is not None:
            engine.torch.manual_seed(seed)
        constraint = constrained(streamed, asked)
        write_answer(streamed, inputs, max_new_tokens=max_new_tokens, **sampling(temperature, top_p, top_k, seed), **constraint)
        for name, value in streamed.profile.speculation.rows():
            output.note(f"{name}: {value}")
