"""Answers in a given form: JSON of a schema, or a call of a tool, by masks over the vocabulary (xgrammar)."""

import json
import re
from bisect import bisect_left
from typing import Any

import torch
from transformers import LogitsProcessor

from ..runs import import_extra
from .schema import ChatRequest, Request, refusal

# Keywords of JSON schemas that xgrammar passes over.
PASSED_OVER = {"not", "if", "then", "else", "uniqueItems", "unevaluatedItems", "contains", "propertyNames"}
PASSED_OVER |= {"dependencies", "dependentRequired", "dependentSchemas", "minContains", "maxContains"}
# Of these it follows one, and nothing beside it.
ALONE = ("$ref", "anyOf", "oneOf", "allOf", "enum", "const", "pattern", "format", "multipleOf", "patternProperties")
ALONE_IN_TYPE = set(ALONE[4:])
BESIDE = {"title", "description", "default", "examples", "deprecated", "$comment", "$schema", "$id", "$defs"}
BESIDE |= {"definitions", "readOnly", "writeOnly", "nullable", "discriminator"}
DEFINITIONS = ("$defs", "definitions")
HOLD_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems", "items", "additionalProperties")
TYPES: dict[str, tuple[type, ...]] = {"string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,)}
TYPES |= {"null": (type(None),), "object": (dict,), "array": (list,)}

# Bytes that xgrammar lets into strings, though no JSON has them: control characters, and what is not UTF-8.
FOREIGN = re.compile(rb"[\x00-\x1f\xc0\xc1\xf5-\xff]|\xe0[\x80-\x9f]|\xed[\xa0-\xbf]|\xf0[\x80-\x8f]|\xf4[\x90-\xbf]")


class Grammars:
    """The grammars of a tokenizer, each compiled once.

    Args:
        tokenizer: Of the pair.
        vocabulary: Number of logits.
        end_tokens: Ids of end tokens.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, end_tokens: list[int]):
        self.tokenizer, self.vocabulary, self.end_tokens = tokenizer, vocabulary, end_tokens
        self._compiler: Any = None
        self.texts, self._never = list[bytes](), dict[bytes, torch.Tensor]()

    def mask(self, request: Request, prompt_tokens: int, thinks: str) -> "list[LogitsProcessor]":
        """Return what keeps an answer in the form that a request asks for, or nothing where it may have any.

        Thoughts, which end with the text `thinks` where the prompt opens them, have no form.
        """
        param, schema = wanted_form(request)
        if schema is None:
            return []
        if not self.end_tokens:
            raise refusal(param, "this model has no end token, so that no answer would end.")
        try:
            xgrammar = import_extra("xgrammar", "grammar")
            if self._compiler is None:
                info = xgrammar.TokenizerInfo.from_huggingface(
                    self.tokenizer, vocab_size=self.vocabulary, stop_token_ids=self.end_tokens
                )
                self._compiler, self.texts = xgrammar.GrammarCompiler(info), info.decoded_vocab
            if fault := not_followed(schema):
                raise ValueError(f"{fault} is not followed; leave it out")
            # White space that nothing ends would be valid too.
            grammar = self._compiler.compile_json_schema(json.dumps(schema), any_whitespace=False)
        except ImportError as error:
            raise refusal(param, f"not offered here: {error}") from None
        except Exception as error:
            # The schema is a client's.
            raise refusal(param, f"no schema that can be followed: {str(error)[:200]}") from error
        return [Mask(xgrammar, grammar, self, prompt_tokens, thinks)]

    def never(self, before: int | None) -> torch.Tensor:
        """Return the tokens that no JSON has behind the token `before`, [1, vocabulary]: they hold foreign bytes."""
        last = b"" if before is None else self.texts[before][-1:]
        begun = last if last in (b"\xe0", b"\xed", b"\xf0", b"\xf4") else b""
        if begun not in self._never:
            self._never[begun] = torch.tensor([[bool(FOREIGN.search(begun + text)) for text in self.texts]])
        return self._never[begun]


def not_followed(schema: Any) -> str:
    """Return what of a schema xgrammar would pass over, so that an answer could break it; "" where it follows all."""
    if not isinstance(schema, dict):
        return ""
    if found := sorted(PASSED_OVER & schema.keys()):
        return found[0]
    beside, kind = schema.keys() - BESIDE, schema.get("type")
    if found := [name for name in ALONE if name in schema]:
        known = {"type"} if found[0] in ALONE_IN_TYPE else set()
        if found[0] == "patternProperties":
            known = {"type", "additionalProperties"}
        if beside - known - {found[0]} or (found[0] == "allOf" and len(schema["allOf"]) > 1):
            return f"what stands beside {found[0]}" if found[0] != "allOf" else "allOf"
        values = schema.get("enum", [schema["const"]] if "const" in schema else [])
        if kind is not None and not all(type(value) in TYPES.get(str(kind), ()) for value in values):
            return f"a value of another type in {found[0]}"
        if found[0] == "oneOf" and "discriminator" not in schema:
            return "oneOf without a discriminator"
        if found[0] == "pattern" and re.search(r"\(\?(?!:)", schema["pattern"]):
            return "a pattern that looks around"
        if found[0] == "multipleOf" and kind != "integer":
            return "multipleOf of a number"
    elif beside and kind is None and not beside & {"properties", "items", "prefixItems", "required"}:
        return f"{sorted(beside)[0]} without a type"
    if not set(schema.get("required") or ()) <= (schema.get("properties") or {}).keys():
        return "required of what is no property"
    if schema.get("properties") and beside & {"minProperties", "maxProperties"}:
        return "a number of properties beside their names"
    named = [schema.get(name) for name in ("properties", "patternProperties", *DEFINITIONS)]
    parts = [part for one in named if isinstance(one, dict) for part in one.values()]
    for part in map(schema.get, HOLD_SCHEMAS):
        parts += part if isinstance(part, list) else [part]
    return next(filter(None, map(not_followed, parts)), "")


def wanted_form(request: Request) -> tuple[str, Any]:
    """Return the field that asks for a form, and the schema; `None` where an answer may have any."""
    if tools := forced_tools(request):
        calls, shared = [], dict[str, Any]()
        for tool in tools:
            schema = dict(tool.parameters or {"type": "object"})
            if '"$ref": "#"' in json.dumps(schema):
                raise refusal("tools", "parameters that refer to themselves as a whole are not followed.")
            for name in DEFINITIONS:
                # References are counted from the root.
                for key, value in schema.pop(name, {}).items():
                    if shared.setdefault(name, {}).setdefault(key, value) != value:
                        raise refusal("tools", f"{name} of two functions differ: {key}.")
            form = {"type": "object", "properties": {"name": {"const": tool.name}, "arguments": schema}}
            calls.append({**form, "required": ["name", "arguments"], "additionalProperties": False})
        return "tool_choice", {**(calls[0] if len(calls) == 1 else {"anyOf": calls}), **shared}
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return "", None
    return "response_format", wanted.json_schema.schema_ if wanted.json_schema else {"type": "object"}


def forced_tools(request: Request) -> list[Any]:
    """Return the functions of which one must be called, or nothing."""
    if not isinstance(request, ChatRequest) or request.tool_choice in (None, "none", "auto"):
        return []
    functions = [tool.function for tool in request.tools or []]
    if not isinstance(request.tool_choice, str):
        name = request.tool_choice.function.name
        functions = [one for one in functions if one.name == name]
    if not functions:
        raise refusal("tool_choice", "expected a function that is among the tools.")
    return functions


class Mask(LogitsProcessor):
    """Leaves the tokens that a grammar allows behind any prefix of the answer, in whatever order it is asked."""

    field = "response_format"

    def __init__(self, xgrammar: Any, grammar: Any, of: Grammars, prompt_tokens: int, thinks: str):
        self._xgrammar, self._matcher = xgrammar, xgrammar.GrammarMatcher(grammar)
        self._of, self._prompt_tokens, self._accepted = of, prompt_tokens, list[int]()
        self._thinks, self._thought = thinks, list[int]()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        answer = input_ids[0, self._prompt_tokens :].tolist()
        if self._thinks:
            if not self._thought or answer[: len(self._thought)] != self._thought:
                text = self._of.tokenizer.decode(answer)
                if self._thinks not in text:
                    return self._ending_cleanly(text, scores)
                counts = range(1, len(answer) + 1)
                ended = bisect_left(counts, True, key=lambda n: self._thinks in self._of.tokenizer.decode(answer[:n]))
                self._thought = answer[: ended + 1]
            answer = answer[len(self._thought) :]
        # 1. Go back to what this prefix has in common with the last one, and on from there.
        common = next((i for i, (a, b) in enumerate(zip(answer, self._accepted, strict=False)) if a != b), None)
        common = min(len(answer), len(self._accepted)) if common is None else common
        self._matcher.rollback(len(self._accepted) - common)
        del self._accepted[common:]
        for token in answer[common:]:
            if not self._matcher.accept_token(token):
                raise ValueError(f"the token {token} does not fit the grammar")
            self._accepted.append(token)
        # 2. What the grammar does not allow cannot be chosen.
        bits = self._xgrammar.allocate_token_bitmask(1, scores.shape[-1])
        self._matcher.fill_next_token_bitmask(bits)
        allowed = torch.zeros(1, scores.shape[-1])
        self._xgrammar.apply_token_bitmask_inplace(allowed, bits)
        never = self._of.never(answer[-1] if answer else None)
        scores = scores.masked_fill(((allowed < 0) | never).to(scores.device), -torch.inf)
        if scores.isinf().all():
            # It is complete, or nothing fits: the answer ends, whatever else suppresses end tokens.
            scores[:, self._of.end_tokens] = 0
        return scores

    def _ending_cleanly(self, thoughts: str, scores: torch.Tensor) -> torch.Tensor:
        """Forbid that the answer ends within its thoughts, and tokens that end them and go on with other text."""
        mark, scores = self._thinks, scores.clone()
        scores[:, self._of.end_tokens] = -torch.inf
        begun = next((mark[n:] for n in range(len(mark) - 1, 0, -1) if thoughts.endswith(mark[:n])), None)
        if begun is not None:
            end = begun.encode()
            bad = [
                token for token, one in enumerate(self._of.texts) if one.startswith(end) and one[len(end) :].strip()
            ]
            scores[:, bad] = -torch.inf
        return scores
