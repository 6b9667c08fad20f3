"""The loss of a language model with a long vocabulary, without its logits: python examples/long_vocabulary_loss.py"""

import torch

from astrobiogen.layers import LinearCrossEntropy


def main() -> None:
    """Fused loss and gradients beside those through the logits."""
    torch.manual_seed(0)
    tokens, hidden, vocabulary = 256, 128, 32_000
    states = torch.randn(tokens, hidden, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,))
    head = LinearCrossEntropy(hidden, vocabulary)
    loss = head(states, targets)
    loss.backward()
    fused = states.grad.clone()
    states.grad = None
    eager = torch.nn.functional.cross_entropy(states @ head.weight.T, targets)
    eager.backward()
    print(f"fused {float(loss.detach()):.6f}, through the logits {float(eager.detach()):.6f}")
    print(f"gradients differ by {float((fused - states.grad).abs().max()):.1e} of {float(fused.abs().max()):.1e}")
    print(f"logits never held: {tokens * vocabulary * 4 / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
