"""Pure tensor mathematics: log-probabilities, reductions, KL estimators, advantages. Imports torch
and nothing of the package.
"""
