"""Answers in a given form: JSON of a schema, or a call of a tool, by masks over the vocabulary (xgrammar)."""

import json
from typing import Any

import torch
from transformers import LogitsProcessor

from ..runs import import_extra
from .schema import ChatRequest, Request, refusal

# Keywords of JSON schemas that xgrammar passes over.
PASSED_OVER = {"not", "if", "then", "else", "uniqueItems", "unevaluatedItems"} | {
    "dependencies", "dependentRequired", "dependentSchemas", "minContains", "maxContains"
}  # fmt: skip
# Of these it follows one, and nothing beside it.
ALONE = ("$ref", "anyOf", "oneOf", "allOf", "enum", "const", "pattern", "format")
BESIDE = {"title", "description", "default", "examples", "deprecated", "$comment", "$schema", "$id", "$defs"}
BESIDE |= {"definitions", "readOnly", "writeOnly", "nullable", "discriminator"}
HOLD_SCHEMAS = (
    "anyOf", "oneOf", "allOf", "prefixItems", "items", "additionalProperties", "contains", "propertyNames"
)  # fmt: skip
TYPES: dict[str, Any] = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None), "object": dict,
    "array": list,
}  # fmt: skip


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
                self._compiler = xgrammar.GrammarCompiler(info)
            if fault := not_followed(schema):
                raise ValueError(f"{fault} is not followed; leave it out")
            # White space that nothing ends would be valid too.
            grammar = self._compiler.compile_json_schema(json.dumps(schema), any_whitespace=False)
        except ImportError as error:
            raise refusal(param, f"not offered here: {error}") from None
        except (RuntimeError, ValueError, TypeError, RecursionError) as error:
            raise refusal(param, f"no schema that can be followed: {str(error)[:200]}") from error
        return [Mask(xgrammar, grammar, self.tokenizer, prompt_tokens, self.end_tokens, thinks)]


def not_followed(schema: Any) -> str:
    """Return what of a schema xgrammar would pass over, so that an answer could break it; "" where it follows all."""
    if not isinstance(schema, dict):
        return ""
    if found := sorted(PASSED_OVER & schema.keys()):
        return found[0]
    beside, kind = schema.keys() - BESIDE, schema.get("type")
    if found := [name for name in ALONE if name in schema]:
        known = {"type"} if found[0] in ("enum", "const", "pattern", "format") else set()
        values = schema.get("enum", [schema["const"]] if "const" in schema else [])
        of_type = kind is None or all(isinstance(value, TYPES.get(str(kind), ())) for value in values)
        if beside - known - {found[0]} or not of_type or (found[0] == "allOf" and len(schema["allOf"]) > 1):
            return f"what stands beside {found[0]}" if found[0] != "allOf" else "allOf"
        if found[0] == "oneOf" and "discriminator" not in schema:
            return "oneOf without a discriminator"
    elif beside and kind is None and not beside & {"properties", "items", "prefixItems", "required"}:
        return f"{sorted(beside)[0]} without a type"
    if not set(schema.get("required") or ()) <= (schema.get("properties") or {}).keys():
        return "required of what is no property"
    if kind == "number" and "multipleOf" in schema:
        return "multipleOf of a number"
    named = [schema.get(name) for name in ("properties", "patternProperties", "$defs", "definitions")]
    parts = [part for one in named if isinstance(one, dict) for part in one.values()]
    for name in (
        "anyOf",
        "oneOf",
        "allOf",
        "prefixItems",
        "items",
        "additionalProperties",
        "contains",
        "propertyNames",
    ):
        part = schema.get(name)
        parts += part if isinstance(part, list) else [part]
    return next(filter(None, map(not_followed, parts)), "")


def wanted_form(request: Request) -> tuple[str, Any]:
    """Return the field that asks for a form, and the schema; `None` where an answer may have any."""
    tools = forced_tools(request)
    if tools:
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": tool.name}, "arguments": tool.parameters or {"type": "object"}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for tool in tools
        ]
        return "tool_choice", calls[0] if len(calls) == 1 else {"anyOf": calls}
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

    def __init__(
        self, xgrammar: Any, grammar: Any, tokenizer: Any, prompt_tokens: int, end_tokens: list[int], thinks: str
    ):
        self._xgrammar, self._matcher = xgrammar, xgrammar.GrammarMatcher(grammar)
        self._tokenizer, self._prompt_tokens, self._thinks = tokenizer, prompt_tokens, thinks
        self._end_tokens, self._accepted = end_tokens, list[int]()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        answer = input_ids[0, self._prompt_tokens :].tolist()
        if self._thinks:
            thought = thought_tokens(self._tokenizer, answer, self._thinks)
            if thought is None:
                return scores
            answer = answer[thought:]
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
        scores = scores.masked_fill((allowed < 0).to(scores.device), -torch.inf)
        if scores.isinf().all():
            # It is complete, or nothing fits: the answer ends, whatever else suppresses end tokens.
            scores[:, self._end_tokens] = 0
        return scores


def thought_tokens(tokenizer: Any, answer: list[int], end: str) -> int | None:
    """Return how many first tokens are thoughts, the mark of their end included; `None` where they have not ended."""
    if end not in tokenizer.decode(answer):
        return None
    return next(count for count in range(1, len(answer) + 1) if end in tokenizer.decode(answer[:count]))
