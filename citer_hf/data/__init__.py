"""Examples, tokens and checkers."""
