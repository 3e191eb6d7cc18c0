"""One model, several threads: the state of a generation lives in its cache."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from tests.conftest import make_pair, random_prompts


def test_threads_that_share_a_model_give_what_one_gives():
    model = make_pair("llama", "gemma2", router={"type": "random"})
    prompts = [torch.tensor([row]) for row in random_prompts((4, 7, 9, 12, 5, 6, 8, 11))]

    def generate(prompt: torch.Tensor):
        return model.generate(input_ids=prompt, max_new_tokens=25, do_sample=False, return_dict_in_generate=True)

    alone = [generate(prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(generate, prompts * 3))
    for index, output in enumerate(together):
        expected = alone[index % len(prompts)]
        assert torch.equal(output.sequences, expected.sequences)
        assert torch.equal(output.past_key_values.routing.scores, expected.past_key_values.routing.scores)
        assert output.past_key_values.routing.llm_calls == expected.past_key_values.routing.llm_calls
