"""Swap the layers of a Hugging Face model for this library's and compare: python examples/swap_layers.py

Needs transformers (`pip install 'astrobiogen[hf]'`); the model is tiny and random, nothing is downloaded.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import astrobiogen


def main() -> None:
    """Print what was swapped and how far the logits moved."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=136, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()  # head dimension 68, which fused attention kernels refuse
    tokens = torch.randint(1000, (2, 64))
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        table = astrobiogen.swap_layers(model)
        after = model(input_ids=tokens).logits
    print(table)
    print(f"largest change of a logit: {float((after - before).abs().max()):.1e} of {float(before.abs().max()):.2f}")


if __name__ == "__main__":
    main()
