"""Models written for other programs: GGUF files and compressed-tensors folders."""
