"""What is timed: one linear layer with its adapter, in modes; and the layers that `fastlora bench` times by default."""

from __future__ import annotations

from dataclasses import dataclass

BASELINE = "linear"  # the implementation that ratios refer to
FORWARD, FORWARD_BACKWARD, STEP = "forward", "forward+backward", "training step"
DTYPES = ("float32", "tf32", "bfloat16", "float16")


@dataclass(frozen=True)
class Case:
    """One linear layer: x (m, k), weight (n, k), rank, dropout probability p.

    dtype: of x and the weight; "tf32" is float32 with TensorFloat-32 products allowed. bias: as `nn.Linear` has it.
    quick: part of the quick run. step: also time a training step of three such layers (needs k == n).
    overhead: a tiny case of which only the CPU time to issue a call is measured.
    """

    m: int
    k: int
    n: int
    rank: int
    p: float = 0.0
    dtype: str = "float32"
    bias: bool = True
    quick: bool = False
    step: bool = False
    overhead: bool = False

    @property
    def name(self) -> str:
        """The name of the case in a record; float32 and a bias are omitted."""
        dtype = "" if self.dtype == "float32" else f" {self.dtype}"
        bias = "" if self.bias else " no-bias"
        return f"{self.m}x{self.k}->{self.n} r{self.rank} p{self.p:g}{dtype}{bias}"

    @property
    def modes(self) -> tuple[str, ...]:
        return (FORWARD, FORWARD_BACKWARD, STEP) if self.step else (FORWARD, FORWARD_BACKWARD)


def readable(name: str) -> str:
    """The name of a case as the tables print it: `512x256->768 r4 p0` as `512×256 → 768, rank 4, dropout 0`."""
    shape, rank, p, *others = name.split()
    shape = shape.replace("x", "×").replace("->", " → ")
    return ", ".join((shape, f"rank {rank[1:]}", f"dropout {p[1:]}", *others))


# Layers of common models: Llama's attention and MLP projections, ViT-B's; with and without dropout.
DEFAULT_CUDA = (
    Case(8192, 4096, 4096, 16, 0.0, "bfloat16", bias=False),
    Case(8192, 4096, 4096, 16, 0.1, "bfloat16", bias=False),
    Case(4096, 768, 768, 16, 0.0, "bfloat16"),
    Case(4096, 768, 768, 16, 0.1, "bfloat16"),
    Case(8192, 4096, 14336, 16, 0.0, "bfloat16", bias=False),
    Case(8192, 4096, 14336, 16, 0.1, "bfloat16", bias=False),
)
# Smaller ones: a CPU needs seconds for a call of those above.
DEFAULT_CPU = (
    Case(1024, 768, 768, 16),
    Case(1024, 768, 768, 16, 0.1),
    Case(512, 1024, 1024, 16, bias=False),
    Case(512, 1024, 1024, 16, 0.1, bias=False),
    Case(512, 1024, 3584, 16, 0.0, bias=False),
    Case(512, 1024, 3584, 16, 0.1, bias=False),
)
