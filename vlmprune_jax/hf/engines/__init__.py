"""What runs the files of a model here: our forward pass, transformers, llama.cpp; and a clock to read them by."""
