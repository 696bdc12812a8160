"""The pages people look at: a run's report and the demo's comparison, made from what a folder or a
dictionary holds.
"""
