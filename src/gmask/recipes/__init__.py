"""Recipes: YAML files into typed settings, for pretraining and for fine-tuning."""
