"""How good a model is: metrics of its answers to questions, or of text, and what pruning retained of them."""
