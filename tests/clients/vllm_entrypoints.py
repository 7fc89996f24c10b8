"""Runs vLLM's own HTTP tests, from its unpacked sdist, against this server, and prints a table.

    python tests/clients/vllm_entrypoints.py path/to/vllm-0.33.0 [tests/entrypoints/...]

vLLM itself is not needed (`vllm_stand_ins.py`). A test that needs what the tiny random model can't
have (knowledge, images, GPUs) or vLLM's own code is not applicable, with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).resolve().parent
REQUIRED = (
    "pytest-asyncio==1.5.0",
    "pybase64==1.5.1",
    "tblib==3.2.2",
    "anthropic==0.125.0",
    "docstring-parser",
)
LOGIT_STD = 3.0  # of the model's logits
# Of the end of the text, of a string and of thoughts, in these; a vocabulary's best is about 4.2.
END_LOGIT, QUOTE_LOGIT, THOUGHT_LOGIT = 3.2, 4.0, 4.0
TESTS = "tests/entrypoints"
CONFTESTS = ("tests.entrypoints.conftest", "tests.entrypoints.serve.sagemaker.conftest")
FILES = (  # those whose servers are alike stand together
    "openai/completion/test_completion.py",
    "openai/completion/test_token_in_token_out.py",
    "openai/chat_completion/test_enable_force_include_usage.py",
    "openai/test_return_tokens_as_ids.py",
    "openai/test_chunked_prompt.py",
    "serve/instrumentator/test_basic.py",
    "serve/instrumentator/test_orca_metrics.py",
    "serve/instrumentator/test_uds.py",
    "scale_out/token_in_token_out/test_serving_tokens.py",
    "anthropic/test_messages.py",
    "openai/chat_completion/test_chat_completion.py",
    "openai/chat_completion/test_batched_chat_completions.py",
    "openai/chat_completion/test_chat_logit_bias_validation.py",
    "openai/chat_completion/test_logprob_token_ids.py",
    "openai/test_return_token_ids.py",
    "openai/chat_completion/test_chat_echo.py",
    "openai/chat_completion/test_root_path.py",
    "openai/completion/test_prompt_validation.py",
    "openai/models/test_models.py",
    "serve/lora/test_lora_adapters.py",
    "openai/chat_completion/test_chat.py",
    "serve/tokenize/test_tokenization.py",
    "serve/sagemaker/test_sagemaker_lora_adapters.py",
    "serve/sagemaker/test_sagemaker_stateful_sessions.py",
    "serve/sagemaker/test_sagemaker_handler_overrides.py",
    "serve/sagemaker/test_sagemaker_middleware_integration.py",
    "openai/responses/test_simple.py",
    "tool_parsers/test_hermes_tool_parser.py",
    "pooling/embed/test_online.py",
    "pooling/embed/test_online_dimensions.py",
    "pooling/scoring/test_bi_encoder_online.py",
    "pooling/classify/test_online.py",
    "pooling/basic/test_truncation.py",
    "serve/middleware/test_optional_middleware.py",
    "scale_out/render/test_render.py",
    "openai/test_openai_schema.py",
    "serve/instrumentator/test_metrics.py",
    "launchers/test_shutdown.py",
    "openai/chat_completion/test_completion_with_function_calling.py",
    "openai/chat_completion/test_include_reasoning.py",
    "openai/chat_completion/test_thinking_token_budget.py",
)


def make_model(folder: Path, *, thinks: bool) -> None:
    """A tiny random model with a real tokenizer, whose special tokens stand last, as in Qwen's.

    Its texts, strings and thoughts end by chance. `thinks`: its template opens a thought.
    """
    import torch
    from tool_templates import MARKED, THOUGHTFUL
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from quickchange_training.demo.demo_base import ensure_demo_base

    parts = json.loads((ensure_demo_base() / "tokenizer.json").read_text())
    vocabulary, added = parts["model"]["vocab"], parts["added_tokens"]
    size, special = len(vocabulary), len(added)
    vocabulary = {t: (i - special) % size for t, i in vocabulary.items()}
    parts["model"]["vocab"] = vocabulary
    for token in added:
        token["id"] = (token["id"] - special) % size
    if thinks:
        for mark in ("<think>", "</think>"):
            added.append({**added[0], "id": size, "content": mark, "special": False})
            size += 1
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(parts))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        model_max_length=16_384,
        chat_template=THOUGHTFUL if thinks else MARKED,
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16_384,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # One dimension is the same everywhere, and gives what ends something its logit: not the
        # best as a rule, so that texts end after some dozens of tokens.
        model.model.embed_tokens.weight[:, 0] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
        model.lm_head.weight.normal_(std=LOGIT_STD / config.hidden_size**0.5)
        model.lm_head.weight[:, 0] = 0.0
        prompt = torch.arange(300)[None]
        hidden = model.model(prompt).last_hidden_state[0, 20:, 0].mean()
        ends = {tokenizer.eos_token_id: END_LOGIT, vocabulary['"']: QUOTE_LOGIT}
        if thinks:
            ends[size - 1] = THOUGHT_LOGIT
        for token_id, logit in ends.items():
            model.lm_head.weight[token_id] = 0.0
            model.lm_head.weight[token_id, 0] = logit * LOGIT_STD / hidden
    model.save_pretrained(folder)


def asked_for(files: Iterable[Path]) -> list[str]:
    """Names of models in the files' constants, which one server has together."""
    constant = re.compile(r'^\w*MODEL\w* = "([^",]+)"', re.MULTILINE)
    return sorted({name for file in files for name in constant.findall(file.read_text())})


def run(sdist: Path, files: list[str], folder: Path, packages: Path) -> None:
    """Run files of tests; their outcomes go to the folder's report."""
    path = [HERE, HERE.parent / "support", os.environ.get("PYTHONPATH", ""), packages, sdist]
    plugins = ["vllm_stand_ins", *CONFTESTS, "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--noconftest"]
    command += ["--continue-on-collection-errors"]
    command += ["-c", str(folder / "pytest.ini"), f"--rootdir={sdist}"]
    command += [part for plugin in plugins for part in ("-p", plugin)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "VLLM_TESTS_FOLDER": str(folder),
        "VLLM_TESTS_NAMES": ",".join(asked_for(sdist / file for file in files)),
        "HF_HUB_OFFLINE": "1",
    }
    with (folder / "pytest.log").open("w") as output:
        subprocess.run(
            [*command, *(str(sdist / file) for file in files)],
            cwd=sdist,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )


def table(folder: Path) -> str:
    """Counts by file, then each failure, and each reason why tests are not applicable."""
    written = folder / "report.jsonl"
    written.touch()
    outcomes = [json.loads(line) for line in written.read_text().splitlines()]
    latest = {each["test"]: each for each in outcomes}.values()
    counts = Counter((each["test"].split("::")[0], each["outcome"]) for each in latest)
    lines = ["| file | pass | fail | n/a |", "|---|---|---|---|"]
    for file in dict.fromkeys(name for name, _ in counts):
        numbers = [str(counts[file, outcome]) for outcome in ("pass", "fail", "n/a")]
        lines.append("| " + " | ".join([file.removeprefix(f"{TESTS}/"), *numbers]) + " |")
    total = Counter(each["outcome"] for each in latest)
    lines.append(f"| all | {total['pass']} | {total['fail']} | {total['n/a']} |")
    for outcome in ("fail", "n/a"):
        lines += ["", f"{outcome}:"]
        for each in latest:
            if each["outcome"] == outcome:
                test = each["test"].removeprefix(f"{TESTS}/")
                lines.append(f"- {test}: {' '.join(each['reason'].split())[:300]}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sdist", type=Path, help="vLLM's unpacked sdist")
    parser.add_argument("files", nargs="*", help=f"files under the sdist; default: {TESTS}/...")
    parser.add_argument("--folder", type=Path, help="keep the model, the logs and the report here")
    parser.add_argument("--packages", type=Path, help=f"a folder with {', '.join(REQUIRED)}")
    given = parser.parse_intermixed_args()
    sys.path[:0] = [str(HERE.parent / "support")]
    if given.packages is None:
        from client_environments import installed

        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        environment = installed(version, ["--no-deps", *REQUIRED])
        given.packages = environment / "lib" / version / "site-packages"
    with TemporaryDirectory(prefix="vllm-entrypoints-") as made:
        folder = (given.folder or Path(made)).resolve()
        for name in ("model", "thinking"):
            if not (folder / name).exists():
                make_model(folder / name, thinks=name == "thinking")
        (folder / "pytest.ini").write_text("[pytest]\nasyncio_mode = strict\n")
        files = given.files or [f"{TESTS}/{file}" for file in FILES]
        run(given.sdist.resolve(), files, folder, given.packages)
        print(table(folder))


if __name__ == "__main__":
    main()
