"""The random numbers of sampling, in the order in which rows that move together would draw them."""

from __future__ import annotations

import torch

# Random numbers that are kept for rows that have not come so far; beyond this they are drawn again, from the state of
# the generator at that time.
MOST_BYTES = 2**28


class Draws:
    """What `torch.multinomial` draws for a batch, column by column, for rows that ask at their own pace."""

    def __init__(self, rows: int, vocabulary: int, device: torch.device):
        self._shape, self._device = (rows, vocabulary), device
        self._most_kept = max(MOST_BYTES // (rows * vocabulary * 4), 1)
        self._kept: dict[int, torch.Tensor] = {}
        self._states: dict[int, torch.Tensor] = {}
        self._drawn = 0

    def choose(self, probabilities: torch.Tensor, columns: dict[int, int]) -> torch.Tensor:
        """Draw a token for some rows."""
        if len(columns) == self._shape[0] and len(set(columns.values())) == 1:
            numbers = self._column(next(iter(columns.values())))
        else:
            numbers = torch.stack([self._column(column)[row] for row, column in columns.items()])
        return (probabilities / numbers).argmax(dim=-1)

    def forget(self, before: int) -> None:
        """Drop what no row will ask for again."""
        for column in [column for column in self._states if column < before]:
            self._states.pop(column)
            self._kept.pop(column, None)

    def _column(self, column: int) -> torch.Tensor:
        while self._drawn <= column:
            self._states[self._drawn] = self._state()
            self._keep(self._drawn, self._draw())
            self._drawn += 1
        if column not in self._kept:
            now = self._state()
            self._set_state(self._states[column])
            self._keep(column, self._draw())
            self._set_state(now)
        return self._kept[column]

    def _draw(self) -> torch.Tensor:
        return torch.empty(self._shape, device=self._device).exponential_()

    def _keep(self, column: int, numbers: torch.Tensor) -> None:
        if len(self._kept) >= self._most_kept:
            # The one that is needed last.
            self._kept.pop(max(self._kept))
        self._kept[column] = numbers

    def _state(self) -> torch.Tensor:
        if self._device.type == "cpu":
            return torch.get_rng_state()
        return torch.get_device_module(self._device).get_rng_state(self._device)

    def _set_state(self, state: torch.Tensor) -> None:
        if self._device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(self._device).set_rng_state(state, self._device)
