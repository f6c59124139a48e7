"""Language models: the reference model, the Hugging Face adapter, and generation."""

import lazy_loader

# The adapter imports transformers, which takes seconds: it is loaded when it is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submodules=["huggingface"])
