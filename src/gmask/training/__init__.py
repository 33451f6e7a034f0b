"""What trains a model or its tokenizer? One file a verb."""
