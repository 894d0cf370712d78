"""Passes on a GPU, against those in ONNX Runtime: the stand-in computes with the same graphs.

What is shown is the control flow: order, addresses, events, recorded graphs, streamed weights. No
engine was executed by TensorRT here. Each planted fault has to be noticed.
"""

import re
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from stand_in_driver import StandInDriver
from stand_in_engines import open_stand_in

from mc_engines.building.bounds import VideoLimits
from mc_engines.building.library import BACKENDS
from mc_engines.device.arrays import Transfers
from mc_engines.device.cuda import Gpu, Stream
from mc_engines.device.device import Device
from mc_engines.device.engine import Context
from mc_engines.device.kernels import RowMover
from mc_engines.device.opening import DeviceOptions
from mc_engines.device.weights import ResidentWeights, StreamedWeights
from mc_engines.errors import EngineError
from mc_runtime import device_passes
from mc_runtime import pipeline as pipeline_module
from mc_runtime.device_passes import DevicePasses
from mc_runtime.options import GenerationOptions
from mc_runtime.passes import HostPasses
from mc_runtime.pipeline import VideoPipeline
from motioncache import Policy, make_policy
from motioncache.config import FIXED

COMPONENTS = "text_projection", "context", "embed", "block", "combine", "head", "motion"
OPTIONS = GenerationOptions(
    num_frames=37, height=32, width=32, num_inference_steps=8, ar_step=3, guidance_scale=3.0
)
TWO_WINDOWS = replace(OPTIONS, num_frames=57, base_num_frames=37)
RULE = {
    "threshold": 1.0,
    "coefficients": (1.0, 0.0),
    "warmup_steps": 1,
    "coarse_updates": 1,
    "vote_threshold": None,
    "min_update_ratio": 0.0,
    "weight_floor": 0.5,
}
BLOCK_OUTPUT = {"compat": replace(FIXED, latent_motion=False)}
POLICIES: dict[str, Callable[[], Policy | str]] = {
    "none": lambda: "none",
    "motion of latents": lambda: make_policy("motioncache", RULE),
    "motion of block output": lambda: make_policy(
        "motioncache", RULE | {"compat": replace(FIXED, latent_motion=False)}
    ),
    "extrapolation": lambda: make_policy("motioncache", RULE | {"extrapolation": 0.5}),
}


class FourLayers(Device):
    """The two layers of the tiny model, and twice as small ones after them."""

    def count_layers(self, component: str) -> int:
        return 4

    def load_weights(self, component: str, layer: int) -> dict[str, np.ndarray]:
        weights = super().load_weights(component, layer % 2)
        return {name: array / (1 + layer // 2) for name, array in weights.items()}


class OtherPasses(VideoPipeline):
    """A pipeline whose passes are given."""

    passes = None


class Setup:
    """A stand-in GPU with the tiny model on it, four layers of it, and both ways to run it."""

    def __init__(
        self,
        tiny: VideoPipeline,
        stream_weights: bool = False,
        eager: bool = False,
        most: int = 32,
        backend: str = "tensorrt-rtx",
        max_vram: int | None = None,
    ) -> None:
        self.driver = StandInDriver(eager=eager)
        self.tiny = tiny
        limits, budget = VideoLimits(most, most, 97, 5), 0 if stream_weights else max_vram
        given = tiny.bundle, self.driver, limits, COMPONENTS, backend, budget
        self.device = open_stand_in(*given, kind=FourLayers)
        config, runners = replace(tiny.transformer.config, layers=4), tiny.transformer.runners
        weights = self.device.open_weights("block", 0)
        self.passes = DevicePasses(config, self.device, runners["timestep"], weights)
        transformer = replace(
            tiny.transformer,
            config=config,
            buckets=config.token_buckets,
            block_weights=partial(self.device.load_weights, "block"),
            context_weights=partial(self.device.load_weights, "context"),
        )
        self.host = HostPasses(transformer)

    def generate(self, passes, policy: Policy | str, options: GenerationOptions = OPTIONS):
        """A run without frames."""
        pipeline = OtherPasses(self.tiny.bundle, self.tiny.threads)
        pipeline.passes = passes
        return pipeline.run("a red circle", policy=policy, options=options, decode=False)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("stream_weights", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_on_a_gpu_is_the_run_on_the_cpu(tiny, backend, policy, stream_weights, eager) -> None:
    setup = Setup(tiny, stream_weights, eager, backend=backend)
    video = setup.generate(setup.passes, POLICIES[policy](), TWO_WINDOWS)
    expected = setup.generate(setup.host, POLICIES[policy](), TWO_WINDOWS)
    assert setup.driver.faults == []
    np.testing.assert_allclose(video.latents, expected.latents, atol=2e-5)
    np.testing.assert_array_equal(video.trace.mode, expected.trace.mode)
    np.testing.assert_array_equal(video.trace.bucket, expected.trace.bucket)
    assert policy == "none" or video.trace.count()["reuse"] > 0
    assert (setup.driver.replays > 0) != stream_weights == setup.passes.streams_weights


def test_a_pass_waits_for_the_gpu_once(tiny) -> None:
    setup = Setup(tiny)
    passes = setup.passes
    waits, driver = [], setup.driver

    class Counting(DevicePasses):
        def read(self, *arguments):
            reading = super().read(*arguments)
            waits.append(driver.waits + driver.frees)
            return reading

    counting = Counting(passes.config, passes.device, passes.timestep, passes.weights)
    counting.timed = lambda clock: counting
    before = driver.waits
    video = setup.generate(counting, POLICIES["motion of block output"]())
    assert set(np.diff(waits)) == {1}
    prompts = 2 * (1 + passes.config.layers)  # text projection and context of both branches
    assert driver.waits - before == len(waits) + prompts
    counted = video.trace.count()
    assert len(waits) == counted["full"] + counted["partial"] + counted["reuse"]


def test_nothing_of_a_finished_window_stays_on_the_gpu(tiny) -> None:
    setup = Setup(tiny)
    setup.generate(setup.passes, "none")
    used = setup.driver.total - setup.driver.cuMemGetInfo()[1]
    setup.generate(setup.passes, "none")
    assert setup.driver.total - setup.driver.cuMemGetInfo()[1] == used


def test_a_window_takes_the_place_of_the_one_before(tiny) -> None:
    peaks = []
    for options in (OPTIONS, TWO_WINDOWS):
        setup = Setup(tiny)
        setup.generate(setup.passes, "none", options)
        peaks.append(setup.driver.peak)
    assert peaks[0] == peaks[1]


def test_a_window_is_forgotten_on_the_cpu_as_well(tiny) -> None:
    alive, opened = [], []

    class Watching(HostPasses):
        def open_branch(self, context, angles):
            alive.append(sum(branch() is not None for branch in opened))
            branch = super().open_branch(context, angles)
            opened.append(weakref.ref(branch))
            return branch

    setup = Setup(tiny)
    setup.generate(Watching(setup.host.transformer), "none", TWO_WINDOWS)
    assert alive == [0, 1, 0, 1]  # two branches in each window


def test_contexts_last_as_long_as_windows_of_their_size(tiny) -> None:
    setup, shorter = Setup(tiny), replace(OPTIONS, num_frames=17)
    videos, sizes = [], []
    for options in (OPTIONS, OPTIONS, shorter, OPTIONS):
        videos.append(setup.generate(setup.passes, "none", options))
        blocks = [key for key in setup.device._contexts if key[0] == "block"]
        sizes.append((len(blocks), {shapes for _, _, shapes in blocks}))
    assert sizes[0] == sizes[1] == sizes[3] and sizes[0][0] == 2  # one for each chunk
    assert sizes[2][0] == 1 and not sizes[2][1] & sizes[0][1]
    np.testing.assert_array_equal(videos[3].latents, videos[0].latents)
    assert setup.driver.faults == []


def test_another_branch_may_be_opened_before_a_pass_is_recorded(tiny, monkeypatch) -> None:
    setup, capture = Setup(tiny), Stream.capture

    def open_another_first(self, work):
        setup.device.unbind()
        return capture(self, work)

    monkeypatch.setattr(Stream, "capture", open_another_first)
    setup.generate(setup.passes, "none")
    assert setup.driver.replays > 0 and setup.driver.faults == []


def test_two_generations_at_once_do_not_meet(tiny) -> None:
    setup = Setup(tiny)
    options = [replace(OPTIONS, seed=seed, num_frames=17) for seed in (1, 2)]
    alone = [setup.generate(setup.passes, "none", each).latents for each in options]
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(partial(setup.generate, setup.passes, "none"), options))
    for video, expected in zip(both, alone, strict=True):
        np.testing.assert_allclose(video.latents, expected, atol=2e-5)
    assert setup.driver.faults == []


def test_threads_that_need_the_gpu_first_open_it_once(tiny, monkeypatch) -> None:
    setup, opened = Setup(tiny), []
    monkeypatch.setattr(pipeline_module, "list_components", lambda bundle, options: set())

    def open_slowly(bundle, options, components):
        opened.append(components)
        time.sleep(0.1)
        return setup.device

    monkeypatch.setattr(pipeline_module, "open_device", open_slowly)
    pipeline = VideoPipeline(tiny.bundle, 1)
    pipeline.use_device(DeviceOptions("tensorrt-rtx", VideoLimits(32, 32, 17, 5), "fp32"))
    with ThreadPoolExecutor(2) as pool:
        weights = list(pool.map(lambda _: pipeline.passes.weights, range(2)))
    assert len(opened) == 1 and weights[0] is weights[1]


def test_the_text_encoder_takes_weights_as_its_engine_does(tiny) -> None:
    setup = Setup(tiny)
    setup.device.engines["text_layer"] = setup.device.engines["block"]  # any; the norm has none
    setup.device._form = "bf16"
    pipeline = VideoPipeline(tiny.bundle, 1)
    vars(pipeline)["device"] = setup.device
    encoder = pipeline.text_encoder
    given = [encoder.layer_weights(0), encoder.norm_weights()]
    specs = tiny.bundle.graph("text_layer", "bf16"), tiny.bundle.graph("text_norm", "fp32")
    for weights, graph in zip(given, specs, strict=True):
        assert {name: array.dtype.name for name, array in weights.items()} == {
            spec.name: spec.dtype for spec in graph.weights
        }


def test_a_video_larger_than_the_profiles_is_refused(tiny) -> None:
    setup = Setup(tiny, most=16)
    with pytest.raises(EngineError, match=r"embed: 'patches': expected a shape .* Build it for"):
        setup.generate(setup.passes, "none")


def test_not_enough_memory_says_for_what_and_what_helps(tiny) -> None:
    setup = Setup(tiny)
    setup.driver.total -= setup.driver.cuMemGetInfo()[1] - 10_000
    angles = [(np.zeros((80, 32), np.float32),) * 2]
    message = r"GPU memory: expected .* MB for the keys \(1, .*, got 0.0 MB free .* Pass --max-vram"
    with pytest.raises(EngineError, match=message):
        setup.passes.open_branch([], angles)


def test_weights_are_streamed_where_they_do_not_fit_beside_what_the_run_keeps(tiny) -> None:
    bundle = tiny.bundle
    weights = 4 * sum(array.nbytes for array in bundle.layer_weights("block", 0, "fp32").values())
    # Keys and values of 17 frames, 5 latent ones of 2 x 2 tokens, and of the prompt; residuals.
    layers, dim = tiny.transformer.config.layers, tiny.transformer.config.dim
    text = bundle.manifest.config["text_encoder"]["max_tokens"]
    kept = 2 * 4 * dim * (2 * layers * (20 + text) + 20)
    for budget, streamed in ((weights + kept - 1, True), (weights + kept, False)):
        pipeline = VideoPipeline(bundle, 1)
        pipeline.use_device(DeviceOptions("tensorrt-rtx", VideoLimits(32, 32, 17, 5), "fp32"))
        vars(pipeline)["device"] = Setup(tiny, max_vram=budget).device  # engines for 97 frames
        assert pipeline.passes.streams_weights == streamed


def test_weights_that_do_not_fit_are_named_with_the_option_that_helps(tiny) -> None:
    setup = Setup(tiny, max_vram=1 << 40)
    assert not setup.passes.streams_weights
    setup.driver.total -= setup.driver.cuMemGetInfo()[1] - 10_000
    message = (
        r"GPU memory: expected 0\.\d MB for the weights of block, layer 1 of 4, got 0\.0 MB free "
        r"of \d+\. Pass --max-vram with less than is free, so that layers are streamed\."
    )
    with pytest.raises(EngineError, match=message):
        setup.device.open_weights("block", 0)


def test_not_finite_values_name_their_component(tiny, monkeypatch) -> None:
    setup = Setup(tiny)
    upload = Transfers.upload

    def spoil(self, array, target):
        spoilt = array.dtype == np.float32 and array.shape[1:2] == (6,)
        return upload(self, array * np.float32(np.nan) if spoilt else array, target)

    monkeypatch.setattr(Transfers, "upload", spoil)
    with pytest.raises(EngineError, match="block: expected finite values, got NaN"):
        setup.generate(setup.passes, "none")


# Faults: each patches something, and the run has to differ, or to fail.


def swap_layers(patch) -> None:
    use = ResidentWeights.use
    patch(ResidentWeights, "use", lambda self, layer: use(self, layer ^ 1))


def one_layer_for_all(patch) -> None:
    use = ResidentWeights.use
    patch(ResidentWeights, "use", lambda self, layer: use(self, 0))


def free_keys_too_early(patch) -> None:
    open_branch = DevicePasses.open_branch

    def forget(self, context, angles):
        branch = open_branch(self, context, angles)
        memory = branch.keys[0].memory
        branch.keys[0] = replace(branch.keys[0], memory=replace(memory))  # nobody keeps the block
        return branch

    patch(DevicePasses, "open_branch", forget)


def allocate_key_maps_anew(patch) -> None:
    recompute = DevicePasses._recompute

    def forget(self, branch, chunk, *arguments):
        branch.kv_maps.clear()  # what was recorded goes on reading them
        return recompute(self, branch, chunk, *arguments)

    patch(DevicePasses, "_recompute", forget)


def bind_once_and_never_again(patch) -> None:
    bind = Context.bind

    def once(self, inputs, weights, outputs):
        if not self._bound:
            bind(self, inputs, weights, outputs)

    patch(Context, "bind", once)


def stale_kv_map(patch) -> None:
    skip_second_upload(patch, lambda array, target: target.memory.purpose.startswith("a key map"))


def stale_rows(patch) -> None:
    skip_second_upload(patch, lambda array, target: array.dtype == np.int32 and array.size < 20)


def stale_modulation(patch) -> None:
    skip_second_upload(patch, lambda array, target: array.shape[1:2] == (6,))


def stale_head_modulation(patch) -> None:
    skip_second_upload(patch, lambda array, target: array.ndim == 2 and len(array) == 1)


def skip_second_upload(patch, chosen) -> None:
    upload, seen = Transfers.upload, set()

    def skip(self, array, target):
        if chosen(array, target) and target.address in seen:
            return target.reshape(*array.shape)
        seen.add(target.address)
        return upload(self, array, target)

    patch(Transfers, "upload", skip)


def name_no_new_keys(patch) -> None:
    patch(
        device_passes,
        "map_visible",
        lambda slots, renewed, visible: visible.astype(np.int32),
    )


def name_the_key_beside_it(patch) -> None:
    map_visible = device_passes.map_visible

    def shift(slots, renewed, visible):
        places = map_visible(slots, renewed, visible)
        return np.where(places < slots, np.maximum(places - 1, 0), places)

    patch(device_passes, "map_visible", shift)


def replay_another_buckets_graph(patch) -> None:
    run_blocks = DevicePasses._run_blocks

    def confuse(self, branch, kind, x):
        for recorded, graph in list(branch.graphs.items()):
            if recorded.chunk == kind.chunk and graph is not None:
                branch.graphs[kind] = graph
        run_blocks(self, branch, kind, x)

    patch(DevicePasses, "_run_blocks", confuse)


def pad_to_no_bucket(patch) -> None:
    bucket = DevicePasses.bucket

    def one_more(self, recomputed, tokens):
        size = bucket(self, recomputed, tokens)
        return size + (recomputed > 1 and size < tokens)

    patch(DevicePasses, "bucket", one_more)


def keep_no_keys(patch) -> None:
    move = RowMover.move

    def leave_out(self, stream, source, target, count, **rows):
        if not target.memory.purpose.startswith("the keys"):
            move(self, stream, source, target, count, **rows)

    patch(RowMover, "move", leave_out)


def write_keys_to_the_slot_beside(patch) -> None:
    move = RowMover.move

    def shift(self, stream, source, target, count, **rows):
        if "targets" in rows:
            slots = rows["targets"]
            rows["targets"] = replace(slots, offset=slots.offset + slots.dtype.itemsize)
        move(self, stream, source, target, count, **rows)

    patch(RowMover, "move", shift)


def do_not_gather_angles(patch) -> None:
    move = RowMover.move

    def first_rows(self, stream, source, target, count, **rows):
        angles = source.memory.purpose.startswith("a rotary")
        move(self, stream, source, target, count, **({} if angles else rows))

    patch(RowMover, "move", first_rows)


def read_before_the_gpu_is_done(patch) -> None:
    patch(Stream, "synchronise", lambda self: None)


def use_pinned_memory_again_at_once(patch) -> None:
    patch(Transfers, "_claim", lambda self, size: 0)


def record_before_the_first_run(patch) -> None:
    run_blocks = DevicePasses._run_blocks

    def record(self, branch, kind, x):
        branch.graphs.setdefault(kind, None)
        run_blocks(self, branch, kind, x)

    patch(DevicePasses, "_run_blocks", record)


def replay_another_chunks_graph(patch) -> None:
    run_blocks = DevicePasses._run_blocks

    def confuse(self, branch, kind, x):
        run_blocks(self, branch, kind, x)
        for recorded, graph in list(branch.graphs.items()):
            if (recorded.chunk, recorded.size) == (0, kind.size) and graph is not None:
                branch.graphs[kind] = graph

    patch(DevicePasses, "_run_blocks", confuse)


def free_while_recording(patch) -> None:
    capture = Stream.capture

    def forget(self, work):
        memory = [self.gpu.allocate(256, "a block", "")]

        def forget_and_work():
            memory.clear()
            work()

        return capture(self, forget_and_work)

    patch(Stream, "capture", forget)
    patch(Gpu, "_give_back", Gpu._free)  # at once


def one_context_for_all_shapes(patch) -> None:
    context_for, first = Device.context_for, {}

    def share(self, component, arrays):
        return first.setdefault(component, context_for(self, component, arrays))

    patch(Device, "context_for", share)


def share_a_graph_between_branches(patch) -> None:
    open_branch, shared = DevicePasses.open_branch, {}

    def share(self, context, angles):
        branch = open_branch(self, context, angles)
        branch.graphs = shared
        return branch

    patch(DevicePasses, "open_branch", share)


def keep_an_old_residual(patch) -> None:
    evaluate = DevicePasses.evaluate

    def keep(self, branch, chunk, x, rows, modulation):
        old = branch.residuals.get(chunk)
        out = evaluate(self, branch, chunk, x, rows, modulation)
        if old is not None:
            branch.residuals[chunk] = old
        return out

    patch(DevicePasses, "evaluate", keep)


def scratch_over_activations(patch) -> None:
    run_blocks = DevicePasses._run_blocks

    def overlap(self, branch, kind, x):
        for context in self.device._contexts.values():
            context._raw.scratch = x.address, 64
        run_blocks(self, branch, kind, x)

    patch(DevicePasses, "_run_blocks", overlap)


def start_motion_anywhere(patch) -> None:
    measure = DevicePasses._measure_motion

    def forget(self, out, frames, previous):
        change, last = measure(self, out, frames, previous)
        return change, out.last_rows(last.shape[1])  # no copy: the next pass writes over it

    patch(DevicePasses, "_measure_motion", forget)


def mix_up_the_prompts(patch) -> None:
    open_branch, first = DevicePasses.open_branch, []

    def mix(self, context, angles):
        first.append(context)
        return open_branch(self, first[0], angles)

    patch(DevicePasses, "open_branch", mix)


def compute_before_the_weights_are_there(patch) -> None:
    patch(Stream, "wait", lambda self, event: None)


def copy_over_weights_in_use(patch) -> None:
    patch(StreamedWeights, "done", lambda self, layer: None)


def fill_pinned_weights_too_early(patch) -> None:
    patch(Stream, "wait_on_host", lambda self, event: None)


def record_streamed_weights(patch) -> None:
    patch(StreamedWeights, "stay", True)


def give_no_number_for_motion(patch) -> None:
    read = DevicePasses.read

    def spoil(self, *arguments):
        reading = read(self, *arguments)
        motion = None if reading.motion is None else reading.motion * np.float32(np.nan)
        return replace(reading, motion=motion)

    patch(DevicePasses, "read", spoil)


def give_pinned_memory_back_too_early(patch) -> None:
    upload = Transfers.upload

    def forget(self, array, target):
        placed = upload(self, array, target)
        self._pinned, self._used = self.stream.gpu.allocate_host(len(self._pinned.bytes)), 0
        return placed

    patch(Transfers, "upload", forget)


DIFFERS, GONE, BEYOND = "differs", "illegal address", "a row beyond the array"
FAULTS = {  # and how each is noticed
    swap_layers: DIFFERS,
    one_layer_for_all: DIFFERS,
    free_keys_too_early: GONE,
    allocate_key_maps_anew: GONE,
    bind_once_and_never_again: "block: expected finite values",
    stale_kv_map: "cannot be computed: .* out of data bounds",
    stale_rows: DIFFERS,
    stale_modulation: DIFFERS,
    stale_head_modulation: DIFFERS,
    name_no_new_keys: DIFFERS,
    name_the_key_beside_it: DIFFERS,
    keep_no_keys: DIFFERS,
    write_keys_to_the_slot_beside: DIFFERS,
    do_not_gather_angles: DIFFERS,
    read_before_the_gpu_is_done: BEYOND,
    use_pinned_memory_again_at_once: BEYOND,
    record_before_the_first_run: "block: .* a shape was set while work is recorded",
    replay_another_chunks_graph: DIFFERS,
    replay_another_buckets_graph: DIFFERS,
    free_while_recording: "GPU: cuStreamEndCapture: .*INVALIDATED",
    one_context_for_all_shapes: "a context that is gone, or has run in other shapes",
    share_a_graph_between_branches: DIFFERS,
    keep_an_old_residual: DIFFERS,
    scratch_over_activations: DIFFERS,
    start_motion_anywhere: DIFFERS,
    mix_up_the_prompts: DIFFERS,
    give_no_number_for_motion: "motion: expected finite values",
    give_pinned_memory_back_too_early: "pinned memory at .* given back",
}
STREAMED = {
    compute_before_the_weights_are_there: DIFFERS,
    copy_over_weights_in_use: DIFFERS,
    fill_pinned_weights_too_early: (DIFFERS, "$"),  # copies that are early are right
    record_streamed_weights: DIFFERS,
}
FIXED_SIZES = {pad_to_no_bucket: "block: 'x': expected a shape from"}  # one profile per bucket


@pytest.fixture(scope="module")
def expected(tiny) -> np.ndarray:
    setup = Setup(tiny)
    return setup.generate(setup.host, POLICIES["motion of block output"]()).latents


def run_with_fault(setup: Setup, expected: np.ndarray) -> str:
    """What is wrong about a run: what a GPU would do wrong first, an error, or the result."""
    refused = ""
    try:
        video = setup.generate(setup.passes, POLICIES["motion of block output"]())
    except EngineError as error:
        refused = str(error)
    if setup.driver.faults:
        return setup.driver.faults[0]
    return refused or ("" if np.allclose(video.latents, expected, atol=1e-4) else DIFFERS)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(
    "fault", [*FAULTS, *STREAMED, *FIXED_SIZES], ids=lambda each: each.__name__
)
def test_a_planted_fault_is_noticed(tiny, expected, fault, eager, monkeypatch) -> None:
    backend = "tensorrt" if fault in FIXED_SIZES else "tensorrt-rtx"
    setup = Setup(tiny, fault in STREAMED, eager, backend=backend)
    kind = (FAULTS | STREAMED | FIXED_SIZES)[fault]
    with monkeypatch.context() as context:
        fault(context.setattr)
        noticed = run_with_fault(setup, expected)
    assert re.match(kind if isinstance(kind, str) else kind[eager], noticed, re.DOTALL), noticed


def test_a_layer_is_copied_while_the_one_before_is_computed(tiny, monkeypatch) -> None:
    """Queued before it, on another stream, and waited for by no one but its own layer."""
    setup = Setup(tiny, stream_weights=True)
    driver, compute = setup.driver, setup.device.stream.handle
    copying = setup.passes.weights._copy.handle
    copies, waited, computed = [], [0], []

    def watch(name, note):
        call = getattr(driver, name)

        def noting(*arguments):
            note(*arguments)
            return call(*arguments)

        monkeypatch.setattr(driver, name, noting)

    def record(event, stream):
        event.copies = len(copies) if stream is copying else 0

    def wait(stream, event, flags):
        waited.append(max(waited[-1], event.copies if stream is compute else 0))

    def copy(target, source, size, stream):
        copies.extend([size] if stream is copying else [])

    watch("cuMemcpyHtoDAsync", copy)
    watch("cuEventRecord", record)
    watch("cuStreamWaitEvent", wait)
    enqueue = Context.enqueue

    def note_block(self, stream):
        if "k_cache" in self.shapes:
            computed.append((len(copies), waited[-1]))
        enqueue(self, stream)

    monkeypatch.setattr(Context, "enqueue", note_block)
    setup.generate(setup.passes, "none")
    assert len(computed) > 40
    for number, (queued, last) in enumerate(computed, 1):
        assert queued >= number + 1 and last <= number


@pytest.mark.parametrize("streamed", [False, True])
def test_an_address_is_set_when_it_changes_and_not_before(tiny, monkeypatch, streamed) -> None:
    setup, count = Setup(tiny, streamed), {"set": 0, "changed": 0}
    bind, unbind = Context.bind, Context.unbind

    def note_bind(self, inputs, weights, outputs):
        raw, known = self._raw, vars(self).setdefault("known", {})
        if "set_tensor_address" not in vars(raw):
            put = raw.set_tensor_address

            def counting(name, address):
                count["set"] += 1
                return put(name, address)

            raw.set_tensor_address = counting
        for name, array in {**inputs, **weights, **outputs}.items():
            count["changed"] += known.get(name) != array.address
            known[name] = array.address
        bind(self, inputs, weights, outputs)

    def note_unbind(self):
        vars(self).pop("known", None)
        unbind(self)

    monkeypatch.setattr(Context, "bind", note_bind)
    monkeypatch.setattr(Context, "unbind", note_unbind)
    setup.generate(setup.passes, "none")
    assert count["set"] == count["changed"] > 0


def test_the_same_run_without_a_fault_differs_from_nothing(tiny, expected) -> None:
    for streamed in (False, True):
        setup = Setup(tiny, streamed)
        video = setup.generate(setup.passes, POLICIES["motion of block output"]())
        np.testing.assert_allclose(video.latents, expected, atol=2e-5)
