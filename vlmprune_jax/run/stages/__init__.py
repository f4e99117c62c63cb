"""One experiment as stages over Hugging Face folders: what to run, what is already done, and the files in between."""
