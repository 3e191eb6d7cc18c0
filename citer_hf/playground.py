"""A page for the browser that shows who decided each token of an output: `citer playground`."""

import copy
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from fastapi import Response
from tokenizers.decoders import DecodeStream
from transformers.generation.streamers import BaseStreamer

from .data.examples import Example
from .data.tokens import encode_prompt
from .model.cache import CiterCache
from .model.modeling import CiterForCausalLM
from .runs import CommandOptions, anonymous, fetch, listen, method_of, option, read_json, router_sha256

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
NO_CURVE = "<p>This router has no <code>results.json</code> yet: <code>citer evaluate</code> makes it.</p>"
COLUMNS = ("threshold", "llm_share", "llm_calls", "accuracy")
# The end of the slider: above 1, every token is the LLM's own.
LLM_ALONE = 1.01
SECONDS_BETWEEN_UPDATES = 0.1
Said = tuple[dict[str, str], ...]


@dataclass(frozen=True)
class PlaygroundOptions(CommandOptions):
    host: str = option("localhost", "Address to listen at; 0.0.0.0 lets other machines in.")
    port: int = option(7860, "Port; 0 takes a free one.", min=0, max=65535)
    max_new_tokens: int = option(512, "Longest output, in tokens.", metavar="N", min=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        # A port that is taken is named before minutes of loading.
        listen(self.host, self.port).close()


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
        """Do nothing: the thread ends."""

    def html(self) -> str:
        spans = (f'<span class="{kind}" title="{title}">{escape(text)}</span>' for kind, title, text in self.tokens)
        return f'<p class="text">{"".join(spans)}</p>'

    def figures(self) -> str:
        count, share = len(self.tokens), sum(kind != "slm" for kind, _, _ in self.tokens) / max(len(self.tokens), 1)
        passes = {"slm": 0, "llm": count, "pair": self.cache.routing.llm_calls}[self.part]
        speed = count / max(self.seconds, 1e-9)
        return f"<p>{count} tokens, {speed:.1f} per second. LLM: {share:.1%} of the tokens, {passes} passes.</p>"


class Page:
    """Answers the events of a page."""

    def __init__(self, model: CiterForCausalLM, max_new_tokens: int):
        self.model, self.max_new_tokens, self.tokenizer = model, max_new_tokens, model.load_tokenizer()
        if self.tokenizer is None or not self.tokenizer.is_fast:
            raise ValueError(f"{model.name_or_path} has no tokenizer.json. Save a fast tokenizer there.")
        self.curves = measured_curves(model)

    def generate(self, part: str, said: Said, threshold: float, veto: float) -> Iterator[Output]:
        """Give an output as it grows; the generation ends when nobody asks for more."""
        output = Output(part, CiterCache(self.model.config), self.tokenizer)
        model = self.model if part == "pair" else getattr(self.model, part)
        with ThreadPoolExecutor(1) as executor:
            try:
                # 1. The prompt. Where there is no chat template, it is the last message alone.
                prompt = {"messages": said} if self.tokenizer.chat_template else {"prompt": said[-1]["content"]}
                ids = encode_prompt(Example("", 0, **prompt), self.tokenizer)
                context = self.model.config.max_position_embeddings or len(ids) + self.max_new_tokens
                if len(ids) >= context:
                    raise ValueError(f"{len(ids)} tokens are too many for the context of {context}. Start a new chat.")
                # 2. The settings. Published ones may ask for another cache, for none, or for several sequences.
                settings = copy.deepcopy(self.model.generation_config)
                settings.update(cache_implementation=None, use_cache=True, prompt_lookup_num_tokens=None, num_beams=1)
                settings.update(num_return_sequences=1, max_new_tokens=min(context - len(ids), self.max_new_tokens))
                given: dict[str, Any] = {
                    "attention_mask": torch.ones((1, len(ids)), dtype=torch.long, device=model.device)
                }
                given |= {"tokenizer": self.tokenizer, "streamer": output}
                if part == "pair":
                    given |= {"router_threshold": threshold, "llm_veto": veto, "past_key_values": output.cache}
                # 3. Another thread generates, and this one looks at the output from time to time.
                input_ids = torch.tensor([ids], device=model.device)
                running = executor.submit(model.generate, input_ids, settings, **given)
                while not wait([running], SECONDS_BETWEEN_UPDATES).done:
                    yield output
                running.result()
                yield output
            except (ValueError, torch.OutOfMemoryError) as error:
                # gradio takes a message for HTML.
                raise gr.Error(escape(str(error).removeprefix("row 0: ")), print_exception=False) from error
            finally:
                output.is_cancelled = True

    def chat(self, text: str, past: tuple[Said, str], threshold: float, veto: float) -> Iterator[Any]:
        """Give an empty prompt, the chat (messages and their HTML), and the HTML with figures."""
        said = (*past[0], {"role": "user", "content": text})
        shown = f'{past[1]}<p class="text prompt">{escape(text)}</p>'
        for output in self.generate("pair", said, threshold, veto) if text.strip() else ():
            answer, html = "".join(piece for _, _, piece in output.tokens), shown + output.html()
            chat = (*said, {"role": "assistant", "content": answer}), html
            yield "", chat, f'<div class="citer">{html}{output.figures()}</div>'

    def compare(self, text: str, threshold: float, veto: float) -> Iterator[tuple[str, ...]]:
        """Give the HTML of the SLM alone, the LLM alone and the pair, which run one after the other."""
        shown, said = dict.fromkeys(PARTS, ""), ({"role": "user", "content": text},)
        for part, name in PARTS.items() if text.strip() else ():
            for output in self.generate(part, said, threshold, veto):
                shown[part] = f'<div class="citer"><h2>{name}</h2>{output.figures()}{output.html()}</div>'
                yield tuple(shown.values())

    def curve(self, threshold: float, veto: float) -> str:
        """Return the HTML of the curve that was measured with the nearest veto, and a setting's place on it."""
        if not self.curves:
            return NO_CURVE
        nearest = min(self.curves, key=lambda one: abs(one - veto))
        known, share, passes, accuracy = np.array(self.curves[nearest]).T  # [points]
        low, high = accuracy.min(), accuracy.max()
        x, y = 60 + 560 * share, 300 - 270 * (accuracy - low) / max(high - low, 1e-9)
        values = {"share": share, "passes": passes, "accuracy": accuracy, "x": x, "y": y}
        at = {name: np.interp(threshold, known, one) for name, one in values.items()}
        at |= {"threshold": threshold, "veto": veto, "nearest": nearest, "low": low, "high": high}
        points = " ".join(f"{across:.1f},{down:.1f}" for across, down in zip(x, y, strict=True))
        drawing = Path(__file__).with_suffix(".svg").read_text(encoding="utf-8")
        return f'<div class="citer">{drawing.format(**at, middle=(low + high) / 2, points=points)}</div>'


def measured_curves(model: CiterForCausalLM) -> dict[float, list[tuple[float, ...]]]:
    """Return points (threshold, LLM share, LLM passes, accuracy) by veto, from the `results.json` of a router."""
    file = fetch(model._repository[0], "results.json", model._repository[1]) if model._repository else None
    results = read_json(file) if file is not None else {}
    method = str(method_of(results, router_sha256(model.router), model.config.router["type"]))
    curves: dict[float, list[tuple[float, ...]]] = {}
    for name, points in results.get("methods", {}).items():
        is_own = name.partition(",")[0] == method.partition(",")[0]  # also "NAME, veto X"
        # Averages of several routers have no thresholds.
        if is_own and None not in [one["threshold"] for one in points]:
            slm, llm = ({**results["ends"][role], "threshold": end} for role, end in (("slm", 0), ("llm", LLM_ALONE)))
            rows = (tuple(one[key] for key in COLUMNS) for one in (slm, *points, llm))
            curves[points[0].get("veto", 0.0)] = sorted(rows)
    return curves


def page(model: CiterForCausalLM, max_new_tokens: int = 512) -> gr.Blocks:
    """Return the page of a pair.

    Args:
        model: The pair, with a fast tokenizer.
        max_new_tokens: Longest output, in tokens.

    Raises:
        ValueError: for a pair without a fast tokenizer.
    """
    own = Page(model, max_new_tokens)
    slm, llm = (escape(anonymous(one.name_or_path)) for one in (model.slm, model.llm))
    key = "".join(f'<li><span class="{kind}">token</span> {meaning}</li>' for kind, meaning in DECIDED.items())
    # One generation at a time: others wait, and speeds can be compared.
    running: dict[str, Any] = {"concurrency_id": "pair", "show_progress": "hidden"}
    with gr.Blocks(title="citer playground", analytics_enabled=False) as blocks:
        gr.HTML(f'<div class="citer"><h1>Two models decode as one</h1>SLM {slm}, LLM {llm}<ul>{key}</ul></div>')
        with gr.Row():
            about = "A token is flagged when its score is below this. 0: the SLM alone; above 1: the LLM alone."
            start = min(round(model.default_threshold, 4), LLM_ALONE)
            threshold = gr.Slider(0, LLM_ALONE, start, step=0.01, label="Threshold", info=about, min_width=280)
            about = "The LLM takes back a token less likely than this part of its own best token. 0: no veto."
            veto = gr.Slider(0, 1, model.default_veto, step=0.01, label="Veto", info=about, min_width=280)
        past, log = gr.State(((), "")), gr.HTML(max_height=480, autoscroll=True, elem_id="chat")
        prompt = gr.Textbox(label="Prompt", max_lines=6)
        with gr.Row():
            send = gr.Button("Send", variant="primary", min_width=120)
            side, stop, new = (gr.Button(name, min_width=120) for name in ("Side by side", "Stop", "New chat"))
        with gr.Row():
            columns = [gr.HTML(elem_id=part) for part in PARTS]
        dials = [threshold, veto]
        curve = gr.HTML(own.curve(start, model.default_veto), elem_id="curve")
        asked = gr.on([prompt.submit, send.click], own.chat, [prompt, past, *dials], [prompt, past, log], **running)
        compared = side.click(own.compare, [prompt, *dials], columns, **running)
        stop.click(None, cancels=[asked, compared])
        new.click(lambda: ("", ((), ""), ""), None, [prompt, past, log], cancels=asked)
        for dial in dials:
            dial.change(own.curve, dials, curve, show_progress="hidden", trigger_mode="always_last")
    return blocks


def mount(app: Any, model: CiterForCausalLM, max_new_tokens: int = 512) -> Any:
    """Add the page of a pair to a FastAPI application, at `/playground`; the other arguments are those of `page`."""
    # Browsers ask the root for an icon, and call it an error when there is none.
    app.add_api_route("/favicon.ico", lambda: Response(status_code=204), include_in_schema=False)
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
