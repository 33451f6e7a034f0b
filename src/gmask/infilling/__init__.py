"""Which sequences does a GLM learn from? The blank-infilling objective; no model needed.

`spans` chooses what to hide, `blanks` builds the sequence, `objectives` mixes the tasks, `collator` makes the
batch.
"""
