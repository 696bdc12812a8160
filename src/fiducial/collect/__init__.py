"""Use a model on a file of prompts: write its answers, have a judge compare them, or measure one
model against another.
"""
