"""Worlds small enough to enumerate, their exact answers, and policies over them as ordinary models."""
