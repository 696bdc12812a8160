"""Checks of anyone's loss or trainer against the exact answer, and the names of what goes wrong."""
