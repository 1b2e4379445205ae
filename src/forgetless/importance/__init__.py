"""Importance and the recorders that estimate it."""
