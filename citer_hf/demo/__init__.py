"""A task small enough to train on two cores, and the pair of models that was trained on it."""

from pathlib import Path

DEMO_PAIR: Path = Path(__file__).parent / "pair"
