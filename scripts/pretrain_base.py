"""Pretrain the base decoder on procedural shapes, which contain no anatomy.

    python scripts/pretrain_base.py            # writes fastlora/medical/models/weights/base.{safetensors,json}

The phantoms depend only on the seed, and so does the result, up to rounding.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fastlora.errors import ConfigError, FastLoRAError
from fastlora.medical.data.batch import collate_regions
from fastlora.medical.data.grids import FINE, SPACING_MM, truncated_sdf
from fastlora.medical.data.phantom import make_phantom
from fastlora.medical.data.regions import TOKEN_CHANNELS, region_arrays
from fastlora.medical.models.decoder import (
    BASE_WEIGHTS,
    DecoderConfig,
    SparseMeshDecoder,
    save_base_model,
)
from fastlora.medical.models.losses import mesh_losses

WEIGHTS = {"sdf": 1.0, "occupancy": 0.2, "normal": 0.05}
FRACTION_STEPS = 2
"""Of the saved model. They have no weights, and are not used in pretraining."""


class PhantomRegions(Dataset[dict[str, Any]]):
    """Region samples of phantoms; sample `i` is a pure function of (seed, i)."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, mask = make_phantom(np.random.default_rng((self.seed, index)), FINE)
        meta = {"subject": "phantom", "structure": "phantom", "region": str(index)}
        arrays = region_arrays(image, truncated_sdf(mask))
        return {**arrays, "affine": np.eye(4), "spacing": SPACING_MM, "meta": meta}


def pretrain(
    config: DecoderConfig, steps: int, batch_size: int, lr: float, seed: int
) -> SparseMeshDecoder:
    """A decoder after `steps` of AdamW with warm-up and a cosine decay to zero. Raises: ConfigError if a number is not positive."""
    for name, value in (("steps", steps), ("batch_size", batch_size), ("lr", lr)):
        if not value > 0:
            raise ConfigError(f"{name}: expected > 0, got {value}")
    torch.manual_seed(seed)
    model = SparseMeshDecoder(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda n: min((n + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(1.0, n / steps))),
    )
    loader = DataLoader(
        PhantomRegions(steps * batch_size, seed),
        batch_size=batch_size,
        collate_fn=collate_regions,
        num_workers=1,
        prefetch_factor=8,
    )
    mean: dict[str, float] = {}
    bar = tqdm(loader, desc="pretrain", unit="step")
    for batch in bar:
        losses = mesh_losses(model(batch.tokens, batch.base_vox), batch, WEIGHTS)
        optimizer.zero_grad(set_to_none=True)
        losses["total"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        for name, value in losses.items():
            mean[name] = 0.98 * mean.get(name, value.item()) + 0.02 * value.item()
        bar.set_postfix({name: f"{value:.3f}" for name, value in mean.items()}, refresh=False)
    return model


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        default=BASE_WEIGHTS,
        help="safetensors file to write (default: the packaged base model)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        default=1500,
        help="optimizer steps (default: %(default)s)",
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        metavar="N",
        default=8,
        help="phantoms per optimizer step (default: %(default)s)",
    )
    parser.add_argument(
        "--lr",
        type=float,
        metavar="X",
        default=2e-3,
        help="peak learning rate (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        default=0,
        help="random seed of weights and phantoms (default: %(default)s)",
    )
    parser.add_argument(
        "--channels",
        type=int,
        metavar="N",
        default=128,
        help="channels of the decoder (default: %(default)s)",
    )
    parser.add_argument(
        "--blocks",
        type=int,
        metavar="N",
        default=4,
        help="transformer blocks of the decoder (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    try:
        config = DecoderConfig(TOKEN_CHANNELS, channels=args.channels, blocks=args.blocks)
        start = time.monotonic()
        model = pretrain(config, args.steps, args.batch_size, args.lr, args.seed)
        model.config = replace(config, fraction_steps=FRACTION_STEPS)
        flags = {k: v for k, v in vars(args).items() if k != "output"}
        provenance = {
            "trained_on": "procedural shapes (fastlora.medical.data.phantom), no anatomy; fraction_steps, which have no weights, were added after "
            "training",
            "command": "python scripts/pretrain_base.py "
            + " ".join(f"--{k} {v}" for k, v in flags.items()),
            "seconds": round(time.monotonic() - start),
            "torch": torch.__version__,
        }
        save_base_model(model, args.output, provenance)
    except FastLoRAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
