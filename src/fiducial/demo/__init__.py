"""The embedded world and the pipeline over it."""
