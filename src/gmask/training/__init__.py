"""What trains a model or its tokenizer: one file a verb, and what the verbs share."""
