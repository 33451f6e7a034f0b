"""The blank-infilling objective: the sequences that a GLM learns from; no model needed.

`spans` chooses what to hide, `blanks` builds the sequence, `objectives` mixes the tasks, `collator` makes the
batch.
"""
