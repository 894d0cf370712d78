"""What a pass of one block takes and gives back in ONNX Runtime.

Written down from the graph as ONNX Runtime optimises it, in float32; what is smaller than a row of
channels per token is left out.

Neighbours: `buffer_plan` lays the tensors into buffers, `arena` replays the tape, `host_sizes` adds
up; `mc_export.skyreels.Block` is the graph.

Symbols: K recomputed tokens, M visible keys, S cache slots, T text tokens, N heads, D channels of a
head, C = N D channels.
"""

__all__ = ["record_block"]

from mc_engines.arena import Kind, Tape
from mc_engines.buffer_plan import Nodes
from mc_engines.run_sizes import WindowShape

_BYTES = 4  # of a float32
_TOKENS, _HEADS_LAST, _HEADS_FIRST = "1 K C", "1 K N D", "1 N K D"


def record_block(shape: WindowShape, keys: int, fused: bool) -> Tape:
    """Record a full pass of one block.

    Args:
        shape: Of the model and the window; K is a whole chunk.
        keys: M.
        fused: The form with fused attention, or that which writes its scores.

    Returns:
        The tape; inputs and weights are the caller's and not on it.
    """
    return _Block(shape, keys, fused).record()


class _Block:
    """Writes down the nodes, each with the name of what it computes."""

    def __init__(self, shape: WindowShape, keys: int, fused: bool) -> None:
        row = shape.dim * _BYTES
        self.nodes, self.fused = Nodes(), fused
        self.frame = 6 * row
        self.k, self.text = shape.chunk_tokens * row, shape.text_tokens * row
        self.joined = (shape.window_tokens + shape.chunk_tokens) * row
        self.visible = keys * row
        self.wide = shape.chunk_tokens * shape.ffn_dim * _BYTES
        score = shape.heads * shape.chunk_tokens * _BYTES
        self.scores, self.text_scores = score * keys, score * shape.text_tokens

    def record(self) -> Tape:
        add = self.nodes.add
        self._modulate()
        self._tokens("normal")
        self._tokens("scaled", "normal", "1 + scale")
        self._tokens("shifted", "scaled", "shift")
        add("qkv product", "1 K 3C", 3 * self.k, ["shifted"])
        add("qkv", "1 K 3C", 3 * self.k, ["qkv product"])
        add(["q", "k", "v"], _TOKENS, self.k, ["qkv"])
        attended = self._attend_fused() if self.fused else self._attend_plainly()
        self._project(attended, "update")
        self._tokens("gated", "update", "gate")
        self._tokens("sum", "gated")
        attended = self._attend_text()
        self._project(attended, "text update")
        self._tokens("text sum", "text update", "sum")
        self._feed_forward()
        return self.nodes.record()

    def _tokens(self, name: str, *inputs: str) -> None:
        """A node that gives a row of channels for every token."""
        self.nodes.add(name, _TOKENS, self.k, inputs)

    def _project(self, x: str, name: str) -> None:
        """A matrix product, and its bias."""
        self._tokens(f"{name} product", x)
        self._tokens(name, f"{name} product")

    def _modulate(self) -> None:
        """Look up a row for every token; what one frame has of them lies in the first region."""
        self.nodes.add("modulation", "F 6 C", self.frame)
        for name in ("ffn gate", "ffn shift", "ffn scale"):
            self.nodes.add(name, "K C", self.k, ["modulation"])
        self.nodes.add("1 + ffn scale", "K C", self.k, ["ffn scale"])
        if self.fused:
            self.nodes.add("text values", "1 T N D", self.text)
            self.nodes.add("text keys", "1 T N D", self.text)
        for name in ("gate", "shift", "scale"):
            self.nodes.add(name, "K C", self.k, ["modulation"])
        self.nodes.add("1 + scale", "K C", self.k, ["scale"])

    def _normalise(self, x: str) -> str:
        """Divide by the root of the mean square, and scale."""
        self._tokens(f"{x} squared", x)
        self._tokens(f"{x} divided", x)
        self._tokens(f"{x} normal", f"{x} divided")
        return f"{x} normal"

    def _rotate(self, x: str, name: str, layout: str, kind: Kind = Kind.PLANNED) -> None:
        """Turn queries or keys by their angles, half by half."""
        half, size = layout.replace("D", "D/2"), self.k // 2
        parts = [f"{x}, first half", f"{x}, second half"]
        self.nodes.add(parts, half, size, [x])
        turned = []
        for number in (1, 2):
            products = [f"{name}, product {number}{part}" for part in "ab"]
            for product, part in zip(products, reversed(parts), strict=True):
                self.nodes.add(product, half, size, [part])
            turned.append(f"{name}, half {number}")
            self.nodes.add(turned[-1], half, size, products)
        self.nodes.add(name, layout, self.k, turned, kind=kind)

    def _make_keys(self) -> None:
        """Normalise, lay out and turn the new keys."""
        self.nodes.add("k heads", _HEADS_FIRST, self.k, [self._normalise("k")])
        self._rotate("k heads", "k_new", _HEADS_FIRST, Kind.OUTPUT)

    def _make_values(self) -> None:
        self.nodes.add("v_new", _HEADS_FIRST, self.k, ["v"], kind=Kind.OUTPUT)

    def _look_up(self, new: str, name: str) -> None:
        """Join the cache with the new rows, and gather what is visible."""
        self.nodes.add(f"{name} joined", "1 N S+K D", self.joined, [new])
        self.nodes.add(name, "1 N M D", self.visible, [f"{name} joined"])

    def _attend_plainly(self) -> str:
        add = self.nodes.add
        self._make_keys()
        self._look_up("k_new", "keys")
        add("q heads", _HEADS_FIRST, self.k, [self._normalise("q")])
        self._rotate("q heads", "turned q", _HEADS_FIRST)
        add("scores", "1 N K M", self.scores, ["turned q", "keys"])
        self._make_values()
        self._look_up("v_new", "values")
        add("mixed", _HEADS_FIRST, self.k, ["scores", "values"])
        add("attended", _HEADS_LAST, self.k, ["mixed"])
        return "attended"

    def _attend_fused(self) -> str:
        add = self.nodes.add
        for make, new, name in (
            (self._make_values, "v_new", "values"),
            (self._make_keys, "k_new", "keys"),
        ):
            make()
            self._look_up(new, f"gathered {name}")
            add(name, "1 M N D", self.visible, [f"gathered {name}"])
        self._rotate(self._normalise("q"), "turned q", _HEADS_LAST)
        add("scaled q", _HEADS_LAST, self.k, ["turned q"])
        return self._run_kernel("attended", "scaled q", ["keys", "values"], self.visible)

    def _run_kernel(self, name: str, q: str, keys: list[str], visible: int) -> str:
        """Fused attention: the kernel lays out queries, keys and values for itself once more."""
        own = self.k, visible, visible
        self.nodes.add(name, _TOKENS, self.k, [q, *keys], own=own)
        return name

    def _attend_text(self) -> str:
        add = self.nodes.add
        self._tokens("text normal", "sum")
        self._project("text normal", "text q")
        q = self._normalise("text q")
        if self.fused:
            add("scaled text q", _HEADS_LAST, self.k, [q])
            texts = ["text keys", "text values"]
            return self._run_kernel("text attended", "scaled text q", texts, self.text)
        add("text q heads", _HEADS_FIRST, self.k, [q])
        add("text scores", "1 N K T", self.text_scores, ["text q heads"])
        add("text mixed", _HEADS_FIRST, self.k, ["text scores"])
        add("text attended", _HEADS_LAST, self.k, ["text mixed"])
        return "text attended"

    def _feed_forward(self) -> None:
        add = self.nodes.add
        self._tokens("ffn normal", "text sum")
        self._tokens("ffn scaled", "ffn normal", "1 + ffn scale")
        self._tokens("ffn shifted", "ffn scaled", "ffn shift")
        add("up", "1 K F", self.wide, ["ffn shifted"])
        add("gelu", "1 K F", self.wide, ["up"], own=[self.wide])
        self._project("gelu", "down")
        self._tokens("down gated", "down", "ffn gate")
        add("y", _TOKENS, self.k, ["down gated", "text sum"], kind=Kind.OUTPUT)
