"""Time a whole training step of a model and measure its memory, against PEFT and full fine-tuning on the CPU.

    python benchmarks/model_step.py [--reps 10] [--only vit-b] [--output benchmarks/results/model-step-cpu.json]

The models are transformers' own, with random float32 weights: ViT-B (12 blocks, 4 images of 197 tokens), a Llama of 1.2 billion parameters
without its vocabulary (16 blocks, hidden size 2048, MLP size 8192, 128 tokens), and a tiny Llama for the tests. A step is forward, the mean
square of the output, backward, AdamW on the trainable parameters. Steps are interleaved; implementations that freeze the base share its weights.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from record import Record, environment, write
from timing import interleave, wall_clock
from torch import Tensor, nn

import fastlora

RANK, ALPHA, DROPOUT = 8, 16, 0.1
IMPLEMENTATIONS = ("fastlora", "fastlora-fused", "peft", "full")


@dataclass(frozen=True)
class Model:
    """A model to train.

    make: builds the base model. inputs: builds its keyword arguments. targets: names of the adapted layers.
    full: whether full fine-tuning fits in memory.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    targets: tuple[str, ...]
    full: bool


def llama(hidden: int, intermediate: int, layers: int, heads: int, key_heads: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        use_cache=False,
    )
    return LlamaModel(config)


def vit_b() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(), add_pooling_layer=False)


LLAMA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODELS = {
    "vit-b": Model(
        vit_b,
        lambda: {"pixel_values": torch.randn(4, 3, 224, 224)},
        ("query", "key", "value", "q_proj", "k_proj", "v_proj"),
        True,
    ),
    "llama-1b": Model(
        lambda: llama(2048, 8192, 16, 32, 8),
        lambda: {"input_ids": torch.arange(128)[None] % 256},
        LLAMA_LAYERS,
        False,
    ),
    "llama-tiny": Model(
        lambda: llama(32, 64, 2, 4, 2),
        lambda: {"input_ids": torch.arange(16)[None]},
        LLAMA_LAYERS,
        True,
    ),
}


def adapted(name: str, model: Model, base: nn.Module, inputs: dict[str, Tensor]) -> nn.Module:
    """The model trained by implementation `name`; it shares the weights of `base` unless it trains them."""
    with torch.device("meta"):
        mine = model.make()
    state = base.state_dict(keep_vars=False)
    if name == "full":
        state = {key: value.clone() for key, value in state.items()}
    mine.load_state_dict(state, assign=True)
    for key, buffer in base.named_buffers():  # some are not in the state dict
        owner, _, last = key.rpartition(".")
        mine.get_submodule(owner)._buffers[last] = buffer
    mine.train()
    if name == "full":
        return mine.requires_grad_(True)
    names = {path.rpartition(".")[2] for path, _ in mine.named_modules()}
    targets = [target for target in model.targets if target in names]
    if name == "peft":
        import peft

        config = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=targets
        )
        return peft.get_peft_model(mine, config)
    config = fastlora.LoRAConfig(targets, RANK, ALPHA, DROPOUT, match="exact")
    fastlora.inject_lora(mine, config)
    fastlora.freeze_base_params(mine)
    if name == "fastlora-fused":
        fastlora.fuse(mine, **inputs)
    return mine


def loss_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).last_hidden_state.square().mean()


def step_of(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-5)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model, inputs).backward()
        optimizer.step()

    return step


def saved_bytes(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Bytes of distinct storage that a forward pass saves for the backward pass, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(model, inputs)
    return sum(saved.values())


def run_model(name: str, reps: int, record: Record) -> None:
    """Add a row for each implementation on the model `name`; one that cannot run is recorded as absent.

    Raises: RuntimeError if an untrained adapter changes the loss.
    """
    torch.manual_seed(0)
    model = MODELS[name]
    base, inputs = model.make().requires_grad_(False), model.inputs()
    models = {
        c: adapted(c, model, base, inputs) for c in IMPLEMENTATIONS if c != "full" or model.full
    }
    if not model.full:
        reason = (
            "weights, gradients and AdamW state do not fit in memory together with the base model"
        )
        record["absent"].append({"model": name, "backend": "full", "reason": reason})
    # Untrained adapters must not change the loss; evaluation mode turns dropout off.
    with torch.no_grad():
        expected = loss_of(base.eval(), inputs).item()
        for implementation, mine in models.items():
            got = loss_of(mine.eval(), inputs).item()
            mine.train()
            if abs(got - expected) > 1e-4 * abs(expected):
                raise RuntimeError(
                    f"{implementation} on {name}: loss {got}, the base model has {expected}"
                )
    times = interleave({c: step_of(m, inputs) for c, m in models.items()}, reps, wall_clock)
    for implementation, mine in models.items():
        trained = [p for p in mine.parameters() if p.requires_grad]
        samples = sorted(times[implementation])
        record["results"].append(
            {
                "model": name,
                "backend": implementation,
                "ms_p50": round(statistics.median(samples), 2),
                "ms_min": round(samples[0], 2),
                "ms_max": round(samples[-1], 2),
                "parameters": sum(p.numel() for p in mine.parameters()),
                "trainable": sum(p.numel() for p in trained),
                "saved_bytes": saved_bytes(mine, inputs),
                "state_bytes": 4 * sum(p.nbytes for p in trained),  # weight, gradient, two moments
            }
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time whole training steps on the CPU.")
    parser.add_argument(
        "--reps",
        type=int,
        default=10,
        help="timed steps of each implementation (default: %(default)s)",
    )
    parser.add_argument(
        "--only", choices=list(MODELS), help="run this model only (default: vit-b and llama-1b)"
    )
    parser.add_argument("--output", type=Path, help="JSON file for the record")
    arguments = parser.parse_args(argv)
    record: dict[str, Any] = {
        "environment": environment(torch.device("cpu"), arguments.reps),
        "settings": {"rank": RANK, "alpha": ALPHA, "dropout": DROPOUT, "dtype": "float32"},
        "results": [],
        "absent": [],
    }
    for name in [arguments.only] if arguments.only else ["vit-b", "llama-1b"]:
        run_model(name, arguments.reps, record)
        if arguments.output is not None:
            write(record, arguments.output)
        for row in record["results"]:
            if row["model"] == name:
                print(
                    f"{name:10} {row['backend']:15} {row['ms_p50']:9.1f} ms per step, saves "
                    f"{row['saved_bytes'] / 2**20:8.1f} MiB, {row['state_bytes'] / 2**20:8.1f} MiB of training state"
                )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
