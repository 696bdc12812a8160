"""Worlds small enough to enumerate, their exact answers, their files, and models over them."""
