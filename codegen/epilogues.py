"""What may follow the product of a linear kernel, as data: its label, the arguments it takes and the outputs it writes.

`codegen/kernels/epilogue.py` emits the code of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tilewright.codegen.formats import AttentionOperands, Format, Layout

Argument = tuple[str, tuple[Any, ...], str]
"""Name, shape and dtype of a kernel's argument."""


@dataclass(frozen=True)
class Norm:
    """A LayerNorm: layouts of its float32 input (`residual`) and float32 output (`stream`), format of the u8 copy (`consumer`).

    There is no u8 copy if `consumer` is None. channels: those that are normalised, where more are stored. The rest are 0, and
    are left out of the last stream, which the head reads.
    """

    eps: float
    residual: Layout
    stream: Layout
    consumer: Format | None
    channels: int | None = None

    @property
    def label(self) -> str:
        """The layouts and the channels, for the epilogue's label."""
        of = f"/{self.channels}" if self.channels else ""
        return f"{self.residual}>{self.stream}" + (f">{self.consumer.label}" if self.consumer else "") + of

    def written(self, hidden: int) -> int:
        """Channels of the float32 output, of `hidden` that are stored."""
        return self.channels if self.channels and self.consumer is None else hidden

    def inputs(self, hidden: int) -> tuple[Argument, ...]:
        """gamma f32[H], beta f32[H] and quant f32[2] = (1 / scale, zero point) of the u8 copy."""
        return ("gamma", (hidden,), "float32"), ("beta", (hidden,), "float32"), ("quant", (2,), "float32")

    def outputs(self, groups: Any, hidden: int) -> tuple[Argument, ...]:
        """The float32 stream and, if there is a consumer, the u8 copy."""
        stream = ("stream", Format(self.stream, "float32").shape(groups, self.written(hidden)), "float32")
        if self.consumer is None:
            return (stream,)
        return stream, ("quantized", self.consumer.shape(groups, hidden), self.consumer.dtype)


@dataclass(frozen=True)
class Raw:
    """The int32 sums with the zero point folded in, [G, C, 16] or [G, 16, C]; what tests compare bit for bit."""

    label = "raw"
    residual = None

    def inputs(self, groups: Any, n: int) -> tuple[Argument, ...]:
        """None."""
        return ()

    def outputs(self, groups: Any, n: int, lanes: Layout) -> tuple[Argument, ...]:
        """The sums, in the layout of the accumulators."""
        return (("sums", Format(lanes, "int32").shape(groups, n), "int32"),)


@dataclass(frozen=True)
class Qkv:
    """The concatenated q, k, v as attention wants them.

    q, k: [G, H / pack, 16, pack], neighbouring channels of a token adjacent. v: [G, H, 16].
    """

    operands: AttentionOperands
    residual = None

    @property
    def label(self) -> str:
        """qkv and the dtypes."""
        return f"qkv>{self.operands.query}.{self.operands.key}"

    @property
    def formats(self) -> tuple[Format, Format, Format]:
        """Those of q, k and v."""
        held = self.operands
        return (
            Format("packed", held.query, held.pack),
            Format("packed", held.key, held.pack),
            Format("columns", held.query),
        )

    def inputs(self, groups: Any, n: int) -> tuple[Argument, ...]:
        """None."""
        return ()

    def outputs(self, groups: Any, n: int, lanes: Layout) -> tuple[Argument, ...]:
        """query, key and value."""
        names = ("query", "key", "value")
        return tuple((name, f.shape(groups, n // 3), f.dtype) for name, f in zip(names, self.formats, strict=True))


@dataclass(frozen=True)
class Activate:
    """Activation function, then u8 in the format of the next linear."""

    activation: str
    consumer: Format
    residual = None

    @property
    def label(self) -> str:
        """The function and the format."""
        return f"{self.activation}>{self.consumer.label}"

    def inputs(self, groups: Any, n: int) -> tuple[Argument, ...]:
        """quant f32[2]: 1 / scale and zero point."""
        return (("quant", (2,), "float32"),)

    def outputs(self, groups: Any, n: int, lanes: Layout) -> tuple[Argument, ...]:
        """The activated values."""
        return (("activated", self.consumer.shape(groups, n), self.consumer.dtype),)


@dataclass(frozen=True)
class AddNorm:
    """Residual add and LayerNorm."""

    norm: Norm

    @property
    def label(self) -> str:
        """add_norm and the layouts."""
        return f"add_norm@{self.norm.label}"

    @property
    def residual(self) -> Layout:
        """Layout of the stream that is added to."""
        return self.norm.residual

    def inputs(self, groups: Any, n: int) -> tuple[Argument, ...]:
        """The residual stream f32 and the norm's parameters."""
        return ("residual", Format(self.norm.residual, "float32").shape(groups, n), "float32"), *self.norm.inputs(n)

    def outputs(self, groups: Any, n: int, lanes: Layout) -> tuple[Argument, ...]:
        """Those of the norm."""
        return self.norm.outputs(groups, n)


Epilogue = Qkv | Activate | AddNorm | Raw
