"""The settings of each method, one file per method. Nothing here imports torch, so `--help` and a
mistyped flag answer at once.
"""
