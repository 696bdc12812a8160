"""One algorithm, one page: its settings and its loop, top to bottom. A method never imports a
method.
"""
