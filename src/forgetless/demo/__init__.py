"""The demo that comes with the package: a small world in plain English, a model that knows it, and
a second domain to learn.
"""
