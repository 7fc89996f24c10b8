"""One small LoRA as each trainer writes it, for a Llama of 2 layers, 4 heads and 2 of keys.

A layout's function writes files into an empty folder; the folder is then given to the reader. Names
and shapes are those of the trainers' own code. Queries, keys and values share an A, as do gate and
up: trainers with joined linears have but one.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CONFIG, WEIGHTS, STEM = "adapter_config.json", "adapter_model.safetensors", "adapter_model"
PREFIX = "base_model.model."
LAYERS, HIDDEN, INNER, HEADS, KEYS, WIDTH = 2, 32, 48, 4, 2, 8
RANK, ALPHA = 4, 6
SIZES = {  # [in, out]
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, KEYS * WIDTH),
    "self_attn.v_proj": (HIDDEN, KEYS * WIDTH),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INNER),
    "mlp.up_proj": (HIDDEN, INNER),
    "mlp.down_proj": (INNER, HIDDEN),
}
SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
Tensors = dict[str, torch.Tensor]


def factors() -> Tensors:
    """A and B of every module, by PEFT's names without their prefix."""
    generator = torch.Generator().manual_seed(5)
    made: Tensors = {}
    for layer in range(LAYERS):
        for module, (inputs, outputs) in SIZES.items():
            path = f"model.layers.{layer}.{module}"
            block, _, name = path.rpartition(".")
            a = made.get(f"{block}.{SHARED.get(name)}.lora_A.weight")
            drawn = torch.randn(RANK, inputs, generator=generator) if a is None else a.clone()
            made[f"{path}.lora_A.weight"] = drawn
            made[f"{path}.lora_B.weight"] = torch.randn(outputs, RANK, generator=generator)
    return made


def peft_tensors() -> Tensors:
    return {PREFIX + key: tensor for key, tensor in factors().items()}


def peft_config(**changes: Any) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": sorted(module.partition(".")[2] for module in SIZES),
        "bias": "none",
        "inference_mode": True,
        **changes,
    }


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_peft(folder: Path, **changes: Any) -> None:
    """PEFT's own folder."""
    write_json(folder / CONFIG, peft_config(**changes))
    save_file(peft_tensors(), folder / WEIGHTS, metadata={"format": "pt"})


def renamed(name: Callable[[str], str]) -> Tensors:
    return {name(key): tensor for key, tensor in peft_tensors().items()}


def with_names(name: Callable[[str], str]) -> Callable[[Path], None]:
    """PEFT's folder, whose tensors have other names."""

    def write(folder: Path) -> None:
        write_json(folder / CONFIG, peft_config())
        save_file(renamed(name), folder / WEIGHTS)

    return write


def beside(*names: str, **changes: Any) -> Callable[[Path], None]:
    """PEFT's folder with files of the training, none of which can be read."""

    def write(folder: Path) -> None:
        write_peft(folder, **changes)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"\x80not to be opened")

    return write


def within(inside: str, write: Callable[[Path], None]) -> Callable[[Path], None]:
    """A folder inside the one that is given."""

    def write_inside(folder: Path) -> None:
        (folder / inside).mkdir(parents=True)
        write(folder / inside)

    return write_inside


def pickled(name: str, wrap: Callable[[Tensors], Any] = dict, **options: Any) -> Any:
    def write(folder: Path) -> None:
        write_json(folder / CONFIG, peft_config())
        torch.save(wrap(peft_tensors()), folder / name, **options)

    return write


def shards(tensors: Tensors) -> list[Tensors]:
    keys = sorted(tensors)
    return [{key: tensors[key] for key in keys[part::3]} for part in range(3)]


def sharded(*, index: bool, suffix: str = ".safetensors") -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_json(folder / CONFIG, peft_config())
        names = {}
        for number, shard in enumerate(shards(peft_tensors()), 1):
            name = f"{STEM}-{number:05}-of-00003{suffix}"
            names |= dict.fromkeys(shard, name)
            if suffix == ".bin":
                torch.save(shard, folder / name)
            else:
                save_file(shard, folder / name)
        if index:
            content = {"metadata": {"total_size": 1}, "weight_map": names}
            write_json(folder / f"{STEM}{suffix}.index.json", content)

    return write


# --- torchtune and Meta's names -----------------------------------------------------------------


def paired(tensor: torch.Tensor) -> torch.Tensor:
    """Rows of transformers' q or k in the order of Meta and torchtune: halves become pairs."""
    halves = tensor.view(-1, 2, WIDTH // 2, tensor.shape[-1])
    return halves.transpose(1, 2).reshape(tensor.shape).contiguous()


TUNE = {
    "self_attn.o_proj": "attn.output_proj",
    "self_attn.": "attn.",
    "mlp.gate_proj": "mlp.w1",
    "mlp.down_proj": "mlp.w2",
    "mlp.up_proj": "mlp.w3",
    "lora_A": "lora_a",
    "lora_B": "lora_b",
    "model.layers": "layers",
}
META = {
    **{f"self_attn.{name}_proj": f"attention.w{name}" for name in "qkvo"},
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "model.layers": "layers",
}


def replaced(text: str, pairs: Mapping[str, str]) -> str:
    for old, new in pairs.items():
        text = text.replace(old, new)
    return text


def rotated(names: Mapping[str, str]) -> Tensors:
    """The tensors under other names, with rows of q and k in pairs."""
    return {
        replaced(key, names): paired(tensor) if key.endswith(ROTATED) else tensor
        for key, tensor in factors().items()
    }


ROTATED = ("q_proj.lora_B.weight", "k_proj.lora_B.weight")


def write_torchtune(folder: Path, name: str = "adapter_model.pt", *, config: bool = True) -> None:
    torch.save(rotated(TUNE), folder / name)
    if config:
        names = ["q_proj", "k_proj", "v_proj", "output_proj", "w1", "w2", "w3"]
        content = {"r": RANK, "lora_alpha": ALPHA, "target_modules": names, "peft_type": "LORA"}
        write_json(folder / CONFIG, content)


def write_mistral(folder: Path) -> None:
    save_file(rotated(META), folder / "lora.safetensors")
    lora = {"enable": True, "rank": RANK, "dropout": 0.0, "scaling": ALPHA / RANK}
    write_json(folder / "params.json", {"dim": HIDDEN, "lora": lora})


def write_torchtune_epoch(folder: Path) -> None:
    """What FullModelHFCheckpointer writes: PEFT's form, and torchtune's own beside it."""
    (folder / "epoch_0").mkdir()
    write_torchtune(folder / "epoch_0")
    write_peft(folder / "epoch_0")
    write_json(folder / "epoch_0" / "config.json", {"model_type": "llama"})
    (folder / "recipe_state").mkdir()
    torch.save({"seed": 1}, folder / "recipe_state" / "recipe_state.pt")


# --- Megatron and NeMo --------------------------------------------------------------------------


def joined() -> Iterator[tuple[int, str, torch.Tensor, torch.Tensor]]:
    """A and B of Megatron's linears, by layer."""
    made = factors()
    for layer in range(LAYERS):
        a, b = (
            {name: made[f"model.layers.{layer}.{name}.lora_{part}.weight"] for name in SIZES}
            for part in "AB"
        )
        q, k, v = (b[f"self_attn.{name}_proj"].view(KEYS, -1, WIDTH, RANK) for name in "qkv")
        qkv = torch.cat([q, k, v], 1).flatten(0, 2).contiguous()
        yield layer, "linear_qkv", a["self_attn.q_proj"], qkv
        yield layer, "linear_proj", a["self_attn.o_proj"], b["self_attn.o_proj"]
        fc1 = torch.cat([b["mlp.gate_proj"], b["mlp.up_proj"]])
        yield layer, "linear_fc1", a["mlp.gate_proj"], fc1
        yield layer, "linear_fc2", a["mlp.down_proj"], b["mlp.down_proj"]


BLOCK = {"linear_qkv": "self_attention", "linear_proj": "self_attention"}
NEMO_1 = {
    "linear_qkv": "lora_kqv_adapter",
    "linear_proj": "lora_dense_attention_adapter",
    "linear_fc1": "lora_hto4h_adapter",
    "linear_fc2": "lora_4htoh_adapter",
}


def megatron(a_name: str, b_name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tensors = {}
        for layer, linear, a, b in joined():
            place = {"layer": layer, "block": BLOCK.get(linear, "mlp"), "linear": linear}
            place["nemo"] = NEMO_1[linear]
            tensors[a_name.format(**place)] = a.clone()
            tensors[b_name.format(**place)] = b.clone()
        save_file(tensors, folder / WEIGHTS)
        write_json(folder / CONFIG, peft_config(target_modules=sorted(NEMO_1)))

    return write


def write_canonical_megatron(folder: Path) -> None:
    """Megatron Bridge's CanonicalLoRA: an adapter for each part of a joined linear."""
    linears = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "proj", "gate": "fc1", "up": "fc1"}
    tensors = {}
    for key, tensor in factors().items():
        _, _, layer, block, module, part, _ = key.split(".")
        name = module.removesuffix("_proj")
        linear = f"linear_{linears.get(name, 'fc2')}"
        single = f".adapter_{name}" if name not in ("o", "down") else ""
        end = "linear_in" if part == "lora_A" else "linear_out"
        block = block.replace("self_attn", "self_attention")
        tensors[f"decoder.layers.{layer}.{block}.{linear}.adapter{single}.{end}.weight"] = tensor
    save_file(tensors, folder / WEIGHTS)
    names = ["linear_q", "linear_k", "linear_v", "linear_proj", "linear_fc1", "linear_fc2"]
    write_json(folder / CONFIG, peft_config(target_modules=names))


# --- MLX, Kohya ---------------------------------------------------------------------------------


def write_mlx(folder: Path, *, checkpoints: bool = False, **parameters: Any) -> None:
    tensors = {
        key.replace("lora_A.weight", "lora_a").replace("lora_B.weight", "lora_b"): tensor.T
        for key, tensor in factors().items()
    }
    names = ["adapters.safetensors"]
    names += ["0000100_adapters.safetensors", "0000200_adapters.safetensors"] * checkpoints
    for number, name in enumerate(names):
        scaled = {key: tensor.contiguous() * (1 + number) for key, tensor in tensors.items()}
        save_file(scaled, folder / name)
    given = {"rank": RANK, "scale": ALPHA / RANK, "dropout": 0.0, **parameters}
    config = {"model": "tiny", "fine_tune_type": "lora", "num_layers": LAYERS, "iters": 600}
    write_json(folder / CONFIG, {**config, "lora_parameters": given})


def kohya(
    prefix: str,
    *,
    dots: bool = False,
    alpha: bool = True,
    parts: tuple[str, str] = ("lora_down", "lora_up"),
) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tensors = {}
        for key, tensor in factors().items():
            path, _, part = key.removesuffix(".weight").rpartition(".")
            module = prefix + (path if dots else path.replace(".", "_"))
            tensors[f"{module}.{parts[part == 'lora_B']}.weight"] = tensor
            if alpha:
                tensors[f"{module}.alpha"] = torch.tensor(float(ALPHA))
        metadata = {"ss_network_dim": str(RANK), "ss_network_module": "networks.lora"}
        save_file(tensors, folder / "last.safetensors", metadata=metadata)

    return write


# --- refused, with what makes them an adapter ---------------------------------------------------


def write_several(folder: Path) -> None:
    for step in (500, 1000, 90):
        within(f"checkpoint-{step}", write_peft)(folder)


def pieces(*names: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"\x80")

    return write


def write_empty_tensors(folder: Path) -> None:
    write_json(folder / CONFIG, peft_config())
    save_file({key: torch.zeros(0) for key in peft_tensors()}, folder / WEIGHTS)


def write_objects(folder: Path) -> None:
    write_json(folder / CONFIG, peft_config())
    (folder / f"{STEM}.bin").write_bytes(pickle.dumps({"args": Path("x")}))


@dataclass(frozen=True)
class TrainerLayout:
    """A row of docs/trainers.md: who writes what, and what comes of it."""

    trainer: str
    writes: str
    write: Callable[[Path], None]
    refused: str | None = None  # a part of the remedy


STATE = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json")
SERVED = [
    TrainerLayout("PEFT", "`adapter_config.json`, `adapter_model.safetensors`", write_peft),
    TrainerLayout("PEFT", "`adapter_model.bin`", pickled(f"{STEM}.bin")),
    TrainerLayout(
        "PEFT",
        "a pickle of torch before 1.6",
        pickled(f"{STEM}.bin", _use_new_zipfile_serialization=False),
    ),
    TrainerLayout(
        "PEFT", "shards with `adapter_model.safetensors.index.json`", sharded(index=True)
    ),
    TrainerLayout("PEFT", "shards without an index, all there", sharded(index=False)),
    TrainerLayout("PEFT", "pickled shards with an index", sharded(index=True, suffix=".bin")),
    TrainerLayout("PEFT", "a folder for the only named adapter", within("mine", write_peft)),
    TrainerLayout(
        "PEFT",
        "a state dict with the adapter's name, `lora_A.default.weight`",
        with_names(lambda key: key.replace(".weight", ".default.weight")),
    ),
    TrainerLayout("TRL", "a checkpoint with the trainer's state", beside(*STATE, "README.md")),
    TrainerLayout(
        "TRL",
        "`pretrained_model.` before the names, a value head beside",
        lambda folder: (
            with_names(lambda key: f"pretrained_model.{key}")(folder),
            (folder / "value_head.bin").write_bytes(b"\x80"),
        )[0],
    ),
    TrainerLayout("TRL", "one `checkpoint-500/`", within("checkpoint-500", write_peft)),
    TrainerLayout(
        "Unsloth",
        "`unsloth_fixed` in `auto_mapping`, targets by an expression",
        beside(
            "tokenizer.json",
            auto_mapping={
                "base_model_class": "LlamaForCausalLM",
                "parent_library": "transformers.models.llama.modeling_llama",
                "unsloth_fixed": True,
            },
            target_modules=r"(?:.*?(?:self_attn|mlp).*?(?:q|k|v|o|gate|up|down)_proj.*?)",
        ),
    ),
    TrainerLayout(
        "Axolotl",
        "the base's `config.json` and `checkpoint-90/` inside",
        lambda folder: (
            write_peft(folder),
            write_json(folder / "config.json", {"model_type": "llama"}),
            within("checkpoint-90", beside(*STATE))(folder),
        )[0],
    ),
    TrainerLayout(
        "LLaMA-Factory",
        "logs and results beside",
        beside(
            "trainer_log.jsonl", "all_results.json", "training_loss.png", "value_head.safetensors"
        ),
    ),
    TrainerLayout(
        "ms-swift",
        "`additional_config.json`, `args.json`",
        lambda folder: (
            write_peft(folder),
            write_json(folder / "additional_config.json", {"lora_dtype": None}),
            write_json(folder / "args.json", {"model": "tiny", "tuner_type": "lora"}),
        )[0],
    ),
    TrainerLayout("ms-swift", "before 2.0: a folder `default/`", within("default", write_peft)),
    TrainerLayout(
        "ms-swift",
        "before 1.5: `loramodule_default`",
        with_names(lambda key: key.replace(".lora_", ".loramodule_default.lora_")),
    ),
    TrainerLayout(
        "Megatron-SWIFT",
        "PEFT's names on `linear_qkv` and `linear_fc1`",
        megatron(
            "base_model.model.decoder.layers.{layer}.{block}.{linear}.lora_A.weight",
            "base_model.model.decoder.layers.{layer}.{block}.{linear}.lora_B.default.weight",
        ),
    ),
    TrainerLayout(
        "verl",
        "`global_step_10/actor/lora_adapter/` beside FSDP's shards",
        lambda folder: (
            within("global_step_10/actor/lora_adapter", write_peft)(folder),
            pieces("global_step_10/actor/model_world_size_2_rank_0.pt")(folder),
            write_json(folder / "global_step_10/actor/fsdp_config.json", {"world_size": 2}),
        )[0],
    ),
    TrainerLayout(
        "FSDP",
        "`_fsdp_wrapped_module.` in the names",
        with_names(
            lambda key: key.replace("layers.", "layers.").replace(
                ".self_attn", "._fsdp_wrapped_module.self_attn"
            )
        ),
    ),
    TrainerLayout(
        "FSDP", "Accelerate's `pytorch_model_fsdp.bin`", pickled("pytorch_model_fsdp.bin")
    ),
    TrainerLayout(
        "torch.compile", "`_orig_mod.` in the names", with_names(lambda key: f"_orig_mod.{key}")
    ),
    TrainerLayout(
        "activation checkpoints",
        "`_checkpoint_wrapped_module.` in the names",
        with_names(lambda key: key.replace(".mlp.", "._checkpoint_wrapped_module.mlp.")),
    ),
    TrainerLayout(
        "DeepSpeed",
        "`module.` before the names, `global_step5/` beside",
        lambda folder: (
            with_names(lambda key: f"module.{key}")(folder),
            pieces("global_step5/mp_rank_00_model_states.pt", "latest", "zero_to_fp32.py")(folder),
        )[0],
    ),
    TrainerLayout(
        "Lightning",
        "a checkpoint with `state_dict`",
        pickled(f"{STEM}.ckpt", lambda tensors: {"epoch": 1, "state_dict": tensors}),
    ),
    TrainerLayout(
        "XTuner",
        "`llm.` before the names",
        with_names(lambda key: f"llm.{key}"),
    ),
    TrainerLayout(
        "torchtune",
        "`adapter_model.pt` in its own names, `adapter_config.json`",
        write_torchtune,
    ),
    TrainerLayout(
        "torchtune",
        "earlier: `adapter_0.pt`",
        lambda folder: write_torchtune(folder, "adapter_0.pt"),
    ),
    TrainerLayout("torchtune", "`epoch_0/` in both forms", write_torchtune_epoch),
    TrainerLayout("mistral-finetune", "`lora.safetensors`, `params.json`", write_mistral),
    TrainerLayout("NeMo", "its export to PEFT, bfloat16 or float32", write_peft),
    TrainerLayout(
        "NeMo",
        "NeMo 1's `lora_kqv_adapter` and others",
        megatron(
            "model.language_model.encoder.layers.{layer}.{block}.adapter_layer.{nemo}"
            ".linear_in.weight",
            "model.language_model.encoder.layers.{layer}.{block}.adapter_layer.{nemo}"
            ".linear_out.weight",
        ),
    ),
    TrainerLayout(
        "NeMo",
        "NeMo 2's and Megatron Bridge's `linear_qkv.adapter`",
        megatron(
            "module.decoder.layers.{layer}.{block}.{linear}.adapter.linear_in.weight",
            "module.decoder.layers.{layer}.{block}.{linear}.adapter.linear_out.weight",
        ),
    ),
    TrainerLayout(
        "NeMo", "canonical LoRA: `linear_qkv.adapter.adapter_q`", write_canonical_megatron
    ),
    TrainerLayout("MLX LM", "`adapters.safetensors`, transposed; `lora_parameters`", write_mlx),
    TrainerLayout(
        "MLX LM",
        "earlier checkpoints beside",
        lambda folder: write_mlx(folder, checkpoints=True),
    ),
    TrainerLayout(
        "MLX LM",
        "`alpha` equal to the rank",
        lambda folder: write_mlx(folder, alpha=RANK, keys=["self_attn.q_proj"]),
    ),
    TrainerLayout("Kohya", "`lora_te_` and underscores, `.alpha`", kohya("lora_te_")),
    TrainerLayout("Kohya", "`lora_unet_` and underscores, `.alpha`", kohya("lora_unet_")),
    TrainerLayout("Kohya", "paths with dots, `.alpha`", kohya("", dots=True)),
    TrainerLayout(
        "diffusers",
        "`lora.down`, `lora.up`, `.alpha`",
        kohya("", dots=True, parts=("lora.down", "lora.up")),
    ),
    TrainerLayout(
        "ComfyUI",
        "PEFT's names and `.alpha`, no configuration",
        kohya("", dots=True, parts=("lora_A", "lora_B")),
    ),
]
REFUSED = [
    TrainerLayout("TRL", "several checkpoints", write_several, "checkpoint-1000"),
    TrainerLayout(
        "PEFT",
        "several named adapters",
        lambda folder: (within("a", write_peft)(folder), within("b", write_peft)(folder))[0],
        "give one of them",
    ),
    TrainerLayout(
        "PEFT",
        "an index whose shards are not all there",
        lambda folder: (
            sharded(index=True)(folder),
            (folder / f"{STEM}-00002-of-00003.safetensors").unlink(),
        )[0],
        "complete",
    ),
    TrainerLayout("any", "a pickle with more than tensors", write_objects, "tensors alone"),
    TrainerLayout("DeepSpeed", "ZeRO-3's empty tensors", write_empty_tensors, "zero_to_fp32.py"),
    TrainerLayout(
        "DeepSpeed",
        "`global_step5/` alone",
        pieces("global_step5/zero_pp_rank_0_mp_rank_00_optim_states.pt", "latest"),
        "zero_to_fp32.py",
    ),
    TrainerLayout(
        "FSDP",
        "`pytorch_model_fsdp_0/` with `.distcp` files",
        pieces("pytorch_model_fsdp_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata"),
        "dcp_to_torch",
    ),
    TrainerLayout(
        "verl",
        "FSDP's shards alone",
        pieces("actor/model_world_size_2_rank_0.pt", "actor/model_world_size_2_rank_1.pt"),
        "verl.model_merger",
    ),
    TrainerLayout(
        "torchtune",
        "its own names without `adapter_config.json`",
        lambda folder: write_torchtune(folder, config=False),
        "lora_alpha",
    ),
    TrainerLayout("NeMo", "a `.nemo` archive", pieces("lora.nemo"), "export"),
    TrainerLayout("LitGPT", "`lit_model.pth.lora`", pieces("lit_model.pth.lora"), "litgpt"),
    TrainerLayout("MLX LM", "earlier: `adapters.npz`", pieces("adapters.npz"), "save_safetensors"),
    TrainerLayout(
        "MLX LM",
        "`alpha` and `scale`",
        lambda folder: write_mlx(folder, alpha=16.0),
        "scale alone",
    ),
    TrainerLayout("llama.cpp", "`adapter.gguf`", pieces("adapter.gguf"), "converted from"),
]
