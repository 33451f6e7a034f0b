"""Training of models and tokenizers: pretraining, fine-tuning, and the loop that both run on."""
