"""Data that the files lack: each family's special tokens, their places and its conversations.

Chat templates put `{{ cut }}` where the family's own code encodes two texts separately; it renders as nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFamily:
    """One generation of tokenizers: the same code for any vocabulary.

    `commands` get the ids after the vocabulary, in this order; `front` and `back` go around a text, `pair_back` after a
    pair. `attributes`: special tokens unless tokenizer_config.json says otherwise; `parses`: which special tokens are
    recognised in text: "all", "named" (the attributes), "configured" (the attributes the file names) or "none"; tokens of
    `added_tokens_decoder` always are. `spelling` names the way ids are decoded; `silent_commands` decode to nothing.
    `content`: how special tokens in messages are treated: "plain" text, "parsed" as in any text, or, with "template", all of
    the conversation is one text.
    """

    name: str
    file: str
    commands: tuple[str, ...] = ()
    front: tuple[str, ...] = ()
    attributes: Mapping[str, str | None] = field(default_factory=dict)
    parses: str
    spelling: str = ""
    adds_bos: bool = False
    silent_commands: bool = False
    content: str = "plain"
    padding_side: str = "right"
    digits: str = ""
    nfc: bool = False
    chat_template: str | None = None


_LLAMA_LIKE = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_GLM_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_GLM_NAMES = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<unk>"}

_ROUNDS = """[gMASK]sop{% set turn = namespace(number=0) %}{% for message in messages -%}
{% if message.role == 'user' %}{% set turn.number = turn.number + 1 %}{{ '[Round ' ~ turn.number ~ ']\\n\\n' }}问\uff1a\
{{ message.content }}{{ '\\n\\n' }}答\uff1a
{%- elif message.role == 'assistant' %}{{ message.content ~ '\\n\\n' }}
{%- else %}{{ raise_exception('ChatGLM2 knows the roles user and assistant, not ' ~ message.role) }}{% endif %}{% endfor %}"""

_ROLES = """{% for message in messages %}<|{{ message.role }}|>{{ message.metadata or '' }}{{ '\\n' }}{{ cut }}\
{{ message.content }}{% if message.role == 'system' and message.tools %}TOOLS{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|assistant|>{% endif %}"""

_GLM3_TOOLS = "{{ '\\n' ~ (message.tools | tojson(indent=4)) }}"
_GLM4_TOOLS = """{% for tool in message.tools %}{{ '\\n\\n## ' ~ tool.name ~ '\\n\\n' ~ (tool | tojson(indent=4)) }}\
{{ '\\n在调用上述函数时\uff0c请使用 Json 格式表示调用的参数。' }}{% endfor %}"""

_CHATML_V1 = """{% for message in messages %}{% if loop.first and message.role != 'system' %}<|im_start|>system{{ '\\n' }}\
You are a helpful assistant.<|im_end|>{{ '\\n' }}{% elif not loop.first %}{{ '\\n' }}{% endif %}<|im_start|>\
{{ message.role ~ '\\n' }}{{ cut }}{{ message.content }}<|im_end|>{% endfor %}\
{% if add_generation_prompt %}{{ '\\n' }}<|im_start|>assistant{{ '\\n' }}{% endif %}"""

_CHATML_V2 = """{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role ~ '\\n' ~ message.content }}<|im_end|>\
{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"""

_BOT = """{{ bos_token }}{% for message in messages -%}
{% if message.role == 'user' %}<|User|>:{{ message.content }}<eoh>{{ '\\n' }}
{%- elif message.role == 'assistant' %}<|Bot|>:{{ message.content }}<eoa>{{ '\\n' }}
{%- else %}{{ raise_exception('InternLM knows the roles user and assistant, not ' ~ message.role) }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}<|Bot|>:{% endif %}"""

_RESERVED = """{% for message in messages -%}
{% if message.role == 'user' %}USER{% elif message.role == 'assistant' %}ASSISTANT
{%- elif not loop.first %}{{ raise_exception('Baichuan knows a system message at the start, and user and assistant') }}
{%- endif %}{{ cut }}{{ message.content }}{{ cut }}{% endfor %}{% if add_generation_prompt %}ASSISTANT{% endif %}"""

CHATGLM2 = TokenizerFamily(
    name="ChatGLM2",
    file="tokenizer.model",
    commands=("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"),
    front=("[gMASK]", "sop"),
    attributes=_GLM_NAMES,
    parses="none",
    spelling="plain",
    silent_commands=True,
    padding_side="left",
    chat_template=_ROUNDS,
)
CHATGLM3 = TokenizerFamily(
    name="ChatGLM3",
    file="tokenizer.model",
    commands=CHATGLM2.commands + _GLM_ROLES,
    front=CHATGLM2.front,
    attributes=_GLM_NAMES,
    parses="none",
    spelling="plain",
    padding_side="left",
    chat_template="[gMASK]sop" + _ROLES.replace("TOOLS", _GLM3_TOOLS),
)
GLM4 = TokenizerFamily(
    name="GLM-4",
    file="tokenizer.model",
    commands=(
        *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
        *_GLM_ROLES,
        *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
    ),
    front=("[gMASK]", "<sop>"),
    attributes={"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    parses="configured",
    padding_side="left",
    digits="{1,3}",
    chat_template="[gMASK]<sop>" + _ROLES.replace("TOOLS", _GLM4_TOOLS),
)
QWEN = TokenizerFamily(
    name="QWen",
    file="qwen.tiktoken",
    commands=("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{index}|>" for index in range(205))),
    attributes={"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    parses="all",
    nfc=True,
    chat_template=_CHATML_V1,
)
INTERNLM = TokenizerFamily(
    name="InternLM",
    file="tokenizer.model",
    attributes={**_LLAMA_LIKE, "pad_token": "</s>"},
    parses="named",
    spelling="spaced",
    adds_bos=True,
    content="template",
    chat_template=_BOT,
)
INTERNLM2 = TokenizerFamily(
    name="InternLM2",
    file="tokenizer.model",
    attributes=INTERNLM.attributes,
    parses="named",
    spelling="spaced",
    adds_bos=True,
    content="template",
    chat_template=_CHATML_V2,
)
BAICHUAN = TokenizerFamily(
    name="Baichuan",
    file="tokenizer.model",
    attributes={**_LLAMA_LIKE, "pad_token": "<unk>"},
    parses="named",
    spelling="spaced inside",
    adds_bos=True,
    content="parsed",
    chat_template=_RESERVED,
)
