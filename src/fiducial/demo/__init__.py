"""The demo: an embedded world of stories, the whole pipeline over it, and a page that compares the
methods there.
"""
