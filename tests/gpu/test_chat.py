"""The chat's models on the device: plain, with an adapter, and quantised by bitsandbytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.inference.tiny_chat import save_adapter, save_chat_model

HELLO = [{"role": "user", "content": "tell me a story"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("chat")
    sft = save_chat_model(root / "sft", 1)
    wide = save_chat_model(root / "wide", 1, hidden_size=128, intermediate_size=256, initializer_range=0.05)
    return {"sft": sft, "adapter": save_adapter(root / "adapter", sft, 4), "wide": wide}


def loaded(folders: dict[str, Any], *names: str, **options: str) -> list[Any]:
    """The chat's models, as its programs load them."""
    from chat_models import LoadArguments, load_chat_models

    return load_chat_models({n: str(folders[n]) for n in names}, LoadArguments(**options), lambda line: None)


def answer(model: Any) -> list[int]:
    """Greedy tokens, as they are streamed."""
    from chat_stream import SamplingArguments, stream_answer

    *_, last = stream_answer(model, HELLO, SamplingArguments(max_new_tokens=24, temperature=0))
    return last.token_ids


def logits(model: Any) -> torch.Tensor:
    """Of a few tokens, in fp32 on the CPU."""
    ids = torch.randint(5, 250, (1, 20), generator=torch.Generator().manual_seed(0)).to(model.device)
    with model.weights.use(model.adapter) as network:
        return network(ids).logits.float().cpu()


def test_the_chat_answers_as_generate_does(device, folders):
    sft, adapter = loaded(folders, "sft", "adapter", dtype="fp32")
    assert sft.device.type == device.type
    answers = {model.name: answer(model) for model in (sft, adapter)}
    assert answers["sft"] != answers["adapter"], "the adapter must change what is said"
    with sft.weights.use(None) as network:
        rendered = sft.tokenizer.apply_chat_template(
            HELLO, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = network.generate(
            **rendered.to(device), max_new_tokens=24, do_sample=False, eos_token_id=list(sft.stop_ids), pad_token_id=0
        )
    expected = out[0, rendered["input_ids"].shape[1] :].tolist()
    assert (
        answers["sft"][: len(expected)] == [t for t in expected if t not in sft.stop_ids] or answers["sft"] == expected
    )


@pytest.mark.parametrize(("bits", "tolerance"), [("int8", 0.1), ("int4", 0.5)])
def test_quantised_weights_answer_nearly_alike(device, folders, bits, tolerance):
    pytest.importorskip("bitsandbytes", reason="requirements-optional.txt")
    [plain], [small] = loaded(folders, "wide", dtype="fp32"), loaded(folders, "wide", dtype="fp32", quantize=bits)
    assert small.device.type == device.type
    assert small.weights.model.get_memory_footprint() < plain.weights.model.get_memory_footprint()
    full = logits(plain)
    assert 0 < (logits(small) - full).norm() < tolerance * full.norm()
    assert answer(small)
