"""Generation: infilling, scores, chat, embeddings, predictions, and the engine with continuous batching."""
