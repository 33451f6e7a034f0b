"""Estimates of the memory that a model takes, made before it is loaded."""
