"""The bundled demo: data, tokenizer and the small teacher."""
