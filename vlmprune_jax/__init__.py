"""vlmprune-jax: structured pruning and recovery of vision-language models, from Hugging Face folder to Hugging Face folder."""
