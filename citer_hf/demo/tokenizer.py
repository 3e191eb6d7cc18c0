"""A word-level tokenizer for the problems: one token per word, digit or sign, with the space before it."""

import re

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .phrases import ITEMS, NAMES, PHRASES, THINGS

__all__ = ["CONTEXT", "build_tokenizer"]

CONTEXT = 1024

_PAD, _EOS, _UNKNOWN = "<pad>", "<eos>", "<unk>"
_PIECE = r" ?[A-Za-z]+| ?[0-9]| ?[^A-Za-z0-9\s]|\s"

# A turn of a chat reads as a problem does: the question, a line break, the response, the end.
_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{ '\\n' + message['content'] | trim + eos_token }}"
    "{%- else -%}"
    "{{ message['content'] | trim }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '\\n' }}{%- endif -%}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer from the words of the templates; the same words always get the same ids."""
    entries = [_PAD, _EOS, _UNKNOWN, *_pieces()]
    tokenizer = Tokenizer(models.WordLevel({entry: index for index, entry in enumerate(entries)}, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECE), behavior="isolated")
    # The tokens carry their own spaces: text is what they give when joined.
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_EOS,
        unk_token=_UNKNOWN,
        padding_side="left",
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
    )


def _pieces() -> list[str]:
    """List the signs, the digits and the words of the templates, each in the forms a text can have it in."""
    phrases = [re.sub(r"\{[a-z ]+\}", " ", phrase) for options in PHRASES.values() for phrase in options]
    told = " ".join([*phrases, *NAMES, *NAMES.values(), *ITEMS, *THINGS])
    words = sorted(set(re.findall(r"[A-Za-z]+", told)))
    digits = [str(digit) for digit in range(10)]
    # A text opens with a capital or a digit, so only these also occur without a space before them.
    openings = [word for word in words if word[0].isupper()]
    signs = ["\n", ".", ",", "?", " +", " -", " *", " ="]
    return [*signs, *digits, *(f" {digit}" for digit in digits), *openings, *(f" {word}" for word in words)]
