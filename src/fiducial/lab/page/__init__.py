"""The page of the lab: its content as dataclasses, its figures and its sentences."""
