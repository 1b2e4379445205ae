"""Holding a model in other people's trainers: hold.py for transformers and TRL, one file for each
further host, which it imports at its top and which nothing else imports (docs/integrations.md).
"""
