"""Bundled demo: data, tokenizer and the small teacher."""
