"""Tiny random pairs with tokenizers, and what tests of the command line need."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

from citer_hf import CiterForCausalLM
from citer_hf.cli import app
from citer_hf.demo import DEMO_PAIR
from tests.conftest import make_pair
from tests.families import EOS, PAD, VOCAB, tiny_model

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 \n.,?!:;'-+*=/()[]<>_&"
TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' and message['content'] == 'refuse' -%}"
    "{{ raise_exception('no system messages') }}{%- endif -%}"
    "{{ message['role'][0] + ':' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'a:' }}{%- endif -%}"
)


# What generation configs are published with, that a pair does in its own way.
PUBLISHED: list[dict[str, Any]] = [{"use_cache": False}, {"cache_implementation": "static"}, {"stop_strings": ["o"]}]
PUBLISHED += [{"prompt_lookup_num_tokens": 3}, {"num_beams": 2}]


def character_tokenizer(
    template: str | None = TEMPLATE, characters: Sequence[str] = CHARACTERS, eos: str = "<eos>"
) -> PreTrainedTokenizerFast:
    """One token per character, so that encoding what was decoded gives the same tokens."""
    entries = ["<pad>", "<bos>", eos, *characters]
    tokenizer = Tokenizer(models.WordLevel({entry: index for index, entry in enumerate(entries)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": eos, "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **special)


def chat_pair(slm: str = "llama", llm: str = "llama", template: Any = TEMPLATE, **options: Any) -> Any:
    """A tiny pair with a tokenizer, half of whose tokens are the LLM's, and which never ends an answer by itself."""
    model = make_pair(slm, llm, router="random", **options)
    model._tokenizer = character_tokenizer(template)
    silent = [PAD, 1, EOS, *range(len(CHARACTERS) + 3, VOCAB)]
    model.generation_config.update(pad_token_id=PAD, eos_token_id=EOS, suppress_tokens=silent, max_length=None)
    return model


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def save_demo_pair(folder: Path) -> Path:
    """Save a tiny random pair with the demo's tokenizer, half of whose tokens are the LLM's."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_PAIR)
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for seed, role in enumerate(("slm", "llm")):
        base = tiny_model("llama", seed, vocab_size=len(tokenizer), num_hidden_layers=1, hidden_size=16, **special)
        base.generation_config = GenerationConfig(do_sample=False, **special)
        base.save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
    model = CiterForCausalLM.from_pair(folder / "slm", folder / "llm", router="random")
    model.save_pretrained(folder / "pair", save_base_models=True)
    return folder / "pair"


# What `citer bench` measures in no time.
QUICK_BENCH = ("--device", "cpu", "--max-new-tokens", 4, "--prompt-length", 6, "--repeats", 1, "--warmup", 0)


def invoke(*arguments: Any, text: str = "") -> Any:
    """Run `citer` in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=text)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result
