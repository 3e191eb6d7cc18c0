"""Whatever the batch, the padding, the routing and the ends: a batch equals its rows, one token at a time."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import left_padded, make_pair
from tests.families import VOCAB
from tests.reference import naive_generate

STEPS = 7


class GridRouter(torch.nn.Module):
    """Row r, step s goes to the LLM where the grid says so."""

    def __init__(self) -> None:
        super().__init__()
        self.grid, self.step = torch.zeros(1, 1), 0

    def begin(self, grid: torch.Tensor) -> None:
        self.grid, self.step = grid, 0

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        scores = 1 - self.grid[:, self.step]
        self.step += 1
        return scores[:, None].expand(hidden.shape[:-1]) if hidden.dim() == 3 else scores[0]


MODEL = make_pair("llama", "qwen2", router=GridRouter(), hidden_size=48)
token = st.integers(3, VOCAB - 1)
grids = st.one_of(
    st.just([[0] * STEPS] * 4),
    st.just([[1] * STEPS] * 4),
    st.just([[0, 1] * (STEPS // 2) + [0]] * 4),
    st.lists(st.lists(st.integers(0, 1), min_size=STEPS, max_size=STEPS), min_size=4, max_size=4),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.lists(token, min_size=1, max_size=9), min_size=1, max_size=4),
    grid=grids,
    eos=st.lists(token, max_size=20, unique=True),
    use_cache=st.booleans(),
)
def test_a_batch_equals_its_rows_for_any_routing_padding_and_end(rows, grid, eos, use_cache):
    mask = torch.tensor(grid, dtype=torch.float32)[: len(rows)]
    MODEL.router.begin(mask)
    batch = left_padded(rows)
    output = MODEL.generate(
        **batch,
        max_new_tokens=STEPS,
        do_sample=False,
        eos_token_id=eos or None,
        pad_token_id=0,
        use_cache=use_cache,
        # Its router counts steps, which all rows must take together.
        waiting_rows=1,
        return_dict_in_generate=True,
    )
    width = batch["input_ids"].shape[1]
    for index, row in enumerate(rows):
        MODEL.router.begin(mask[index : index + 1])
        text, to_llm, _, _ = naive_generate(MODEL, row, STEPS, threshold=0.5, eos=eos)
        assert output.sequences[index, width : width + len(text)].tolist() == text
        assert not output.sequences[index, width + len(text) :].any()
        if use_cache:
            routing = output.past_key_values.routing
            assert routing.to_llm[index, : len(text)].tolist() == to_llm
            assert not routing.unfinished[index, len(text) :].any()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.lists(token, min_size=1, max_size=9), min_size=1, max_size=4),
    grid=grids,
)
def test_in_lock_step_the_llm_runs_once_for_each_step_in_which_some_row_needs_it(rows, grid):
    mask = torch.tensor(grid, dtype=torch.float32)[: len(rows)]
    MODEL.router.begin(mask)
    output = MODEL.generate(
        **left_padded(rows),
        max_new_tokens=STEPS,
        do_sample=False,
        eos_token_id=None,
        waiting_rows=1,
        return_dict_in_generate=True,
    )
    assert output.past_key_values.routing.llm_calls == int(mask.any(0).sum())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    row=st.lists(token, min_size=2, max_size=12),
    cuts=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    threshold=st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.1]),
)
def test_any_cut_into_chunks_gives_the_same_logits(pair, row, cuts, threshold):
    text = torch.tensor([row])
    with torch.no_grad():
        whole = pair(input_ids=text, use_cache=False, router_threshold=threshold).logits
        cache, parts, start = None, [], 0
        while start < len(row):
            size = cuts[len(parts) % len(cuts)]
            output = pair(
                input_ids=text[:, start : start + size],
                past_key_values=cache,
                use_cache=True,
                router_threshold=threshold,
            )
            cache, start = output.past_key_values, start + size
            parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=1e-4)
