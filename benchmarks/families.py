"""Every causal language model of Hugging Face transformers, tiny and with random weights, before and after
`swap_layers`: what was swapped, what was left and why, and how far logits, gradients and greedy tokens move.

    python -m benchmarks.families [--only llama gemma2] [--output docs/families.csv]

Exits with 1 if a swapped model gives other logits, gradients or tokens. Families that cannot be built from the common
small sizes are listed with the reason.
"""

import argparse
import csv
import inspect
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from rich import progress
from rich.console import Console
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES

from astrobiogen import swap_layers

COLUMNS = ("family", "class", "swapped", "left", "logits_error", "gradient_error", "loss_error", "greedy_equal", "note")
LARGEST = 50_000_000  # parameters: a family whose small configuration is larger is listed, not run
TOLERANCE = 1e-4  # of the largest value; fp32 sums in another order give 1e-7 to 1e-6
TOKENS, NEW_TOKENS = 12, 6
_WIDTH, _LAYERS, _HEADS, _FEED_FORWARD, _VOCABULARY, _POSITIONS = 48, 2, 4, 80, 97, 64
SIZES: dict[str, Any] = {
    "vocab_size": _VOCABULARY, "hidden_size": _WIDTH, "intermediate_size": _FEED_FORWARD,
    "num_hidden_layers": _LAYERS, "num_attention_heads": _HEADS, "num_key_value_heads": 2, "head_dim": 12,
    "max_position_embeddings": _POSITIONS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "sliding_window": 5,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_positions": _POSITIONS, "n_embd": _WIDTH, "n_layer": _LAYERS, "n_head": _HEADS, "n_inner": _FEED_FORWARD,
    "ffn_dim": _FEED_FORWARD, "word_embed_proj_dim": _WIDTH, "d_model": _WIDTH, "rotary_dim": 12,
    "decoder_layers": _LAYERS, "encoder_layers": _LAYERS, "decoder_attention_heads": _HEADS,
    "encoder_attention_heads": _HEADS, "num_layers": _LAYERS,
    "q_lora_rank": 24, "kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12,
}  # fmt: skip


class NotBuiltError(Exception):
    """The family has no small model that runs."""


def build(family: str) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A tiny model, token numbers [2, 12] and its logits.

    Raises:
        NotBuiltError: with the reason.
    """
    reasons = []
    for without in ((), ("head_dim",), ("head_dim", "sliding_window", "num_key_value_heads")):
        try:
            return _built(family, {name: value for name, value in SIZES.items() if name not in without})
        except Exception as error:  # whatever a stranger's constructor says of sizes that it was not made for
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:100]}")
    raise NotBuiltError(reasons[0])


def _built(family: str, sizes: dict[str, Any]) -> tuple[Any, torch.Tensor, torch.Tensor]:
    name = FAMILIES[family]
    kind = getattr(transformers, name if isinstance(name, str) else name[0])
    config = _configuration(CONFIG_MAPPING[family], sizes)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(config).parameters())
    if size > LARGEST:
        raise NotBuiltError(f"{size:,} parameters from small sizes")
    torch.manual_seed(0)
    model = kind(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1 and parameter.is_leaf:  # weights of one would hide an offset
            torch.nn.init.normal_(parameter, 0.5, 0.2)
    tokens = torch.randint(3, _VOCABULARY, (2, TOKENS))
    return model, tokens, model(input_ids=tokens, use_cache=False).logits.detach()


def _configuration(kind: Any, sizes: dict[str, Any]) -> Any:
    known = set(inspect.signature(kind.__init__).parameters)
    try:
        return kind(**sizes)
    except Exception:  # strict classes refuse what they do not know
        return kind(**{name: value for name, value in sizes.items() if name in known})


def gradients(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of the mean log-sum-exp of the logits."""
    model.zero_grad()
    model(input_ids=tokens, use_cache=False).logits.logsumexp(-1).mean().backward()
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def greedy(model: Any, tokens: torch.Tensor) -> torch.Tensor | None:
    """Continued tokens, None where the family does not generate."""
    try:
        return model.generate(
            tokens, max_new_tokens=NEW_TOKENS, do_sample=False, attention_mask=torch.ones_like(tokens), pad_token_id=0
        )
    except Exception:  # the same before and after the swap, or the comparison tells
        return None


def row_of(family: str) -> dict[str, Any]:
    """One row of the table."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | {"family": family}
    try:
        model, tokens, expected = build(family)
    except NotBuiltError as error:
        return row | {"note": f"not built: {error}"}
    row["class"] = type(model).__name__
    exact, before = gradients(model, tokens), greedy(model, tokens)
    swapped = build(family)[0]  # not a copy: some models cannot be copied
    table = swap_layers(swapped)
    row["swapped"] = _counted((entry.was, "") for entry in table.swapped)
    row["left"] = _counted((entry.was, entry.reason) for entry in table if not entry.now)
    got = swapped(input_ids=tokens, use_cache=False).logits.detach()
    row["logits_error"] = f"{_error(got, expected):.1e}"
    ours = gradients(swapped, tokens)
    scale = max(float(one.abs().max()) for one in exact.values())  # of all: the gradient of a key's bias is rounding
    row["gradient_error"] = f"{max(float((ours[name] - one).abs().max()) for name, one in exact.items()) / scale:.1e}"
    row["loss_error"] = _loss_error(swapped, model, tokens)
    after = greedy(swapped, tokens)
    row["greedy_equal"] = "" if before is None else str(after is not None and torch.equal(before, after))
    return row


def _loss_error(ours: Any, theirs: Any, tokens: torch.Tensor) -> str:
    """Relative difference of the losses; empty where the family takes no labels."""
    try:
        expected = float(theirs(input_ids=tokens, labels=tokens, use_cache=False).loss)
    except Exception:  # as unlike as the families are
        return ""
    return f"{abs(float(ours(input_ids=tokens, labels=tokens, use_cache=False).loss) / expected - 1.0):.1e}"


def _counted(entries: Any) -> str:
    counts: dict[tuple[str, str], int] = {}
    for entry in entries:
        counts[entry] = counts.get(entry, 0) + 1
    return "; ".join(f"{count} {name}{f' ({why})' if why else ''}" for (name, why), count in counts.items())


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    scale = float(expected.abs().max())
    return float((got - expected).abs().max()) / scale if scale else float(got.abs().max())


def agrees(row: dict[str, Any]) -> bool:
    """Whether the swapped model is the same function."""
    errors = [float(row[name] or 0.0) for name in ("logits_error", "gradient_error", "loss_error")]
    return max(errors) <= TOLERANCE and row["greedy_equal"] != "False"


def main(arguments: list[str] | None = None) -> int:
    """Writes the table; the number of families that are not the same function after the swap decides the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(FAMILIES), metavar="FAMILY", help="these families alone")
    parser.add_argument("--output", type=Path, default=Path("docs/families.csv"))
    given = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    rows = [row_of(family) for family in progress.track(sorted(given.only or FAMILIES), description="families")]
    with given.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    built = [row for row in rows if row["class"]]
    wrong = [row["family"] for row in built if not agrees(row)]
    some = sum(bool(row["swapped"]) for row in built)
    console = Console()
    console.print(f"{given.output}: {some} of {len(built)} families swapped, {len(rows) - len(built)} not built")
    console.print(f"other values after the swap: {', '.join(wrong) or 'none'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
