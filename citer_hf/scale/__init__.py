"""Pairs on other engines and on many machines."""
