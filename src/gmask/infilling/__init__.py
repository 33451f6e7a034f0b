"""The blank-infilling objective: the sequences that a GLM learns from, without a model.

`spans` chooses what to hide, `blanks` builds the sequence, `objectives` mixes the objectives, `collator` makes
the batch.
"""
