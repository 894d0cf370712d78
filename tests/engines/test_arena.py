"""What an arena keeps: by hand for small tapes, and the decoder read in three ways."""

import math
from dataclasses import replace

import pytest
import torch

from mc_engines.arena import Arena, Kind, Tape
from mc_engines.block_tape import record_block
from mc_engines.buffer_plan import Nodes
from mc_engines.decoder_tape import DecoderShape, record_decoder
from mc_engines.host_sizes import hold_blocks, hold_decoder, takes_fused
from mc_engines.published import WAN21_VAE
from mc_engines.run_sizes import WindowShape
from mc_export.random_source import RandomSource
from mc_export.wan_vae_components import vae_components, vae_tensors

MIB = 1 << 20


def tape_of(*events: tuple[str, int | None]) -> Tape:
    tape = Tape()
    for name, size in events:
        tape.give(name) if size is None else tape.take(name, size)
    return tape


def test_a_later_run_takes_one_block_beside_what_the_first_one_left() -> None:
    tape = tape_of(("x", 3 * MIB), ("y", 3 * MIB), ("x", None), ("z", 3 * MIB))
    tape.give("y", "z")
    assert (tape.live, tape.block) == (6 * MIB, 6 * MIB)  # z lies where x lay
    arena = Arena()
    arena.run(tape)  # x and y in regions of 4, z in x's place
    assert arena.resident == 6 * MIB
    arena = Arena()
    arena.run(tape, runs=2)  # the block in a region of 8
    assert arena.resident == (6 + 6) * MIB
    arena = Arena()
    arena.run(tape, runs=9)
    assert arena.resident == (6 + 6) * MIB


def test_a_hole_in_a_block_is_filled_by_what_fits_best() -> None:
    taken = zip("abcd", (4, 1, 2, 1), strict=True)
    tape = tape_of(*taken, ("a", None), ("c", None), ("e", 2))
    assert (tape.live, tape.block) == (8, 8)  # e in the hole of c, not in that of a


def test_a_piece_is_split_where_it_is_twice_as_large() -> None:
    """Of the first region, 1024 KiB, 400 are cut off and 500 lie behind them; freed, both join."""
    first = tape_of(("x", 400 << 10), ("y", 500 << 10), ("x", None), ("y", None))
    arena = Arena()
    arena.run(first)
    arena.run(tape_of(("z", 950 << 10), ("z", None)))
    assert arena.resident == 950 << 10


def test_outputs_and_what_a_kernel_takes_for_itself_are_not_in_the_block() -> None:
    tape = tape_of(("x", MIB))
    tape.take("own", 5 * MIB, Kind.SCRATCH)
    tape.give("own", "x")
    tape.take("y", 2 * MIB, Kind.OUTPUT)
    assert (tape.live, tape.block) == (6 * MIB, MIB)


def test_the_outputs_of_a_run_are_there_until_the_next_has_ended() -> None:
    tape = Tape()
    tape.take("y", 64 * MIB, Kind.OUTPUT)
    sizes = []
    for runs in (1, 2, 3):
        arena = Arena()
        arena.run(tape, runs)
        sizes.append(arena.resident // MIB)
    assert sizes == [64, 128, 128]


def test_a_region_is_doubled_until_what_is_asked_for_fits() -> None:
    arena = Arena()
    arena.run(tape_of(("a", 3 * MIB), ("b", 3 * MIB), ("c", 9 * MIB), ("d", 1500 * MIB)))
    assert [size // MIB for size in arena.regions] == [4, 4, 16, 2048]


def test_of_two_free_regions_of_a_size_the_newer_one_is_taken() -> None:
    """It has the lower address. A piece of it that nothing has touched yet becomes resident."""
    arena = Arena()
    arena.run(tape_of(("a", 4 * MIB), ("b", 3 * MIB), ("a", None), ("b", None)))
    assert [size // MIB for size in arena.regions] == [4, 4]
    arena.run(tape_of(("c", 4 * MIB), ("c", None)))
    assert arena.resident == (4 + 4) * MIB


def test_a_buffer_goes_to_the_next_tensor_of_its_shape_alone() -> None:
    nodes = Nodes()
    nodes.add("a", "K C", 2)
    nodes.add("b", "C K", 3, ["a"])
    nodes.add("c", "K C", 2, ["b"], own=[7])  # where a lay
    nodes.add("d", "C K", 3, ["c"], kind=Kind.OUTPUT)  # not where b lay
    assert nodes.record().events == [
        ("a", 2, Kind.PLANNED),
        ("b", 3, Kind.PLANNED),
        ("c, own 0", 7, Kind.SCRATCH),
        ("c, own 0", None, Kind.SCRATCH),
        ("b", None, Kind.PLANNED),
        ("d", 3, Kind.OUTPUT),
        ("a", None, Kind.PLANNED),
    ]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("config", [{"base_dim": 8, "num_res_blocks": 1}, {"base_dim": 4}])
def test_the_decoder_keeps_what_its_graph_gives_back(config: dict, first: bool) -> None:
    """Against the states that the module itself returns, for a latent frame of 4 by 6."""
    config = dict(WAN21_VAE) | config
    source = RandomSource(vae_tensors(config), torch.float32, seed=0)
    name = f"vae_decoder_{'first' if first else 'next'}"
    component = next(each for each in vae_components(config, source) if each.name == name)
    later = next(each for each in vae_components(config, source) if each.name == "vae_decoder_next")
    states = [tensor for key, tensor in later.inputs.items() if key.startswith("state")]
    shape = DecoderShape.from_config(config)
    sides = [(state.shape[1], state.shape[3] // states[0].shape[3]) for state in states]
    assert DecoderShape.from_states(sides) == shape
    assert [state[:2] for state in shape.states] == sides
    positions = math.prod(states[0].shape[3:])
    assert shape.state_values() * positions == sum(state.numel() for state in states)
    outputs = component.module(**component.inputs)
    tape = record_decoder(shape, positions, first)
    kept = {name: size for name, size, kind in tape.events if size and kind is Kind.OUTPUT}
    assert sum(kept.values()) == 4 * sum(output.numel() for output in outputs)
    assert outputs[0].shape[2] == (1 if first else 4)


WINDOW = WindowShape(4, 3, 192, 768, 320, 1600, text_tokens=24)


def test_every_chunk_takes_the_form_that_the_runtime_takes() -> None:
    """256 MB of scores, as `Transformer.recompute` counts them: 12 heads, four bytes each."""
    large = WindowShape(4, 12, 1536, 8960, 1020, 10 * 1020)
    forms = [takes_fused(large, 1020 * chunk) for chunk in range(1, 11)]
    assert forms == [chunk * 1020 * 1020 * 12 * 4 > 256_000_000 for chunk in range(1, 11)]
    plain, fused = hold_blocks(large)
    assert min(plain, fused) > 0
    assert hold_blocks(WINDOW)[1] == 0


def test_the_plain_form_holds_scores_and_the_fused_one_keys_four_times() -> None:
    row, keys = 192 * 4, 1600
    scores = 3 * 320 * keys * 4
    plain, fused = (record_block(WINDOW, keys, form).live for form in (False, True))
    # The cache joined with the new rows, what is gathered from it, and rows of the chunk: four of
    # the modulation, new keys and new values, three buffers that all later tokens go through and
    # one that heads do.
    assert plain == scores + (1600 + 320) * row + keys * row + 10 * 320 * row
    # The same with heads behind tokens, and the kernel's own queries.
    text = 2 * 24 * row  # keys and values of the prompt, laid out for the kernel
    assert fused == 4 * keys * row + 11 * 320 * row + text


@pytest.mark.parametrize("fused", [False, True])
def test_a_wide_feed_forward_is_held_before_and_behind_gelu_and_in_it(fused: bool) -> None:
    wide = replace(WINDOW, ffn_dim=100_000)
    # The gate, what is added to, two buffers that are kept for what comes, new keys and values.
    rows = 6 * 320 * 192 * 4
    assert record_block(wide, 1600, fused).live == 3 * 320 * 100_000 * 4 + rows


def test_more_steps_than_a_few_hold_no_more() -> None:
    shape = DecoderShape.from_config(dict(WAN21_VAE) | {"base_dim": 8})
    sizes = [hold_decoder(shape, 4, 6, steps, frames=20) for steps in (1, 2, 3, 9, 25)]
    arenas = [each.arenas for each in sizes]
    assert arenas[0] < arenas[1] < arenas[2] <= arenas[3] == arenas[4]
    assert sizes[0].frames == 3 * 20 * 3 * 32 * 48 * 4
