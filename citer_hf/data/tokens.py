"""Prompts and reference texts as the tokens that generation would see and write."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .examples import Example, Messages

__all__ = ["Encoded", "encode", "encode_prompt", "template_fingerprint", "tokenizer_fingerprint"]

Tokenizer = Any
"""A transformers tokenizer."""

# What a tokenizer may merge with a text that follows; only what comes after it is used.
ANCHORS = ("", "\n", ".", ":", "0", "a", "(")

# Cases, digits, white space, accents in both forms, scripts, contractions: where tokenizers differ.
PROBE = (
    "Hello  world,\n\n\tit's 1234567.89 + 3/4 = x^{2}! HELLO caf\u00e9 cafe\u0301 \u4f60\u597d \U0001f642 don't\r\n "
)


@dataclass(frozen=True)
class Encoded:
    """An example in tokens."""

    example: Example
    prompt_ids: list[int]
    response_ids: list[int]


def encode(
    example: Example,
    tokenizer: Tokenizer,
    max_length: int | None,
    eos_token_id: int | Sequence[int] | None = None,
    *,
    vocab_size: int | None = None,
) -> Encoded:
    """Encode prompt and reference together, so that the tokens are those of generation."""
    stops = _stops(tokenizer, eos_token_id)
    text = _prompt_text(example, tokenizer)
    special = _special_prefix(example, tokenizer, text)
    prompt_ids = special + _ids(tokenizer, text)
    response_ids: list[int] = []
    if example.response is not None:
        following = _following_text(example, tokenizer, text)
        response_ids = _until_stop(_continuation(example, tokenizer, special, text, following), stops)
    _check_vocabulary(example, tokenizer, prompt_ids + response_ids, stops, vocab_size)
    _check_length(example, len(prompt_ids), len(response_ids), max_length)
    return Encoded(example, prompt_ids, response_ids)


def encode_prompt(example: Example, tokenizer: Tokenizer) -> list[int]:
    """Encode a prompt as `generate` is given it: with what the tokenizer puts before a text, not what it puts
    after."""
    text = _prompt_text(example, tokenizer)
    return _special_prefix(example, tokenizer, text) + _ids(tokenizer, text)


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Return a SHA-256 that is the same for tokenizers that give the same tokens: vocabulary, EOS, and a test text."""
    special = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token]
    try:
        probe = _ids(tokenizer, PROBE, special=True)
    except Exception:
        # A tokenizer of words that has no unknown one raises what its library raises.
        probe = []
    return _sha256([sorted(tokenizer.get_vocab().items()), special, probe])


def template_fingerprint(tokenizer: Tokenizer) -> str:
    """Return the SHA-256 of a tokenizer's chat template, or of its absence."""
    return _sha256(tokenizer.chat_template)


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _ids(tokenizer: Tokenizer, text: str, special: bool = False) -> list[int]:
    found = tokenizer(text, add_special_tokens=special, padding=False, truncation=False, verbose=False)
    return list(found["input_ids"])


def _text(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _stops(tokenizer: Tokenizer, eos_token_id: int | Sequence[int] | None) -> list[int]:
    """Return the tokens that end a text, the one to add first."""
    given = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or [])
    own = tokenizer.eos_token_id
    if own is not None and (own in given or not given):
        given = [own, *(stop for stop in given if stop != own)]
    if not given:
        raise ValueError("eos_token_id: neither the generation config nor the tokenizer has one; a text must end.")
    return given


def _prompt_text(example: Example, tokenizer: Tokenizer) -> str:
    if example.messages is None:
        if not example.prompt:
            raise ValueError(f"row {example.row} has no prompt.")
        return example.prompt
    return _render(example, tokenizer, example.messages, add_generation_prompt=True)


def _render(example: Example, tokenizer: Tokenizer, messages: Messages, add_generation_prompt: bool) -> str:
    """Write a chat with the tokenizer's template."""
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise ValueError(
            f"row {example.row} is a chat, and the tokenizer has no chat template. Set tokenizer.chat_template, or "
            "give prompts as text."
        )
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        raise ValueError(f"row {example.row}: the chat template refuses the messages: {error}") from error


def _following_text(example: Example, tokenizer: Tokenizer, text: str) -> str:
    """Return the text that follows the prompt; for a chat, what the template renders for the assistant's turn."""
    assert example.response is not None
    if example.messages is None:
        return example.response
    turn = {"role": "assistant", "content": example.response}
    whole = _render(example, tokenizer, (*example.messages, turn), add_generation_prompt=False)
    if whole.startswith(text):
        return whole[len(text) :]
    # Templates of reasoning models open a thought in the prompt that they leave out of a turn of the past.
    _, found, end = whole.rpartition(example.response.strip())
    if not found:
        raise ValueError(f"row {example.row}: the chat template does not render the reference as it is.")
    return example.response + end


def _special_prefix(example: Example, tokenizer: Tokenizer, text: str) -> list[int]:
    """Return what the tokenizer puts before a text, such as BOS; a chat template does that itself."""
    if example.messages is not None:
        return []
    bare, full = _ids(tokenizer, text), _ids(tokenizer, text, special=True)
    starts = range(len(full) - len(bare) + 1)
    return full[: next((start for start in starts if full[start : start + len(bare)] == bare), 0)]


def _continuation(example: Example, tokenizer: Tokenizer, special: list[int], text: str, following: str) -> list[int]:
    """Return the tokens that follow the prompt's."""
    before, whole = _ids(tokenizer, text), _ids(tokenizer, text + following)
    if whole[: len(before)] == before:
        return whole[len(before) :]
    expected = _text(tokenizer, special + whole)
    # A text by itself may get a space before it that is not there; after an anchor it does not.
    for anchor in (*ANCHORS, text[-1]):
        start, anchored = _ids(tokenizer, anchor), _ids(tokenizer, anchor + following)
        after = anchored[len(start) :]
        if anchored[: len(start)] == start and _text(tokenizer, special + before + after) == expected:
            return after
    raise ValueError(
        f"row {example.row}: the tokenizer joins the end of the prompt, {text[-20:]!r}, with the start of the "
        f"reference, {following[:20]!r}, and has no tokens that end in between. Put white space between them."
    )


def _until_stop(ids: list[int], stops: list[int]) -> list[int]:
    """Return tokens up to the first that ends a text, which is added when there is none."""
    ends = [index for index, token in enumerate(ids) if token in stops]
    return ids[: ends[0] + 1] if ends else [*ids, stops[0]]


def _check_vocabulary(
    example: Example, tokenizer: Tokenizer, ids: list[int], stops: list[int], vocab_size: int | None
) -> None:
    """Refuse text that the tokenizer does not know, and tokens that the pair does not know."""
    beyond = [token for token in ids if vocab_size is not None and token >= vocab_size]
    if beyond:
        raise ValueError(
            f"row {example.row}: token {beyond[0]} ({_text(tokenizer, beyond[:1])!r}) is not among the {vocab_size} "
            "that both models know. Is this the pair's tokenizer?"
        )
    unknown = tokenizer.unk_token_id
    # Some tokenizers, such as GPT-2's, name EOS as the unknown token and never need one.
    if unknown is not None and unknown in ids and unknown not in (*stops, tokenizer.bos_token_id):
        index = ids.index(unknown)
        near = _text(tokenizer, ids[max(index - 5, 0) : index + 6])
        raise ValueError(
            f"row {example.row}: the tokenizer does not know all of the text ({near!r}). Leave the row out, or take a "
            "pair whose tokenizer knows it."
        )


def _check_length(example: Example, prompt: int, response: int, max_length: int | None) -> None:
    """Refuse what does not fit into the context, with room for one new token where there is no reference."""
    if max_length is None or prompt + max(response, 1) <= max_length:
        return
    what = f"{prompt} tokens of prompt" + (f" and {response} of reference" if response else " and a new one")
    raise ValueError(
        f"row {example.row}: {what} are more than the context of {max_length}. Leave the row out, shorten it, or "
        "take a pair with a longer context."
    )
