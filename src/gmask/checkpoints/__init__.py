"""Published weights: the table of models, checkpoints in all forms, loading, conversion, adapters."""
