"""What trains a model or its tokenizer? One file a verb, and what the verbs do in detail."""
