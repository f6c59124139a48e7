"""Converts a GGUF file to a folder of safetensors: `python -m qtx_lab.models.convert FILE FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path


def convert(weights: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file, dequantised to float32, as transformers reads them.

    Parameters
    ----------
    weights : Path
        A GGUF file of an architecture that transformers knows.
    folder : Path
        Made by this.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    model = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    # transformers refuses to save a model that it calls quantised, though its weights no longer are.
    config, weights_by_name = model.config, model.state_dict()
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(weights_by_name, assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
