"""Plumbing that knows no algorithm: processes, optimizer steps, metrics, checkpoints, the run
folder.
"""
