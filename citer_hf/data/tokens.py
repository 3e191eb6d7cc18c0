"""Prompts and reference texts as the tokens that generation is given and generates."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .examples import Example, Messages

# What a tokenizer may merge with a text that follows; only what comes after it is used.
ANCHORS = ("", "\n", ".", ":", "0", "a", "(")


@dataclass(frozen=True)
class Encoded:
    example: Example
    prompt_ids: list[int]
    response_ids: list[int]


def encode(
    example: Example,
    tokenizer: Any,
    max_length: int | None,
    eos_token_id: int | Sequence[int] | None = None,
    *,
    vocab_size: int | None = None,
) -> Encoded:
    """Encode prompt and reference together, so that the tokens are those of generation."""
    stops = _stops(tokenizer, eos_token_id)
    special, text = _prompt(example, tokenizer)
    prompt_ids, response_ids = special + _ids(tokenizer, text), []
    if example.response is not None:
        response_ids = _continuation(example, tokenizer, special, text)
        # A reference ends at its first EOS, which is added when there is none.
        ends = [index for index, token in enumerate(response_ids) if token in stops]
        response_ids = response_ids[: ends[0] + 1] if ends else [*response_ids, stops[0]]
    _check_vocabulary(example, tokenizer, prompt_ids + response_ids, stops, vocab_size)
    # Without a reference, one new token must fit into the context.
    if max_length is not None and len(prompt_ids) + max(len(response_ids), 1) > max_length:
        rest = f"{len(response_ids)} of reference" if response_ids else "a new one"
        raise ValueError(
            f"row {example.row}: {len(prompt_ids)} tokens of prompt and {rest} are more than the context of "
            f"{max_length}. Leave the row out, shorten it, or take a pair with a longer context."
        )
    return Encoded(example, prompt_ids, response_ids)


def encode_prompt(example: Example, tokenizer: Any) -> list[int]:
    """Encode a prompt as `generate` is given it: after what the tokenizer puts before a text, such as BOS."""
    special, text = _prompt(example, tokenizer)
    return special + _ids(tokenizer, text)


def _ids(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _text(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _stops(tokenizer: Any, eos_token_id: int | Sequence[int] | None) -> list[int]:
    """Return the tokens that end a text, the one to add first."""
    given = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or [])
    own = tokenizer.eos_token_id
    if own is not None and (own in given or not given):
        given = [own, *(stop for stop in given if stop != own)]
    if not given:
        raise ValueError("eos_token_id: neither the generation config nor the tokenizer has one; a text must end.")
    return given


def _prompt(example: Example, tokenizer: Any) -> tuple[list[int], str]:
    """Return the tokens that a tokenizer puts before a text, and the text of the prompt."""
    if example.messages is not None:
        # A chat template puts BOS there itself.
        return [], _render(example, tokenizer, example.messages, add_generation_prompt=True)
    if not example.prompt:
        raise ValueError(f"row {example.row} has no prompt.")
    bare, full = (_ids(tokenizer, example.prompt, special) for special in (False, True))
    starts = range(len(full) - len(bare) + 1)
    return full[: next((start for start in starts if full[start : start + len(bare)] == bare), 0)], example.prompt


def _render(example: Example, tokenizer: Any, messages: Messages, add_generation_prompt: bool) -> str:
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


def _continuation(example: Example, tokenizer: Any, special: list[int], text: str) -> list[int]:
    """Return the tokens of the reference, which follow the tokens of the prompt."""
    following = response = str(example.response)
    if example.messages is not None:
        turn = {"role": "assistant", "content": response}
        rendered = _render(example, tokenizer, (*example.messages, turn), add_generation_prompt=False)
        following = rendered.removeprefix(text)
        if following == rendered:
            # Templates of reasoning models open a thought in the prompt that they leave out of a turn of the past.
            _, found, end = rendered.rpartition(response.strip())
            following = response + end
            if not found:
                raise ValueError(f"row {example.row}: the chat template does not render the reference as it is.")
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


def _check_vocabulary(
    example: Example, tokenizer: Any, ids: list[int], stops: list[int], vocab_size: int | None
) -> None:
    """Raise an error for text that the tokenizer does not know, and for tokens that the pair does not know."""
    if vocab_size is not None and max(ids) >= vocab_size:
        beyond = next(token for token in ids if token >= vocab_size)
        raise ValueError(
            f"row {example.row}: token {beyond} ({_text(tokenizer, [beyond])!r}) is not among the {vocab_size} that "
            "both models know. Is this the pair's tokenizer?"
        )
    unknown = tokenizer.unk_token_id
    # Some tokenizers, such as GPT-2's, name EOS as the unknown token and never need one.
    if unknown is not None and unknown in ids and unknown not in (*stops, tokenizer.bos_token_id):
        near = _text(tokenizer, ids[max(ids.index(unknown) - 5, 0) : ids.index(unknown) + 6])
        raise ValueError(
            f"row {example.row}: the tokenizer does not know all of the text ({near!r}). Leave the row out, or take a "
            "pair whose tokenizer knows it."
        )
