"""The random numbers of sampling, a generator for each sequence."""

from collections.abc import Mapping

import torch


class Draws:
    """What is drawn for the sequences of a batch: the same for a seed, whenever a sequence comes to its next token."""

    def __init__(self, batch: int, device: torch.device):
        self._generators: list[torch.Generator | None] = [None]
        if batch > 1:
            # A single sequence draws what transformers draws. In a batch, the seed of a sequence depends on its index.
            seed = int(torch.randint(2**62, ()))
            self._generators = [torch.Generator(device).manual_seed(seed + index) for index in range(batch)]
        self._kept: dict[int, tuple[int, torch.Tensor]] = {}

    def choose(self, probabilities: torch.Tensor, columns: Mapping[int, int]) -> torch.Tensor:
        """Draw a token for some sequences (index: place of the token) from `[sequences, vocabulary]`."""
        noise = torch.stack([self._noise(index, column, probabilities[0]) for index, column in columns.items()])
        # The largest p / E of exponential noise E is a draw from p.
        return (probabilities / noise).argmax(dim=-1)

    def _noise(self, index: int, column: int, like: torch.Tensor) -> torch.Tensor:
        # A token that is drawn again, since the other model writes it, keeps its noise.
        if self._kept.get(index, (-1,))[0] != column:
            self._kept[index] = column, torch.empty_like(like).exponential_(generator=self._generators[index])
        return self._kept[index][1]
