"""What may a recipe say? Typed settings out of YAML, for pre-training and for tuning."""
