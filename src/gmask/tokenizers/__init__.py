"""The tokenizers of the published vocabularies, and what a folder holds of one."""
