"""From examples with reference answers to a trained router: label preferences, train, repeat (CITER, section 3)."""
