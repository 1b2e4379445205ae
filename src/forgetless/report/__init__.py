"""Runs, read and shown: one self-contained HTML page, or markdown.

Imports config and runs only: a report needs no torch.
"""
