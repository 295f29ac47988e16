"""bfloat16 in Triton's interpreter, as `tests/support/interpreter.py` defines it, bit for bit against torch."""

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs

from tests.support import interpreter

pytestmark = pytest.mark.skipif(not knobs.runtime.interpret, reason="of the interpreter")
BF16 = torch.bfloat16
EVERY = torch.arange(-(2**15), 2**15).to(torch.int16).view(BF16)  # every bfloat16 number


@triton.jit
def _cast_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    o = tl.arange(0, SIZE)
    tl.store(out_ptr + o, tl.load(x_ptr + o).to(out_ptr.dtype.element_ty))


@triton.jit
def _dot_kernel(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    """out += x yᵀ"""
    o = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    acc = tl.load(out_ptr + o)
    tl.store(out_ptr + o, tl.dot(tl.load(x_ptr + o), tl.trans(tl.load(y_ptr + o)), acc))


@triton.jit
def _move_kernel(x_ptr, out_ptr, columns, SIZE: tl.constexpr):
    """out = x with 0 from `columns` on and below the diagonal, its halves exchanged, transposed: all that the kernels do without arithmetic."""
    o_m, o_n = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    x = tl.load(x_ptr + o_m * SIZE + o_n, mask=o_n < columns, other=0.0)
    x = tl.where(o_m <= o_n, x, 0.0)
    left, right = tl.split(tl.permute(tl.reshape(x, [SIZE, 2, SIZE // 2]), [0, 2, 1]))
    x = tl.reshape(tl.permute(tl.join(right, left), [0, 2, 1]), [SIZE, SIZE])
    tl.store(out_ptr + o_m * SIZE + o_n, tl.trans(x))


def _bits(x: torch.Tensor) -> torch.Tensor:
    """The bits, those of every NaN being the same."""
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()]).masked_fill(x.isnan(), -1)


def _converted(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The interpreter's result and torch's."""
    out = torch.empty(x.shape, dtype=dtype)
    _cast_kernel[(1,)](x, out, x.numel())
    return out, x.to(dtype)


def _widening():
    return _converted(EVERY, torch.float32)


def _rounding():
    """Of every bfloat16 number, of the one halfway to the next, and of that one's neighbours."""
    bits = EVERY.float().view(torch.int32)
    near = torch.cat([bits, bits + 0x7FFF, bits + 0x8000, bits + 0x8001])
    return _converted(near.view(torch.float32), BF16)


def _product():
    """Of integers, so that the sums are exact in float32."""
    x, y = (torch.randint(-99, 100, (32, 32)).to(BF16) for _ in range(2))
    out = torch.randint(-(2**20), 2**20, (32, 32)).float()
    want = out + (x.double() @ y.double().T).float()
    _dot_kernel[(1,)](x, y, out, 32)
    return out, want


def _moves():
    x, out = EVERY[::64].view(32, 32), torch.empty(32, 32, dtype=BF16)
    _move_kernel[(1,)](x.contiguous(), out, 27, 32)
    want = torch.where(torch.arange(32) < 27, x, 0.0).triu()
    return out, want.roll(16, 1).T


@pytest.mark.parametrize("operation", [_widening, _rounding, _product, _moves])
def test_bfloat16_is_torchs(operation):
    with interpreter.bfloat16():
        got, want = operation()
    assert torch.equal(_bits(got), _bits(want))


@pytest.mark.parametrize("operation", [_widening, _rounding, _product])
def test_what_is_replaced_is_wrong_in_triton(operation):
    """If this fails, Triton has repaired the operation, and its replacement can go."""
    got, want = operation()
    assert not torch.equal(_bits(got), _bits(want))
