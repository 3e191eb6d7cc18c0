"""Tasks, checkers, and what accuracy costs."""
