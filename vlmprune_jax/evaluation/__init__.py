"""How good a model is: exact-match accuracy by greedy generation, perplexity on text, and what pruning retained."""
