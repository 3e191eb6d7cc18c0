"""How fast a pair decodes, measured and projected."""
