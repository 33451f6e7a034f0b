"""What training and evaluation share: the recipe, the texts that it names, and the ids that its objective needs."""
