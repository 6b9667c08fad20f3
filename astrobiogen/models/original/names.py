"""Names that the original system's constructors take and that mean nothing here, or something else."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Config = TypeVar("Config", bound=type)


@dataclasses.dataclass(frozen=True)
class OriginalName:
    """A name of the original's.

    Attributes:
        instead: what does its work here.
        neutral: values that ask for what happens here anyway; None: every value does.
    """

    instead: str
    neutral: tuple[Any, ...] | None = None


_RATE = OriginalName("the optimizer has it: train --optimizer.learning_rate")
LLM_NAMES = {
    "model_name": OriginalName("no weights are loaded; astrobiogen.swap_layers serves models of transformers", (None,)),
    "use_4bit_quantization": OriginalName("weights are trained in fp32; train --optimizer.name adamw8bit", (False,)),
    "use_lora": OriginalName("every weight is trained; adapters of peft can be put around the model", (False,)),
    "lora_r": OriginalName("there is no adapter"),
    "lora_alpha": OriginalName("there is no adapter"),
    "lora_dropout": OriginalName("there is no adapter; dropout is that of every block"),
    "learning_rate": _RATE,
}
GRAPH_NAMES = {
    "max_nodes": OriginalName("graphs may have any number of nodes"),
    "learning_rate": _RATE,
}
CUBE_NAMES = {
    "use_attention": OriginalName("attention is the transformer branch, use_vit_features"),
    "physics_weight": OriginalName("MultiModalTrainingConfig.physics_weight", ()),
    "learning_rate": _RATE,
}
FUSION_NAMES = {
    "fusion_strategy": OriginalName("cross-attention is the one there is", ("cross_attention",)),
    "modality_configs": OriginalName("modality_dims, which the system fills in from its parts", (None,)),
    "learning_rate": _RATE,
}
SYSTEM_NAMES = {
    "batch_size": OriginalName("train --data.batch_size"),
    "gradient_accumulation_steps": OriginalName("train --data.accumulation"),
    "max_epochs": OriginalName("train --epochs"),
    "learning_rate": _RATE,
    "use_mixed_precision": OriginalName("train --precision.dtype"),
    "use_8bit_optimizer": OriginalName("train --optimizer.name adamw8bit"),
    "use_gradient_checkpointing": OriginalName("the same name in llm_config, graph_config and cnn_config", (False,)),
    "device": OriginalName("system.to(device); train --runtime.device"),
}


def set_aside(
    owner: str, names: Mapping[str, OriginalName], given: Mapping[str, Any], stacklevel: int
) -> dict[str, Any]:
    """`given` without the names of the original, after one warning that tells what does their work.

    Raises:
        TypeError: a value asks for something that does not happen here.
    """
    met = [name for name in given if name in names]
    for name in met:
        neutral = names[name].neutral
        if neutral is not None and given[name] not in neutral:
            raise TypeError(f"{owner}: {name}={given[name]!r} is not offered; instead: {names[name].instead}")
    if met:
        told = "; ".join(f"{name}={given[name]!r} ({names[name].instead})" for name in met)
        warnings.warn(f"{owner}: these names of the original system change nothing: {told}", stacklevel=stacklevel + 1)
    return {name: value for name, value in given.items() if name not in names}


def takes_original_names(
    names: Mapping[str, OriginalName], completed: Callable[[dict[str, Any]], dict[str, Any]] = dict
) -> Callable[[Config], Config]:
    """A decorator of dataclasses whose constructors then take `names` too, see `set_aside`; `completed` may change
    what is left before the fields are set."""

    def decorate(cls: Config) -> Config:
        made = cls.__init__
        fields = [field.name for field in dataclasses.fields(cls)]

        @functools.wraps(made)
        def init(self: Any, *values: Any, **given: Any) -> None:
            placed = dict(zip(fields, values))
            if len(placed) < len(values) or placed.keys() & given.keys():
                made(self, *values, **given)  # raises what Python says of such a call
            made(self, **completed(set_aside(cls.__name__, names, placed | given, stacklevel=2)))

        cls.__init__ = init
        return cls

    return decorate
