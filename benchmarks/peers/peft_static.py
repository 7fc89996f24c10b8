"""Benchmark of PEFT with transformers: static batches with `adapter_names`.

There is no server here: N concurrent requests are one padded batch of N, which ends together. The
prompts, the adapters, the statistics and the result file are quickchange_bench's own, so a row
stands beside a server's. Prints one JSON summary a load. Runs in PEFT's own environment, with
quickchange_bench on PYTHONPATH; the model and the adapters come from the environment, see
common.sh.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteriaList

from quickchange_bench.bench_results import ClientCompletion, Load, summarise
from quickchange_bench.load.load_runner import LoadPlan
from quickchange_bench.load.popularity import Popularity
from quickchange_bench.load.process_usage import ResourceProbe
from quickchange_bench.load.workload import Fixed, Request, Workload

BASE = "__base__"  # PEFT's name for "no adapter" in adapter_names


class StepClock:
    """Stopping criterion that records when each step's tokens exist, and stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, _scores: object, **_: object) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class StaticBatches:
    """A loaded model that answers batches of requests."""

    def __init__(self, base: str, folder: Path, adapters: int) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        if adapters:
            first = folder / "lora-0"
            model = PeftModel.from_pretrained(model, str(first), adapter_name="lora-0")
            for k in range(1, adapters):
                model.load_adapter(str(folder / f"lora-{k}"), adapter_name=f"lora-{k}")
            model.eval()
        self.model = model
        self.adapters = adapters

    @torch.inference_mode()
    def complete(self, batch: Sequence[Request]) -> list[ClientCompletion]:
        """Answer greedily, all rows as long as the first asks. Outcomes in the batch's order."""
        tokens = batch[0].output_tokens
        encoded = self.tokenizer([r.prompt for r in batch], return_tensors="pt", padding=True)
        clock = StepClock()
        started = time.perf_counter()
        with self._selected(batch) as selection:
            output = self.model.generate(
                **encoded,
                **selection,
                max_new_tokens=tokens,
                eos_token_id=None,  # goes on past the end of a text, as ignore_eos does
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
        finished = time.perf_counter()
        width = encoded.input_ids.shape[1]
        lengths = encoded.attention_mask.sum(dim=1).tolist()
        gaps = tuple(b - a for a, b in zip(clock.times, clock.times[1:], strict=False))
        return [
            ClientCompletion(
                index=request.index,
                adapter=request.adapter,
                started=started,
                finished=finished,
                first_token=clock.times[0],
                gaps=gaps,
                prompt_tokens=length,
                output_tokens=tokens,
                text=self.tokenizer.decode(row[width:], skip_special_tokens=True),
            )
            for request, row, length in zip(batch, output, lengths, strict=True)
        ]

    @contextmanager
    def _selected(self, batch: Sequence[Request]) -> Iterator[dict[str, Any]]:
        """Adapter arguments of `generate`: none where no row has an adapter."""
        if any(request.adapter is not None for request in batch):
            rows = [BASE if r.adapter is None else f"lora-{r.adapter}" for r in batch]
            yield {"adapter_names": rows}
        elif self.adapters:
            with self.model.disable_adapter():
                yield {}
        else:
            yield {}


def batches(requests: Sequence[Request], size: int) -> Iterator[Sequence[Request]]:
    return (requests[start : start + size] for start in range(0, len(requests), size))


def measure(model: StaticBatches, plan: LoadPlan, load: Load, *, turn: int, place: int) -> Any:
    """Measure as `load_runner.measure`, with a batch in place of concurrent requests."""
    size = load.workers or 1
    for batch in batches(plan.warmup_requests(turn, place), size):
        model.complete(batch)
    start = plan.start(turn, place)
    requests = list(plan.workload.requests(start, plan.count(load)))
    probe = ResourceProbe(os.getpid())
    done = [completion for batch in batches(requests, size) for completion in model.complete(batch)]
    return summarise(done, probe.stop())


def check(model: StaticBatches, prompts: Sequence[str], tokens: int) -> list[list[str]]:
    """Texts of the base model and of each adapter, alone, for each prompt."""
    rows = []
    for prompt in prompts:
        row = []
        for adapter in (None, *range(model.adapters)):
            (done,) = model.complete([Request(0, prompt, tokens, adapter)])
            row.append(done.text)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", choices=("base", "distinct"), default="distinct")
    parser.add_argument("--concurrency", default="1,8,16")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--requests-per-worker", type=int, default=2)
    parser.add_argument("--min-requests", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--turn", type=int, default=0)
    parser.add_argument("--check", default="", help="JSON list of prompts: print texts instead")
    options = parser.parse_args()

    torch.set_num_threads(int(os.environ["THREADS"]))
    adapters = int(os.environ["ADAPTERS"])
    model = StaticBatches(os.environ["BASE_MODEL"], Path(os.environ["ADAPTERS_DIR"]), adapters)
    if options.check:
        print(json.dumps(check(model, json.loads(options.check), options.output_tokens)))
        return
    distinct = adapters > 0 and options.mode == "distinct"
    popularity = Popularity("distinct", adapters, options.seed) if distinct else None
    plan = LoadPlan(
        workload=Workload(
            Fixed(options.prompt_tokens), Fixed(options.output_tokens), popularity, options.seed
        ),
        loads=tuple(Load(workers=int(n)) for n in options.concurrency.split(",")),
        requests_per_worker=options.requests_per_worker,
        min_requests=options.min_requests,
        warmup=max(adapters, 2),
    )
    for place, load in enumerate(plan.loads):
        summary = measure(model, plan, load, turn=options.turn, place=place)
        print(json.dumps({"workers": load.workers, "summary": asdict(summary)}), flush=True)


if __name__ == "__main__":
    main()
