"""`AutoModelFor...`: the class for a task, as transformers' own auto classes choose it, streamed."""

from __future__ import annotations

from rabbit_engine.model.auto import AutoModel


class AutoModelForCausalLM(AutoModel):
    """Text from a prompt."""

    _auto = "AutoModelForCausalLM"


class AutoModelForSeq2SeqLM(AutoModel):
    """Text from text with an encoder and a decoder: translations, summaries."""

    _auto = "AutoModelForSeq2SeqLM"


class AutoModelForSequenceClassification(AutoModel):
    """A class or score of a text, or of a pair of texts."""

    _auto = "AutoModelForSequenceClassification"


class AutoModelForTokenClassification(AutoModel):
    """A class of each token: entities, parts of speech."""

    _auto = "AutoModelForTokenClassification"


class AutoModelForQuestionAnswering(AutoModel):
    """The answer to a question, as a span of a text."""

    _auto = "AutoModelForQuestionAnswering"


class AutoModelForMaskedLM(AutoModel):
    """The tokens behind masks."""

    _auto = "AutoModelForMaskedLM"


class AutoModelForMultipleChoice(AutoModel):
    """One of several continuations."""

    _auto = "AutoModelForMultipleChoice"


class AutoModelForImageTextToText(AutoModel):
    """Text from images and text."""

    _auto = "AutoModelForImageTextToText"


class AutoModelForSpeechSeq2Seq(AutoModel):
    """Text from speech."""

    _auto = "AutoModelForSpeechSeq2Seq"


class AutoModelForImageClassification(AutoModel):
    """A class of an image."""

    _auto = "AutoModelForImageClassification"
