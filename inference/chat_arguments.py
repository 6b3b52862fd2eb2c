"""Flags that both chat programs share; nothing heavy is imported here, so --help and mistakes answer at once."""

from __future__ import annotations

from dataclasses import dataclass

from training.utils.arguments import AUTO, PRECISIONS, flag


@dataclass
class LoadArguments:
    """Loading"""

    dtype: str = flag(
        AUTO, "precision of the weights; auto: bf16 where the hardware computes in it", choices=PRECISIONS
    )
    quantize: str = flag("none", "8 or 4 bits per weight through bitsandbytes", choices=("none", "int8", "int4"))
    chat_template: str = flag("", "a name, a Jinja file, or a conversation template in JSON (default: the saved one)")
    device_map: str = flag("", "auto spreads a model over all devices; cpu or cuda:0 name one (default: the first GPU)")


@dataclass(frozen=True)
class SamplingArguments:
    """Sampling"""

    max_new_tokens: int = flag(256, "longest answer, in tokens", minimum=1, maximum=4096)
    temperature: float = flag(0.7, "0 always takes the likeliest token", minimum=0, maximum=5)
    top_p: float = flag(0.9, "sample from the likeliest tokens that hold this share; 1 keeps all", above=0, maximum=1)
    top_k: int = flag(0, "sample from this many likeliest tokens; 0 keeps all", minimum=0, maximum=1000)
    repetition_penalty: float = flag(1.0, "above 1 makes tokens that were used less likely", above=0, maximum=5)
    seed: int = flag(1234, "the same seed and conversation give the same answer", minimum=0, maximum=2**31 - 1)
