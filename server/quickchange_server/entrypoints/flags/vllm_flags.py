"""vLLM's flags, as KServe and people's manifests pass them, as options of `quickchange serve`.

One table says of each flag what it means here: a setting, a hint that changes nothing and is said
in a line, or something that isn't done, refused by name. A flag in neither table is an option of
`serve` itself, or a mistake that the command line tells.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from quickchange_server.errors import SettingError

MODULES = "--lora-modules"
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)([kKmMgG]?)")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}

Convert = Callable[[str], str | None]  # None: the default


def _as_it_is(value: str) -> str:
    return value


def _number(value: str) -> str | None:
    """A whole number, also as 8k (8000) or 8K (8192); -1 and auto are the default."""
    if value in ("-1", "auto"):
        return None
    found = _NUMBER.fullmatch(value)
    return value if found is None else str(int(float(found[1]) * _UNITS[found[2]]))


def _renamed(**names: str | None) -> Convert:
    return lambda value: names.get(value, value)


@dataclass(frozen=True, slots=True)
class Rule:
    """What a flag means here."""

    setting: str | None = None  # the option that it becomes
    convert: Convert = _as_it_is
    hint: str | None = None  # why it changes nothing
    neutral: Collection[str] = ()  # values that ask for nothing, where others are refused
    refused: str | None = None  # why, and what to do instead
    takes: int | None = 1  # values; None: all up to the next flag


def _setting(name: str, convert: Convert = _as_it_is) -> Rule:
    return Rule(setting=name, convert=convert)


def _switch(option: str) -> Rule:
    return Rule(setting=option, takes=0)


def _hint(why: str, takes: int | None = 1) -> Rule:
    return Rule(hint=why, takes=takes)


def _not(why: str, *neutral: str, takes: int | None = 1) -> Rule:
    return Rule(refused=why, neutral=neutral, takes=takes)


_LEARNED = "calls and thoughts are read as the model's chat template writes them"
_BYTES = "--adapter-device-bytes and --adapter-host-bytes bound adapters in memory, not a number"
_LOG = "there is no line of log for each request"
_OWN = "the engine has its own"
_PIPELINE = "the base is divided over GPUs by --tensor-parallel alone"
_PROXY = "requests come by plain HTTP; end TLS at a gateway or a proxy"
_REPLICAS = "start one server for each replica, or `quickchange cluster`"

RULES: dict[str, Rule] = {
    # adapters
    "--enable-lora": _switch("--adapters"),
    "--no-enable-lora": _switch("--no-adapters"),
    MODULES: Rule(setting=MODULES, takes=None),
    "--max-lora-rank": _setting("--max-adapter-rank"),
    "--max-loras": _hint(_BYTES),
    "--max-cpu-loras": _hint(_BYTES),
    "--lora-dtype": _setting("--adapter-dtype", _renamed(auto="model")),
    "--fully-sharded-loras": _hint("adapters are divided as the base is", 0),
    "--no-fully-sharded-loras": _hint("adapters are divided as the base is", 0),
    "--lora-extra-vocab-size": _setting("--extra-vocabulary"),
    "--enable-lora-bias": _hint("biases of adapters are served", 0),
    # the model and the address
    "--model-id": _setting("--model"),
    "--model-dir": _setting("--model"),
    "--model-name": _setting("--served-model-name"),
    "--served-model-name": Rule(setting="--served-model-name", takes=None),
    "--http-port": _setting("--port"),
    "--uds": _setting("--uds"),
    "--root-path": _setting("--root-path"),
    "--dtype": _setting("--dtype", _renamed(half="float16", float="float32")),
    "--device": _setting("--device", _renamed(auto=None)),
    "--quantization": Rule(setting="--quantization", convert=_renamed(gguf=None)),
    "--tensor-parallel-size": _setting("--tensor-parallel"),
    "--max-length": _setting("--max-model-len", _number),
    "--max-model-len": _setting("--max-model-len", _number),
    "--max-num-batched-tokens": _setting("--max-batch-tokens", _number),
    "--max-num-seqs": _setting("--max-sequences", _number),
    "--enable-prefix-caching": _switch("--prefix-cache"),
    "--no-enable-prefix-caching": _switch("--no-prefix-cache"),
    "--otlp-traces-endpoint": _setting("--otlp-endpoint"),
    "--shutdown-timeout": _setting("--drain-seconds"),
    "--tokenizer-mode": _hint("the checkpoint says which tokenizer it has"),
    "--trust-remote-code": _hint("no code of a checkpoint is run", 0),
    "--no-trust-remote-code": _hint("no code of a checkpoint is run", 0),
    "--backend": _not("this server has one engine", "auto", "vllm"),
    "--task": _not("what a route is asked decides", "auto", "generate", "text_generation"),
    "--runner": _not("what a route is asked decides", "auto", "generate"),
    "--load-format": _not("safetensors and GGUF are read", "auto", "safetensors", "gguf"),
    # what only another engine has to be told
    "--enable-auto-tool-choice": _hint(_LEARNED, 0),
    "--tool-call-parser": _hint(_LEARNED),
    "--reasoning-parser": _hint(_LEARNED),
    "--enable-reasoning": _hint(_LEARNED, 0),
    "--enforce-eager": _hint("graphs are captured where they help", 0),
    "--no-enforce-eager": _hint("graphs are captured where they help", 0),
    "--enable-chunked-prefill": _hint("prompts are always read in chunks", 0),
    "--async-scheduling": _hint(_OWN, 0),
    "--attention-backend": _hint(_OWN),
    "--compilation-config": _hint(_OWN),
    "--cuda-graph-sizes": _hint(_OWN, None),
    "--max-seq-len-to-capture": _hint(_OWN),
    "--disable-custom-all-reduce": _hint(_OWN, 0),
    "--distributed-executor-backend": _hint(_OWN),
    "--guided-decoding-backend": _hint(_OWN),
    "--prefix-caching-hash-algo": _hint(_OWN),
    "--disable-frontend-multiprocessing": _hint(_OWN, 0),
    "--workers": _hint("one process answers"),
    "--swap-space": _hint("KV blocks are computed again, not swapped"),
    "--generation-config": _hint("requests say how to sample; docs/http.md has the defaults"),
    "--disable-log-requests": _hint(_LOG, 0),
    "--no-enable-log-requests": _hint(_LOG, 0),
    "--disable-log-stats": _hint("/metrics has the figures", 0),
    "--disable-uvicorn-access-log": _hint(_LOG, 0),
    "--disable-access-log-for-endpoints": _hint(_LOG),
    "--uvicorn-log-level": _hint(_LOG),
    "--max-log-len": _hint(_LOG),
    "--enable-request-id-headers": _hint("x-request-id is always there", 0),
    "--enable-prompt-tokens-details": _hint("cached tokens are always told", 0),
    "--enable-server-load-tracking": _hint("/load always tells it", 0),
    # what isn't done
    "--pipeline-parallel-size": _not(_PIPELINE, "1"),
    "--decode-context-parallel-size": _not(_PIPELINE, "1"),
    "--data-parallel-size": _not(_REPLICAS, "1"),
    "--data-parallel-size-local": _not(_REPLICAS, "1"),
    "--enable-expert-parallel": _not(_PIPELINE, takes=0),
    "--headless": _not(_REPLICAS, takes=0),
    "--kv-cache-dtype": _not("the KV cache has the base's floats", "auto"),
    "--kv-transfer-config": _not("no KV block leaves its engine; a cluster routes by adapter"),
    "--kv-events-config": _not("KV blocks are not told to routers; leave it out"),
    "--cpu-offload-gb": _not("the base's weights stay on the device; choose a larger one", "0"),
    "--num-gpu-blocks-override": _not("give the cache a size with --kv-cache-bytes"),
    "--speculative-config": _not("tokens are drafted by Turbo adapters: docs/turbo.md"),
    "--scheduling-policy": _not("requests run in order of arrival", "fcfs"),
    "--tokenizer": _not("the checkpoint's own is used; put the files into its folder"),
    "--revision": _not("fetch the revision first, and give its folder as --model"),
    "--model-revision": _not("fetch the revision first, and give its folder as --model"),
    "--tokenizer-revision": _not("fetch the revision first, and give its folder as --model"),
    "--download-dir": _not("HF_HOME says where the hub's files are kept"),
    "--hf-overrides": _not("change the checkpoint's config.json"),
    "--override-generation-config": _not("requests say how to sample"),
    "--chat-template": _not(
        "the checkpoint's own is used; put chat_template.jinja into its folder"
    ),
    "--default-chat-template-kwargs": _not("send chat_template_kwargs with the request"),
    "--api-key": _not("make keys with `quickchange keys create`, and ask for them: --api-keys"),
    "--allowed-origins": _not("name the origins with --allowed-origin"),
    "--ssl-certfile": _not(_PROXY),
    "--ssl-keyfile": _not(_PROXY),
    "--ssl-ca-certs": _not(_PROXY),
    "--middleware": _not("no code is loaded into the server"),
    "--config": _not("give settings in the environment, QUICKCHANGE_…, or as options"),
}
_SHORT = {
    "-tp": "--tensor-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-dp": "--data-parallel-size",
    "-q": "--quantization",
}


@dataclass
class ServeCommand:
    """A command line of `quickchange serve`, and lines to tell of what became of it."""

    arguments: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def translated(arguments: Sequence[str], switches: Collection[str]) -> ServeCommand:
    """The arguments behind `serve` with vLLM's flags as options of ours.

    `switches`: options of ours without a value. A bare argument is the model. Raises SettingError
    for what isn't done.
    """
    made, model = ServeCommand(), None
    rest = list(reversed(arguments))
    foreign = False
    while rest:
        argument = rest.pop()
        name, given = _named(argument)
        if name is None:
            if model is not None:
                raise _wrong("model", f"{model!r} and {argument!r}: name one model")
            model, foreign = argument, True
        elif (rule := RULES.get(name)) is not None:
            values = list(_values(rule, given, rest, name))
            made.arguments += _options(name, rule, values, made.lines)
            foreign = foreign or name != rule.setting
        else:
            made.arguments.append(argument if given is None else f"{name}={given}")
            if given is None and name not in switches and rest:
                made.arguments.append(rest.pop())
    if model is not None:
        made.arguments[:0] = ["--model", model]
    if foreign:
        made.arguments += _store(made)
    return made


def _named(argument: str) -> tuple[str | None, str | None]:
    """A flag's name with dashes, and its value behind "="; no name for a bare argument."""
    name, equals, value = argument.partition("=")
    if not name.startswith("-"):
        return None, None
    name = _SHORT.get(name, name)
    return (name.replace("_", "-") if name.startswith("--") else name), value if equals else None


def _values(rule: Rule, given: str | None, rest: list[str], name: str) -> Iterator[str]:
    if given is not None:
        yield given
    if rule.takes is None:
        while rest and not rest[-1].startswith("--"):
            yield rest.pop()
    elif rule.takes and given is None:
        if not rest:
            raise _wrong(name, "a value is missing behind it")
        yield rest.pop()


def _options(name: str, rule: Rule, values: list[str], lines: list[str]) -> list[str]:
    """What a flag becomes."""
    shown = " ".join([name, *values])
    if rule.hint is not None:
        lines.append(f"{shown} changes nothing here: {rule.hint}")
        return []
    if rule.refused is not None:
        if values and all(value in rule.neutral for value in values):
            return []
        raise _wrong(name, f"{shown} isn't done here: {rule.refused}")
    assert rule.setting is not None
    if rule.setting == MODULES:
        return [part for value in values for part in (MODULES, value)]
    if not rule.takes:
        return [rule.setting, ",".join(values)] if values else [rule.setting]
    value = rule.convert(values[0])
    return [] if value is None else [rule.setting, value]


def _store(made: ServeCommand) -> list[str]:
    """A store of the model's own, where a command line for vLLM names none."""
    given = [argument.partition("=")[0] for argument in made.arguments]
    if "--store" in given or "--demo" in given or "QUICKCHANGE_STORE" in os.environ:
        return []
    model = os.environ.get("QUICKCHANGE_MODEL", "")
    for argument, following in zip(made.arguments, made.arguments[1:], strict=False):
        model = following if argument == "--model" else model
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    unique = hashlib.sha256(model.encode()).hexdigest()[:8]
    folder = Path(data) / "quickchange" / "stores" / f"{Path(model).name or 'model'}-{unique}"
    made.lines.append(f"adapters are kept in {folder}; --store chooses another place")
    return ["--store", str(folder)]


def _wrong(name: str, what: str) -> SettingError:
    return SettingError(f"{name}: {what}", param=name.removeprefix("--").replace("-", "_"))
