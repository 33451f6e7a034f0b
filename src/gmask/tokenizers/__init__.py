"""The tokenizers of the published vocabularies, and how a folder's is read."""
