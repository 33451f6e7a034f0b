"""What does `gmask finetune` do between a recipe and a tuned model?"""
