"""A tiny random Llama for tests that need an engine but not a language.

The weights are drawn wide on purpose: with the usual small ones the answer hardly depends
on the context, and a wrong KV block would go unnoticed.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

VOCABULARY = 4096
LAYERS = 4
KV_HEADS = 4
HEAD = 64
HIDDEN = KV_HEADS * HEAD
INTERMEDIATE = 688
SPREAD = 0.15

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": KV_HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD,
    "max_position_embeddings": 8192,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def tiny_model(folder: Path, seed: int = 0) -> Path:
    """The folder of a tiny model below `folder`, made when it is not there.

    Another `seed` is another model with the same geometry.
    """
    tag = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    target = folder / f"tiny-{seed}-{tag}"
    if (target / "config.json").exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    save_file(_weights(seed), target / "model.safetensors", metadata={"format": "pt"})
    # Last, so that a folder with a configuration is a complete one.
    (target / "config.json").write_text(json.dumps(CONFIG, indent=2))
    return target


def _weights(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return random.normal(0.0, SPREAD, (rows, columns)).astype(np.float32)

    ones = np.ones(HIDDEN, dtype=np.float32)
    weights = {
        "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN),
        "model.norm.weight": ones,
        "lm_head.weight": matrix(VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        weights |= {
            f"{at}.input_layernorm.weight": ones,
            f"{at}.post_attention_layernorm.weight": ones,
            f"{at}.mlp.gate_proj.weight": matrix(INTERMEDIATE, HIDDEN),
            f"{at}.mlp.up_proj.weight": matrix(INTERMEDIATE, HIDDEN),
            f"{at}.mlp.down_proj.weight": matrix(HIDDEN, INTERMEDIATE),
        }
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weights[f"{at}.self_attn.{projection}.weight"] = matrix(HIDDEN, HIDDEN)
    return weights
