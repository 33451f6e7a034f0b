"""Evaluation: on tasks with their metrics, and on blanks in held-out texts."""
