"""Scores of responses: from Python functions, reward models, process reward models and judges."""
