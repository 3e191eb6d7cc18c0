"""A page for the browser that shows who decided each token of an output: `citer playground`."""

import copy
import socket
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from tokenizers.decoders import DecodeStream
from transformers.generation.streamers import BaseStreamer
from transformers.utils.hub import cached_file

from .data.examples import Example
from .data.tokens import encode_prompt
from .model.cache import CiterCache
from .model.modeling import CiterForCausalLM
from .model.references import file_keywords
from .runs import CommandOptions, anonymous, method_of, option, read_json, router_sha256

THEME = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"]).set(
    button_primary_background_fill="*primary_600", block_info_text_color="*neutral_600"
)
# How gradio shows the page; nothing is loaded from elsewhere.
LOOK: dict[str, Any] = {"theme": THEME, "css_paths": Path(__file__).with_suffix(".css"), "footer_links": []}
LOOK |= {"run_history": False, "ssr_mode": False, "pwa": False}
# Who decided a token: the class in the style sheet, and what the page calls it.
DECIDED = {
    "slm": "SLM",
    "llm": "LLM: the token was flagged",
    "accepted": "LLM: it accepted the flagged draft",
    "vetoed": "LLM: it vetoed the SLM's token",
}
PARTS = {"slm": "SLM alone", "llm": "LLM alone", "pair": "Pair"}
NO_CURVE = "There are no results of this router. <code>citer evaluate</code> makes a <code>results.json</code> for it."
# The end of the slider: above 1, every token is the LLM's own.
LLM_ALONE = 1.01
SECONDS_BETWEEN_UPDATES = 0.1


@dataclass(frozen=True)
class PlaygroundOptions(CommandOptions):
    host: str = option("localhost", "Address to listen at; 0.0.0.0 lets other machines in.")
    port: int = option(7860, "Port; 0 takes a free one.", min=0, max=65535)
    max_new_tokens: int = option(512, "Longest output, in tokens.", metavar="N", min=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            # A port that is taken is named before minutes of loading.
            socket.create_server((self.host, self.port)).close()
        except (OSError, OverflowError) as error:
            where = f"--host {self.host} --port {self.port}"
            raise OSError(f"{where}: {error}. Choose others; --port 0 takes a free one.") from error


class Output(BaseStreamer):
    """A streamer that keeps the text of each token and who decided it, for the pair or one of its models alone."""

    def __init__(self, part: str, cache: CiterCache, tokenizer: Any):
        self.part, self.cache, self._tokenizer = part, cache, tokenizer._tokenizer
        self.tokens: list[tuple[str, str, str]] = []  # class, title, text
        self.seconds, self.is_cancelled, self._prompt_is_next = 0.0, False, True
        # Holds back the bytes of a character until it is complete.
        self._began, self._stream = time.perf_counter(), DecodeStream(skip_special_tokens=True)

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, at first, and then each new token."""
        if self.is_cancelled:
            raise CancelledError
        for token in () if self._prompt_is_next else value.reshape(-1).tolist():
            kind, title = self.part, PARTS[self.part]
            if self.part == "pair":
                score, to_llm, vetoed, agreed = self.cache.routing.decision(len(self.tokens))
                kind = "vetoed" if vetoed else "accepted" if agreed else "llm" if to_llm else "slm"
                title = f"{DECIDED[kind]}; score {score:.3f}"
            self.tokens.append((kind, title, self._stream.step(self._tokenizer, token) or ""))
            self.seconds = time.perf_counter() - self._began
        self._prompt_is_next = False

    def end(self) -> None:
        pass

    def html(self) -> str:
        spans = (f'<span class="{kind}" title="{title}">{escape(text)}</span>' for kind, title, text in self.tokens)
        return f'<p class="text">{"".join(spans)}</p>'

    def figures(self) -> str:
        count, share = len(self.tokens), sum(kind != "slm" for kind, _, _ in self.tokens) / max(len(self.tokens), 1)
        passes = {"slm": 0, "llm": count, "pair": self.cache.routing.llm_calls}[self.part]
        speed = count / max(self.seconds, 1e-9)
        return f"<p>{count} tokens, {speed:.1f} per second. LLM: {share:.1%} of the tokens, {passes} passes.</p>"


@contextmanager
def errors_on_the_page() -> Iterator[None]:
    """Show errors that a user can do something about as messages of the page, which gradio takes for HTML."""
    try:
        yield
    except (ValueError, torch.OutOfMemoryError) as error:
        raise gr.Error(escape(str(error).removeprefix("row 0: ")), print_exception=False) from error


class Page:
    """Answers the events of a page."""

    def __init__(self, model: CiterForCausalLM, max_new_tokens: int):
        self.model, self.max_new_tokens, self.tokenizer = model, max_new_tokens, model.load_tokenizer()
        if self.tokenizer is None or not self.tokenizer.is_fast:
            raise ValueError(f"{model.name_or_path} has no tokenizer.json. Save a fast tokenizer there.")
        self.curves = measured_curves(model)

    def generate(self, part: str, text: str, turns: Any, threshold: float, veto: float) -> Iterator[Output]:
        """Give an output as it grows; the generation ends when nobody asks for more."""
        # 1. The prompt: the chat so far, or the text where there is no chat template.
        said = [one for asked, answer, _ in turns for one in (("user", asked), ("assistant", answer))]
        messages = tuple({"role": role, "content": content} for role, content in (*said, ("user", text)))
        example = Example("", 0, messages=messages) if self.tokenizer.chat_template else Example("", 0, text)
        ids, context = encode_prompt(example, self.tokenizer), self.model.config.max_position_embeddings
        left = self.max_new_tokens if context is None else context - len(ids)
        if left <= 0:
            raise ValueError(f"{len(ids)} tokens are too many for the context of {context}. Start a new chat.")
        # 2. Settings. A published generation config may ask for another cache, for none, or for several sequences.
        settings, cache = copy.deepcopy(self.model.generation_config), CiterCache(self.model.config)
        settings.update(cache_implementation=None, use_cache=True, prompt_lookup_num_tokens=None, num_beams=1)
        settings.update(num_return_sequences=1, max_new_tokens=min(left, self.max_new_tokens))
        inputs = {"input_ids": torch.tensor([ids], device=self.model.device), "generation_config": settings}
        inputs |= {"attention_mask": torch.ones_like(inputs["input_ids"]), "tokenizer": self.tokenizer}
        if part == "pair":
            inputs |= {"past_key_values": cache, "router_threshold": threshold, "llm_veto": veto}
        # 3. A thread generates, and this one looks at the output from time to time.
        output, model = (
            Output(part, cache, self.tokenizer),
            self.model if part == "pair" else getattr(self.model, part),
        )
        with ThreadPoolExecutor(1) as executor:
            running = executor.submit(model.generate, **inputs, streamer=output)
            try:
                while not wait([running], SECONDS_BETWEEN_UPDATES).done:
                    yield output
                running.result()
                yield output
            finally:
                output.is_cancelled = True

    def chat(self, text: str, turns: list[tuple[str, str, str]], threshold: float, veto: float) -> Iterator[Any]:
        """Give an empty prompt, all turns (prompt, answer, the answer's HTML), and their HTML with figures."""
        with errors_on_the_page():
            for output in self.generate("pair", text, turns, threshold, veto) if text.strip() else ():
                now = [*turns, (text, "".join(piece for _, _, piece in output.tokens), output.html())]
                shown = "".join(f'<p class="text prompt">{escape(asked)}</p>{html}' for asked, _, html in now)
                yield "", now, f'<div class="citer">{shown}{output.figures()}</div>'

    def compare(self, text: str, threshold: float, veto: float) -> Iterator[tuple[str, ...]]:
        """Give the HTML of the SLM alone, the LLM alone and the pair, which run one after the other."""
        shown = dict.fromkeys(PARTS, "")
        with errors_on_the_page():
            for part, name in PARTS.items() if text.strip() else ():
                for output in self.generate(part, text, (), threshold, veto):
                    shown[part] = f'<div class="citer"><h2>{name}</h2>{output.figures()}{output.html()}</div>'
                    yield tuple(shown.values())

    def curve(self, threshold: float, veto: float) -> str:
        """Return the HTML of the curve that was measured with the nearest veto, and a setting's place on it."""
        if not self.curves:
            return f'<div class="citer"><p>{NO_CURVE}</p></div>'
        measured = min(self.curves, key=lambda one: abs(one - veto))
        known, *values = np.array(self.curves[measured]).T  # thresholds; shares, passes and accuracies: [points]
        share, passes, accuracy = (float(np.interp(threshold, known, one)) for one in values)
        low, high = values[2].min(), values[2].max()

        def place(share: float, accuracy: float) -> tuple[float, float]:
            return 60 + 560 * share, 300 - 270 * (accuracy - low) / max(high - low, 1e-9)

        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, values[0], values[2]))
        told = f"Threshold {threshold:g}, veto {veto:g}: accuracy {accuracy:.1%}, {share:.1%} of the tokens by the "
        told += f"LLM, {passes:.3f} LLM passes per token."
        drawing, (x, y) = Path(__file__).with_suffix(".svg").read_text(encoding="utf-8"), place(share, accuracy)
        fields = {"told": told, "points": points, "x": x, "y": y, "measured": measured, "low": low, "high": high}
        return f'<div class="citer">{drawing.format(**fields, middle=(low + high) / 2)}</div>'


def measured_curves(model: CiterForCausalLM) -> dict[float, list[tuple[float, ...]]]:
    """Return points (threshold, LLM share, LLM passes, accuracy) by veto, from the `results.json` of a router."""
    if model._repository is None:
        return {}
    source, keywords = model._repository
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    file = cached_file(source, "results.json", **quiet, **file_keywords({**keywords, "force_download": None}))
    results = read_json(Path(file)) if file is not None else {}
    method = method_of(results, router_sha256(model.router), model.config.router["type"]) if results else None
    if method is None:
        return {}
    # A router that was measured with several vetoes has as many methods: "NAME", "NAME, veto X".
    own = [one for name, one in results["methods"].items() if name.partition(",")[0] == method.partition(",")[0]]
    ends = [results["ends"]["slm"] | {"threshold": 0.0}, results["ends"]["llm"] | {"threshold": LLM_ALONE}]
    return {
        points[0].get("veto", 0.0): sorted(
            (one["threshold"], one["llm_share"], one["llm_calls"], one["accuracy"]) for one in (*ends, *points)
        )
        for points in own
        # The points of averages have no thresholds.
        if points and None not in [one["threshold"] for one in points]
    }


def page(model: CiterForCausalLM, max_new_tokens: int = 512) -> gr.Blocks:
    """Return the page of a pair.

    Args:
        model: The pair, with a fast tokenizer.
        max_new_tokens: Longest output, in tokens.

    Raises:
        ValueError: for a pair without a fast tokenizer.
    """
    own, roles = Page(model, max_new_tokens), {"SLM": model.slm, "LLM": model.llm}
    names = ", ".join(f"{role} {escape(anonymous(one.name_or_path))}" for role, one in roles.items())
    key = "".join(f'<li><span class="{kind}">token</span> {meaning}</li>' for kind, meaning in DECIDED.items())
    # One generation at a time: others wait, and speeds can be compared.
    running: dict[str, Any] = {"concurrency_id": "pair", "show_progress": "hidden"}
    with gr.Blocks(title="citer playground", analytics_enabled=False) as blocks:
        gr.HTML(f'<div class="citer"><h1>Two models decode as one</h1>{names}<ul>{key}</ul></div>')
        with gr.Row():
            about = "A token is flagged when its score is below this. 0: the SLM alone; above 1: the LLM alone."
            start = min(round(model.default_threshold, 4), LLM_ALONE)
            threshold = gr.Slider(0, LLM_ALONE, start, step=0.01, label="Threshold", info=about, min_width=280)
            about = "The LLM takes back a token less likely than this part of its own best token. 0: no veto."
            veto = gr.Slider(0, 1, model.default_veto, step=0.01, label="Veto", info=about, min_width=280)
        dials, turns, log = [threshold, veto], gr.State([]), gr.HTML(max_height=480, autoscroll=True, elem_id="chat")
        prompt = gr.Textbox(label="Prompt", max_lines=6)
        with gr.Row():
            send = gr.Button("Send", variant="primary", min_width=120)
            side, stop, new = (gr.Button(name, min_width=120) for name in ("Side by side", "Stop", "New chat"))
        with gr.Row():
            columns = []
            for part in PARTS:
                with gr.Column(min_width=280):
                    columns.append(gr.HTML(elem_id=part))
        curve = gr.HTML(own.curve(start, model.default_veto), elem_id="curve")
        asked = gr.on([prompt.submit, send.click], own.chat, [prompt, turns, *dials], [prompt, turns, log], **running)
        compared = side.click(own.compare, [prompt, *dials], columns, **running)
        stop.click(None, cancels=[asked, compared])
        new.click(lambda: ("", [], ""), None, [prompt, turns, log], cancels=asked)
        changed = [dial.change for dial in dials]
        gr.on(changed, own.curve, dials, curve, show_progress="hidden", trigger_mode="always_last")
    return blocks


def mount(app: Any, model: CiterForCausalLM, max_new_tokens: int = 512) -> Any:
    """Add the page of a pair to a FastAPI application, at `/playground`; the other arguments are those of `page`."""
    return gr.mount_gradio_app(app, page(model, max_new_tokens), "/playground", **LOOK)


def playground(model: CiterForCausalLM, **options: Any) -> None:
    """Show the page of a pair until interrupted.

    Args:
        model: The pair, with a fast tokenizer.
        options: The fields of `PlaygroundOptions`.

    Raises:
        OSError: when the port cannot be had.
        ValueError: for a pair without a fast tokenizer, or senseless options.
    """
    chosen = PlaygroundOptions(**options)
    shown = page(model, chosen.max_new_tokens)
    shown.launch(server_name=chosen.host, server_port=chosen.port or None, share=False, **LOOK)
