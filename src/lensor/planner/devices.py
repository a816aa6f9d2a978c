"""Built-in profiles of typical devices.

The rates of two cores were measured. Those of GPUs are derived from published peak rates: 80 % of the peak for large
matrix products, 70 % for batched products, 60 % for convolutions, 30 % and 5 % for grouped and depthwise ones, and 85 %
of the peak bandwidth. They are to be replaced by measurements.
"""

from __future__ import annotations

from dataclasses import replace

from lensor.planner.profile import Machine, Speed, Speeds


def _cpu(single: Speeds) -> dict[str, Speeds]:
    """Speeds by dtype: double precision has half the rate; half precision is computed in single precision."""
    parts = (getattr(single, name) for name in Speeds.__dataclass_fields__)
    return {"float32": single, "float64": Speeds(*(Speed(speed.rate / 2, speed.setup) for speed in parts))}


def _gpu(tera: float, convolutions: float | None = None) -> Speeds:
    """Speeds of a GPU with this many Tflop/s for one dtype, in products and in convolutions."""
    shares = (0.8, 0.7, 0.6, 0.6, 0.6, 0.3, 0.05)
    rates = [tera] * 2 + [tera if convolutions is None else convolutions] * 5
    return Speeds(*(Speed(share * rate * 1e12, 5e-6) for share, rate in zip(shares, rates, strict=True)))


TWO_CORES = Machine(
    name="two-core CPU",
    threads=2,
    memory=10e9,
    cache=16e9,
    cache_bytes=1 << 23,
    faults=3.0,
    call=12e-6,
    barrier=6e-6,
    speeds=_cpu(
        Speeds(
            products=Speed(115e9, 15e-6),
            batched=Speed(95e9, 25e-6),
            forward=Speed(115e9, 20e-6),
            input_grad=Speed(110e9, 30e-6),
            weight_grad=Speed(95e9, 50e-6),
            grouped=Speed(95e9, 40e-6),
            depthwise=Speed(15e9, 40e-6),
        )
    ),
)
"""Two cores of a server with AVX2, with torch."""

NUMPY = replace(
    TWO_CORES,
    name="NumPy on a CPU",
    speeds=_cpu(
        replace(
            TWO_CORES.speeds["float32"],
            forward=Speed(12e9, 100e-6),
            input_grad=Speed(6e9, 100e-6),
            weight_grad=Speed(5e9, 100e-6),
            grouped=Speed(3e9, 100e-6),
            depthwise=Speed(0.3e9, 100e-6),
        )
    ),
)
"""NumPy has no convolutions: the backend multiplies patches, which it copies."""

JAX = replace(
    TWO_CORES,
    name="JAX on a CPU",
    call=3e-6,
    speeds=_cpu(
        Speeds(
            products=Speed(120e9, 15e-6),
            batched=Speed(85e9, 25e-6),
            forward=Speed(65e9, 30e-6),
            input_grad=Speed(60e9, 30e-6),
            weight_grad=Speed(35e9, 50e-6),
            grouped=Speed(1.5e9, 50e-6),
            depthwise=Speed(0.3e9, 50e-6),
        )
    ),
)
"""JAX on two cores: XLA has no fast convolutions with groups for CPUs. Measured with JAX 0.10."""

FRAMEWORKS = {"NumPy": NUMPY, "JAX": JAX}
"""Profiles of CPUs for frameworks other than torch."""

MANY_CORES = Machine(
    name="many-core CPU",
    threads=32,
    memory=80e9,
    cache=400e9,
    cache_bytes=1 << 25,
    faults=3.0,
    call=4e-6,
    barrier=15e-6,
    speeds=_cpu(
        Speeds(
            products=Speed(1500e9, 20e-6),
            batched=Speed(1200e9, 20e-6),
            forward=Speed(1300e9, 20e-6),
            input_grad=Speed(1100e9, 20e-6),
            weight_grad=Speed(1000e9, 20e-6),
            grouped=Speed(900e9, 20e-6),
            depthwise=Speed(150e9, 20e-6),
        )
    ),
)
"""32 cores of a server: an extrapolation from two cores, with the barriers of 32 threads."""

T4 = Machine(
    "T4", 1, 272e9, 1000e9, 4 << 20, 1.0, 8e-6, 0.0, {"float32": _gpu(8.1), "float64": _gpu(0.25), "float16": _gpu(65)}
)
A100 = Machine(
    "A100",
    1,
    1320e9,
    4000e9,
    40 << 20,
    1.0,
    6e-6,
    0.0,
    {
        "float32": _gpu(19.5),
        "tf32": _gpu(156),
        "float32 with tf32 convolutions": _gpu(19.5, 156),
        "float64": _gpu(19.5),
        "float16": _gpu(312),
        "bfloat16": _gpu(312),
    },
)
H100 = Machine(
    "H100",
    1,
    2850e9,
    8000e9,
    50 << 20,
    1.0,
    5e-6,
    0.0,
    {
        "float32": _gpu(67),
        "tf32": _gpu(495),
        "float32 with tf32 convolutions": _gpu(67, 495),
        "float64": _gpu(67),
        "float16": _gpu(989),
        "bfloat16": _gpu(989),
    },
)

GPUS = {"T4": T4, "A100": A100, "H100": H100, "H200": H100}
"""Profiles of GPUs, by a part of the device's name."""

_FEW = 8
"""CPUs with up to this many threads are planned like two cores: with so few threads, barriers are short."""


def typical(kind: str, name: str, threads: int) -> Machine:
    """The built-in profile that is closest to a device.

    Args:
        kind: "cpu", or the type of another device.
        name: name of the device; for a CPU, "NumPy" or "JAX" if these run the plans.
        threads: number of threads of a CPU.
    """
    if name in FRAMEWORKS:
        return FRAMEWORKS[name]
    if kind == "cpu":
        return TWO_CORES if threads <= _FEW else MANY_CORES
    return next((profile for part, profile in GPUS.items() if part in name), A100)
