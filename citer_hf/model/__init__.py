"""The model that travels with a router: torch, transformers, and the files of this folder."""
