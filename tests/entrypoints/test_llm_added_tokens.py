"""The Python API reads and writes texts under adapters that add tokens by their own tokenizer."""

from __future__ import annotations

from pathlib import Path

from grown_vocabulary import grown_tokenizer, save_base, train_grown
from peft import LoraConfig
from tiny_models import greedy, make_model

from quickchange_server.entrypoints.llm import LLM
from quickchange_server.protocol import SamplingParams


def test_prompts_of_one_call_have_the_tokenizers_of_their_adapters(tmp_path: Path) -> None:
    base = save_base("llama-tied", tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = train_grown(base, tmp_path / "grown", config)
    text, tokenizer = "a<tool>b", grown_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 3
    params = SamplingParams(max_tokens=8, temperature=0, skip_special_tokens=False, ignore_eos=True)
    with LLM(
        base, adapters={"grown": tmp_path / "grown"}, extra_vocabulary=3, kv_cache_bytes=1 << 20
    ) as llm:
        own, plain = llm.generate([text, text], params, adapter=["grown", None])
        chat = llm.chat([{"role": "user", "content": "hi"}], params, adapter="grown")[0]
    expected = greedy(model, ids, 8)
    assert own.prompt_token_ids == ids
    assert own.outputs[0].token_ids == expected
    assert own.outputs[0].text == tokenizer.decode(expected)
    assert len(plain.prompt_token_ids) == len(text)
    wanted = greedy(make_model("llama-tied"), plain.prompt_token_ids, 8)
    assert plain.outputs[0].token_ids == wanted
    assert len(chat.prompt_token_ids) == len("hi") + 2
