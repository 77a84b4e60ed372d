"""Evaluation suites: a kind loads its examples, predicts with a model, and scores what was predicted."""
