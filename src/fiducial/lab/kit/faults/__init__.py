"""The expected gradient of each known mistake, in closed form, and the search for those that a
gradient shows.
"""
