"""Tokenizers and chat templates of the kinds that models have, small enough to read.

The tokenizers are trained here, in milliseconds. The templates do what those of the named models
do to turns (drop thinking, open it, number of end tokens, other tokens in the past) and no more.
"""

from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer, UnigramTrainer
from transformers import PreTrainedTokenizerFast

TEXT = [
    "once upon a time the cat sat on the mat and asked what is two plus two",
    "system user assistant tool hello thank you please answer four five yes no",
    "Human: Assistant: <|im_start|> <|im_end|> </s>\n\n",
] * 8
SPECIAL = ("<unk>", "<s>", "</s>", "<think>", "</think>", "<|im_start|>", "<|im_end|>", "<e>")


@cache
def _trained(kind: str) -> str:
    """The tokenizer.json of a kind."""
    special = list(SPECIAL)
    if kind == "unigram":
        inner = Tokenizer(models.Unigram())
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        inner.decoder = decoders.Metaspace(prepend_scheme="always")
        trainer = UnigramTrainer(
            vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:
        inner = Tokenizer(models.BPE(byte_fallback=False, unk_token="<unk>"))
        trainer = BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    if kind == "byte level":
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
    elif kind == "byte level, prefix":
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        inner.decoder = decoders.ByteLevel()
    elif kind.startswith("metaspace"):
        scheme = kind.rpartition(" ")[2]
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
        inner.decoder = decoders.Metaspace(prepend_scheme=scheme)
    elif kind == "llama":  # the mark is put before the text by a normalizer, and nothing is split
        inner.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
        inner.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        inner.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    inner.train_from_iterator(TEXT, trainer)
    inner.pre_tokenizer = None if kind == "llama" else inner.pre_tokenizer
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
    )
    return inner.to_str()


MARKED = ("metaspace always", "metaspace first", "llama", "unigram", "byte level, prefix")
KINDS = (*MARKED, "byte level")


def tokenizer(kind="byte level", template=None, eos="</s>", special=SPECIAL, text=None):
    inner = Tokenizer.from_str(_trained(kind))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": eos}
    extra = [t for t in special if t not in names.values()]
    out = PreTrainedTokenizerFast(tokenizer_object=inner, additional_special_tokens=extra, **names)
    out.chat_template = template
    return out


def _template(message, prompt, before=""):
    asks = "{% if add_generation_prompt %}" + prompt + "{% endif %}"
    loop = "{% for m in messages %}" + message + "{% endfor %}"
    return before + loop + asks


_LAST = (
    "{% set ns = namespace(q=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.q = loop.index0 %}{% endif %}{% endfor %}"
)
_ANSWER = "{{ m.content.split('</think>')[-1].strip() }}"
_THOUGHT = (
    "{% if '</think>' in m.content %}{{ m.content.split('</think>')[0] }}</think>\n{% else %}"
)

TEMPLATES = {
    "chatml": _template(
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n", "<|im_start|>assistant\n"
    ),
    # thinking stays in the turns after the last question alone
    "qwen3": _template(
        "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.index0 > ns.q %}"
        + _THOUGHT
        + "<think>\n\n</think>\n\n{% endif %}{% endif %}{% if m.role == 'assistant' %}"
        + _ANSWER
        + "{% else %}{{ m.content }}{% endif %}<|im_end|>\n",
        "<|im_start|>assistant\n",
        _LAST,
    ),
    # the prompt opens the thinking, and every turn loses it
    "r1": _template(
        "{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}<|Assistant|>"
        + _ANSWER
        + "</s>{% endif %}",
        "<|Assistant|><think>\n",
        "<s>",
    ),
    # the turn loses its thinking, and the prompt does not open it
    "v3": _template(
        "{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}<|Assistant|>"
        + _ANSWER
        + "</s>{% endif %}",
        "<|Assistant|>",
        "<s>",
    ),
    # an empty thinking is written where there is none, and the prompt opens one
    "nemotron": _template(
        "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and '<think>' not in m.content %}"
        "<think></think>{% endif %}{{ m.content }}<|im_end|>\n",
        "<|im_start|>assistant\n<think>\n",
    ),
    # the last turn has another end than those before it
    "gpt-oss": _template(
        "<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>"
        "{{ m.content }}{% if m.role == 'assistant' and loop.last %}<|return|>{% else %}<|end|>"
        "{% endif %}",
        "<|start|>assistant",
    ),
    # two ends at the end, one before
    "phi3": _template("<|{{ m.role }}|>\n{{ m.content }}<|end|>\n", "<|assistant|>\n")
    + "{% if not add_generation_prompt %}</s>{% endif %}",
    "llama3": _template(
        "<|header|>{{ m.role }}<|/header|>\n\n{{ m.content | trim }}<|eot|>",
        "<|header|>assistant<|/header|>\n\n",
        "<s>",
    ),
    "gemma": _template(
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
        "<end_of_turn>\n",
        "<start_of_turn>model\n",
        "<s>",
    ),
    "mistral": _template(
        "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>"
        "{% endif %}",
        "",
        "<s>",
    ),
    # two ends in every turn
    "cohere2": _template(
        "<|turn|>{{ m.role }}<|part|>{{ m.content }}<|end part|><|end turn|>",
        "<|turn|>assistant<|part|>",
        "<s>",
    ),
    # the next turn's token ends this one
    "glm": _template("<|{{ m.role }}|>\n{{ m.content }}", "<|assistant|>\n", "[gMASK]"),
    # contents are lists of parts
    "smolvlm": _template(
        "{{ m.role | capitalize }}:{% for part in m.content %}{% if part.type == 'text' %}"
        "{{ part.text }}{% endif %}{% endfor %}<end_of_utterance>\n",
        "Assistant:",
        "<|im_start|>",
    ),
    # the past is cut to the last question
    "window": _template(
        "{% if loop.index0 >= ns.q %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endif %}",
        "<|im_start|>assistant\n",
        _LAST,
    ),
    # no token ends a turn
    "plain": _template("{{ m.role }}: {{ m.content }}\n", "assistant: "),
}
WORDS = {
    "r1": ("<|User|>", "<|Assistant|>"),
    "v3": ("<|User|>", "<|Assistant|>"),
    "gpt-oss": ("<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|end|>"),
    "phi3": ("<|user|>", "<|assistant|>", "<|end|>"),
    "llama3": ("<|header|>", "<|/header|>", "<|eot|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "mistral": ("[INST]", "[/INST]"),
    "cohere2": ("<|turn|>", "<|part|>", "<|end part|>", "<|end turn|>"),
    "glm": ("[gMASK]", "<|user|>", "<|assistant|>"),
    "smolvlm": ("<end_of_utterance>",),
}
"""The special tokens of a template, beside `SPECIAL`."""
END = {
    "chatml": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "r1": "</s>",
    "v3": "</s>",
    "nemotron": "<|im_end|>",
    "gpt-oss": "<|return|>",
    "phi3": "<|end|>",
    "llama3": "<|eot|>",
    "gemma": "<end_of_turn>",
    "mistral": "</s>",
    "cohere2": "<|end part|>",
    "glm": "</s>",
    "smolvlm": "<end_of_utterance>",
    "window": "<|im_end|>",
    "plain": "</s>",
}
"""The token with which an assistant's turn ends; where a template writes none, the EOS token."""


def with_template(name):
    """A byte-level tokenizer with one of the templates and its tokens."""
    return tokenizer(template=TEMPLATES[name], special=(*SPECIAL, *WORDS.get(name, ())))
