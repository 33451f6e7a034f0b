"""Tokens out: filling the blanks of a text."""
