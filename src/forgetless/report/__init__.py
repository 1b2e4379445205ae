"""Runs, read and shown: one self-contained HTML page, or markdown; model cards; what a terminal
shows. A report needs no torch.
"""
