"""Tokens out: blanks filled, answers scored, replies of a chat, vectors of texts; for one text or for many at once."""
