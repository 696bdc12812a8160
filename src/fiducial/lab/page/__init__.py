"""The page of the lab: its sentences, tables and pictures."""
