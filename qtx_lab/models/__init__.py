"""Language models: the reference model, the Hugging Face adapter, and generation."""
