"""An OpenAI-compatible server for a pair, on parts of transformers' own: `citer serve`."""
