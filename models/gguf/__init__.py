"""What a GGUF file says of itself: its metadata, its tensors' names and shapes, and its tokenizer."""
