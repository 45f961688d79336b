"""Work for a real GPU whose FLOP is known: products per precision, a training step, mixes.

PyTorch (and CuPy for one kernel) come from the machine's own Python; nothing here changes settings.
"""

from __future__ import annotations

import copy
import functools
import importlib
import time
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import msgspec

from flopledger_core.records import Precision

CUBE: Final = (8192, 8192, 8192)  # tile-aligned, large enough to fill every SM
Torch: TypeAlias = Any  # not installed where this is type-checked
BATCH: Final = 8
TOKENS: Final = 2048
WIDTH: Final = 4096
HEADS: Final = 32
LAYERS: Final = 4
MMA_FLOP: Final = 2 * 16 * 8 * 16  # one warp's mma.sync m16n8k16
MMA_LOOPS: Final = 4096
MMA_CHAINS: Final = 4  # independent accumulators a warp keeps in flight
MMA_BLOCKS: Final = 132 * 4
MMA_WARPS: Final = 8


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """`repeat(n)` enqueues n repetitions, each of `amount` FLOP or operations."""

    case: str
    precision: Precision | None
    amount: int
    repeat: Callable[[int], None]
    quantity: str = "flop"
    method: str = "2MNK"
    note: str = ""


def load_torch() -> Torch:
    """PyTorch with a GPU. Errors: ImportError."""
    torch: Torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        raise ImportError("PyTorch sees no GPU")
    return torch


def _times(step: Callable[[], object]) -> Callable[[int], None]:
    def repeat(count: int) -> None:
        for _ in range(count):
            step()

    return repeat


def product(
    torch: Torch, dtype: str, shape: tuple[int, int, int], precision: Precision | None
) -> Workload:
    """A dense matrix product of shape (M, N, K) in one of PyTorch's types."""
    m, n, k = shape
    kind = {"tf32": "float32", "fp32": "float32"}.get(dtype, dtype)
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    left = torch.randn(m, k, device="cuda", dtype=getattr(torch, kind))
    right = torch.randn(k, n, device="cuda", dtype=getattr(torch, kind))
    out = torch.empty(m, n, device="cuda", dtype=getattr(torch, kind))

    def step() -> None:
        torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
        torch.mm(left, right, out=out)

    aligned = "" if m % 256 == n % 256 == 0 else "tiles reach over the edge: executed above 2MNK"
    return Workload(
        case=f"product-{dtype}-{m}x{n}x{k}",
        precision=precision,
        amount=2 * m * n * k,
        repeat=_times(step),
        note=aligned if dtype != "fp32" else "CUDA cores",
    )


def fp8(torch: Torch, size: int) -> Workload:
    """An FP8 product with FP32 accumulation."""
    kind = torch.float8_e4m3fn
    left = torch.randn(size, size, device="cuda", dtype=torch.bfloat16).to(kind)
    right = torch.randn(size, size, device="cuda", dtype=torch.bfloat16).to(kind).t()
    one = torch.ones((), device="cuda", dtype=torch.float32)
    step = functools.partial(
        torch._scaled_mm,  # noqa: SLF001  (PyTorch's only FP8 product)
        left,
        right,
        scale_a=one,
        scale_b=one,
        out_dtype=torch.bfloat16,
    )
    return Workload(
        case=f"product-fp8-{size}", precision="fp8", amount=2 * size**3, repeat=_times(step)
    )


def int8(torch: Torch, size: int) -> Workload:
    """An INT8 product: integer operations, not FLOP."""
    left = torch.randint(-8, 8, (size, size), device="cuda", dtype=torch.int8)
    right = torch.randint(-8, 8, (size, size), device="cuda", dtype=torch.int8).t()
    return Workload(
        case=f"product-int8-{size}",
        precision="int8",
        amount=2 * size**3,
        repeat=_times(functools.partial(torch._int_mm, left, right)),  # noqa: SLF001
        quantity="operations",
    )


def sparse(torch: Torch, size: int) -> Workload:
    """A 2:4 sparse product; the truth is what is carried out: half of 2MNK."""
    mask = torch.tensor([1, 1, 0, 0], device="cuda", dtype=torch.float16).tile(size, size // 4)
    dense = torch.randn(size, size, device="cuda", dtype=torch.float16) * mask
    left = importlib.import_module("torch.sparse").to_sparse_semi_structured(dense)
    right = torch.randn(size, size, device="cuda", dtype=torch.float16)
    return Workload(
        case=f"sparse-2-4-fp16-{size}",
        precision="fp16",
        amount=size**3,
        repeat=_times(functools.partial(torch.mm, left, right)),
        note="half of 2MNK: what is carried out",
    )


def zeros(torch: Torch, size: int) -> Workload:
    """A product on dropped-out zeros: the hardware multiplies them."""
    left = torch.nn.functional.dropout(
        torch.randn(size, size, device="cuda", dtype=torch.bfloat16), p=0.5
    )
    right = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    return Workload(
        case=f"zeros-bf16-{size}",
        precision="bf16",
        amount=2 * size**3,
        repeat=_times(functools.partial(torch.mm, left, right)),
        note="half of one factor is zero",
    )


LEGACY_SOURCE: Final = r"""
extern "C" __global__ void spin(float* out, int loops) {
  float acc[4][4] = {};
  unsigned a0 = threadIdx.x, a1 = a0 + 1, a2 = a0 + 2, a3 = a0 + 3, b0 = a0 + 4, b1 = a0 + 5;
  for (int i = 0; i < loops; ++i) {
    #pragma unroll
    for (int c = 0; c < 4; ++c)
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(acc[c][0]), "+f"(acc[c][1]), "+f"(acc[c][2]), "+f"(acc[c][3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
  if (acc[0][0] == 12345.0f) out[threadIdx.x] = acc[0][0] + acc[1][1] + acc[2][2] + acc[3][3];
}
"""


def legacy(torch: Torch) -> Workload:
    """The older mma.sync instruction from registers: settles the floor of the low bound."""
    cupy: Any = importlib.import_module("cupy")
    kernel = cupy.RawKernel(LEGACY_SOURCE, "spin")
    out = cupy.zeros(1024, dtype=cupy.float32)
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)

    def step() -> None:
        with stream:
            kernel((MMA_BLOCKS,), (32 * MMA_WARPS,), (out, MMA_LOOPS))

    return Workload(
        case="legacy-mma-bf16",
        precision="bf16",
        amount=MMA_FLOP * MMA_LOOPS * MMA_CHAINS * MMA_BLOCKS * MMA_WARPS,
        repeat=_times(step),
        method="counted instructions",
    )


def training_step(torch: Torch, *, recompute: bool) -> Workload:
    """A small transformer's step in BF16; FLOP by PyTorch's counter, recomputation included."""
    layer: Any = torch.nn.TransformerEncoderLayer(
        WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, device="cuda", dtype=torch.bfloat16
    )
    layers = torch.nn.ModuleList([layer] + [copy.deepcopy(layer) for _ in range(LAYERS - 1)])
    optimiser = torch.optim.AdamW(layers.parameters(), lr=1e-5)
    checkpoint = importlib.import_module("torch.utils.checkpoint").checkpoint
    inputs = torch.randn(BATCH, TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        hidden = inputs.detach().requires_grad_()
        for block in layers:
            hidden = checkpoint(block, hidden, use_reentrant=False) if recompute else block(hidden)
        hidden.float().square().mean().backward()
        optimiser.step()

    step()  # the optimiser's state exists from here on
    counter = importlib.import_module("torch.utils.flop_counter").FlopCounterMode(display=False)
    with counter:
        step()
    name = "training-step-recomputed" if recompute else "training-step"
    return Workload(
        case=name,
        precision="bf16",
        amount=int(counter.get_total_flops()),
        repeat=_times(step),
        method="PyTorch FlopCounterMode",
        note="products and attention; element-wise work is not in the truth",
    )


def mixed(torch: Torch) -> Workload:
    """BF16, FP8 and TF32 products one after the other, nothing declared."""
    parts = [
        product(torch, "bfloat16", CUBE, None),
        fp8(torch, 8192),
        product(torch, "tf32", (4096, 4096, 4096), None),
    ]

    def step() -> None:
        for part in parts:
            part.repeat(1)

    return Workload(
        case="mixed-precisions",
        precision=None,
        amount=sum(part.amount for part in parts),
        repeat=_times(step),
        note="central assumes BF16",
    )


def bursts(torch: Torch) -> Workload:
    """Short work and long pauses: 50 ms in every 500."""
    part = product(torch, "bfloat16", CUBE, "bf16")
    count = 32  # about 50 ms on an H200

    def step() -> None:
        part.repeat(count)
        torch.cuda.synchronize()
        time.sleep(0.45)

    return Workload(
        case="bursts-bf16",
        precision="bf16",
        amount=count * part.amount,
        repeat=_times(step),
        note="about 50 ms in every 500",
    )


def _products() -> list[Callable[[Torch], Workload]]:
    makes: list[Callable[[Torch], Workload]] = []
    shapes: dict[str, list[tuple[int, int, int]]] = {
        "bfloat16": [
            CUBE,
            (16384, 16384, 16384),
            (4096, 4096, 4096),
            (8200, 8200, 8192),
            (1000, 1000, 1000),
            (320, 320, 320),
        ],
        "float16": [CUBE, (16384, 16384, 16384)],
        "tf32": [CUBE, (4100, 4100, 4096)],
        "float64": [CUBE, (4096, 4096, 4096)],
        "fp32": [CUBE],
    }
    names: dict[str, Precision | None] = {
        "bfloat16": "bf16", "float16": "fp16", "tf32": "tf32", "float64": "fp64", "fp32": None,
    }  # fmt: skip
    for dtype, sizes in shapes.items():
        for shape in sizes:
            make = functools.partial(product, dtype=dtype, shape=shape, precision=names[dtype])
            makes.append(_named(make, f"product-{dtype}-{shape[0]}"))
    return makes


def _named(make: Callable[..., Workload], name: str) -> Callable[[Torch], Workload]:
    def made(torch: Torch) -> Workload:
        return make(torch)

    made.__name__ = name
    return made


WORKLOADS: Final[tuple[Callable[[Torch], Workload], ...]] = (
    *_products(),
    _named(functools.partial(fp8, size=8192), "fp8-8192"),
    _named(functools.partial(fp8, size=16384), "fp8-16384"),
    _named(functools.partial(int8, size=8192), "int8-8192"),
    _named(functools.partial(sparse, size=8192), "sparse-8192"),
    _named(functools.partial(zeros, size=8192), "zeros-8192"),
    _named(legacy, "legacy-mma"),
    _named(functools.partial(training_step, recompute=False), "training-step"),
    _named(functools.partial(training_step, recompute=True), "training-step-recomputed"),
    _named(mixed, "mixed"),
    _named(bursts, "bursts"),
)
