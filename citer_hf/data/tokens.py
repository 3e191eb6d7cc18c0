"""Prompts and reference texts as the tokens that generation is given and generates."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from ..runs import note
from .examples import Example, Messages

THOUGHT = "<think>"
# What a tokenizer may merge with a text that follows; only what comes after it is used.
ANCHORS = ("", "\n", ".", ":", "0", "a", "(")


@dataclass(frozen=True)
class Encoded:
    example: Example
    prompt_ids: list[int]
    response_ids: list[int]


def encode(
    example: Example, tokenizer: Any, max_length: int | None, end_tokens: Sequence[int] = (), vocab_size: float = inf
) -> Encoded:
    """Encode prompt and reference together, so that the tokens are those of generation, which ends at `end_tokens`."""
    given, example = example, in_chat(example, tokenizer)
    special, text = _prompt(example, tokenizer)
    prompt_ids, response_ids = special + _ids(tokenizer, text), []
    if example.response is not None:
        response_ids, own = _continuation(example, tokenizer, special, text), tokenizer.eos_token_id
        # A reference ends at its first EOS, which is added when there is none: the tokenizer's own, if it is one.
        stops = sorted(end_tokens, key=lambda stop: stop != own) or [own]
        if stops == [None]:
            raise ValueError("eos_token_id: neither the generation config nor the tokenizer has one; a text must end.")
        ends = [index for index, token in enumerate(response_ids) if token in stops]
        response_ids = response_ids[: ends[0] + 1] if ends else [*response_ids, stops[0]]
    # Some tokenizers, such as GPT-2's, name EOS as the unknown token and never need one.
    unknown = {tokenizer.unk_token_id} - {*end_tokens, tokenizer.eos_token_id, tokenizer.bos_token_id}
    ids = prompt_ids + response_ids
    for place, token in enumerate(ids):
        if token in unknown or token >= vocab_size:
            raise ValueError(
                f"row {example.row}: token {token} in {_text(tokenizer, ids[max(place - 5, 0) : place + 6])!r} is "
                "unknown to the tokenizer or to one of the models. Leave the row out, or use the pair's tokenizer."
            )
    # Without a reference, one new token must fit into the context.
    length = len(prompt_ids) + max(len(response_ids), 1)
    if max_length is not None and length > max_length:
        raise ValueError(f"row {example.row}: {length} tokens exceed the context of {max_length}. Shorten the row.")
    return Encoded(given, prompt_ids, response_ids)


def encode_prompt(example: Example, tokenizer: Any) -> list[int]:
    """Encode a prompt as `generate` is given it: after what the tokenizer puts before a text, such as BOS."""
    special, text = _prompt(in_chat(example, tokenizer), tokenizer)
    return special + _ids(tokenizer, text)


def in_chat(example: Example, tokenizer: Any) -> Example:
    """Return an example as a chat where the tokenizer has a chat template, unless its prompt is to stay a text."""
    return example.as_chat() if tokenizer.chat_template and not example.is_text else example


def show_prompt(tokenizer: Any, prompt: Sequence[int]) -> None:
    note(
        f"The first prompt, between the lines, exactly as the models see it:\n---\n{_text(tokenizer, [*prompt])}\n---"
    )


def _ids(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _text(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _prompt(example: Example, tokenizer: Any) -> tuple[list[int], str]:
    """Return the tokens that a tokenizer puts before a text, and the text of the prompt."""
    if example.messages is not None:
        # A chat template puts BOS there itself.
        return [], _render(example, tokenizer, example.messages, add_generation_prompt=True)
    text = str(example.prompt)
    bare, full = (_ids(tokenizer, text, special) for special in (False, True))
    starts = range(len(full) - len(bare) + 1)
    return full[: next((start for start in starts if full[start : start + len(bare)] == bare), 0)], text


def _render(example: Example, tokenizer: Any, messages: Messages, add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    options: dict[str, Any] = {"tools": list(example.tools)} if example.tools else {}
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **options
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise ValueError(f"row {example.row}: the chat template cannot render the messages: {error}") from error


def _continuation(example: Example, tokenizer: Any, special: list[int], text: str) -> list[int]:
    """Return the tokens of the reference, which follow the tokens of the prompt."""
    following = response = str(example.response)
    if example.messages is not None:
        turn = example.turn or {"role": "assistant", "content": response}
        rendered = _render(example, tokenizer, (*example.messages, turn), add_generation_prompt=False)
        following = rendered.removeprefix(text)
        if following == rendered:
            # Templates of reasoning models open a thought in the prompt that they leave out of a turn of the past.
            _, found, end = rendered.rpartition(response.strip() or "\0")
            thought = turn.get("reasoning_content") if text.rstrip().endswith(THOUGHT) else None
            following = (f"{thought}\n</think>\n\n" if thought else "") + response + end
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
