"""Reading of Hugging Face model folders: configs, weights (loaded or lazy), and their mapping to `params`."""
