"""What a run holds in ONNX Runtime's arenas on the CPU.

Neighbours: `block_tape`, `decoder_tape` and `arena`, which this drives as `Transformer` and
`VaeDecoder` drive the graphs; `mc-bench predict` and `mc-export --dry-run` tell.
"""

__all__ = ["DecoderSizes", "hold_blocks", "hold_decoder", "takes_fused"]

from dataclasses import dataclass

from mc_engines.arena import Arena
from mc_engines.block_tape import record_block
from mc_engines.decoder_tape import DecoderShape, record_decoder
from mc_engines.onnxruntime_runner import FUSED_ATTENTION_BYTES
from mc_engines.run_sizes import WindowShape


def hold_blocks(shape: WindowShape) -> tuple[int, int]:
    """Say what the arenas of the two forms of the block hold after full passes of every chunk.

    Args:
        shape: Of the model and the window; each chunk sees its own keys and those before it.

    Returns:
        Bytes of the form that writes its scores and of that with fused attention; 0 where no chunk
        takes it.
    """
    arenas = {False: Arena(), True: Arena()}
    for keys in range(shape.chunk_tokens, shape.window_tokens + 1, shape.chunk_tokens):
        fused = takes_fused(shape, keys)
        arenas[fused].run(record_block(shape, keys, fused), shape.layers * shape.branches)
    return arenas[False].resident, arenas[True].resident


def takes_fused(shape: WindowShape, keys: int) -> bool:
    """Say whether a full pass with so many visible keys takes the form with fused attention."""
    return 4 * shape.heads * shape.chunk_tokens * keys > FUSED_ATTENTION_BYTES


@dataclass(frozen=True)
class DecoderSizes:
    """What decoding a chunk holds.

    Attributes:
        arenas: Of the two graphs of the decoder, with the states between steps.
        frames: Pixels of a chunk in float32: decoded, scaled and clipped.
    """

    arenas: int
    frames: int


def hold_decoder(
    shape: DecoderShape, height: int, width: int, steps: int, frames: int
) -> DecoderSizes:
    """Say what decoding holds.

    Args:
        shape: Of the decoder.
        height: Latents along the height.
        width: Latents along the width.
        steps: Of the whole video, which are its latent frames.
        frames: Pixel frames of a chunk.

    Returns:
        The sizes.
    """
    first, later = Arena(), Arena()
    first.run(record_decoder(shape, height * width, first=True))
    if steps > 1:
        later.run(record_decoder(shape, height * width, first=False), steps - 1)
    sides = (2 ** (len(shape.levels) - 1)) ** 2
    pixels = 3 * 4 * frames * height * width * sides
    return DecoderSizes(first.resident + later.resident, 3 * pixels)
