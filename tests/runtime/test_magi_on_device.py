"""MAGI-1 on a GPU, against ONNX Runtime: the stand-in computes with the same graphs.

As in `test_device_passes`, what is shown is the control flow. Here it is that of passes which see a
part of the window, in a ring of slots, with a text of their own, and whose tokens keep velocities.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from stand_in_driver import StandInDriver
from stand_in_engines import open_stand_in

from mc_engines.building.bounds import VideoLimits
from mc_engines.device.opening import DeviceOptions
from mc_engines.errors import EngineError
from mc_runtime import device_branch
from mc_runtime.bench.backends import Backend
from mc_runtime.bench.sweep import list_cases
from mc_runtime.device_passes import DevicePasses, list_required
from mc_runtime.passes import HostPasses
from mc_runtime.pipeline import VideoPipeline

GOLDEN = Path(__file__).parent.parent / "golden"
POLICIES = "none", "motioncache"
THRESHOLDS = {"magi-a": (0.08, 0.04), "magi-b": (0.4, 0.2)}  # of tokens and of chunks
FRAMES = {"magi-a": 144, "magi-b": 96}  # 6 chunks, of which 5 are kept; 4, with three branches


class GivenPasses(VideoPipeline):
    """A pipeline whose passes are given."""

    passes = None


class Setup:
    """A stand-in GPU with a golden case's model on it, and both ways to run it."""

    def __init__(self, case: str, bundle: Path) -> None:
        self.pipeline = GivenPasses.from_bundle(bundle, threads=1)
        tokens, chunks = THRESHOLDS[case]
        rule = {
            "threshold": tokens,
            "chunk_threshold": chunks,
            "warmup_steps": 1,
            "coarse_steps": 3,
        }
        self.rule = [f"{name}={value}" for name, value in rule.items()]
        self.options = replace(
            self.pipeline.default_options, num_frames=FRAMES[case], num_inference_steps=12
        )
        self.embedding = np.load(GOLDEN / case / "inputs.npz")["caption_embs"][0]
        transformer = self.pipeline.transformer
        buckets = transformer.config.token_buckets
        self.host = HostPasses(replace(transformer, buckets=buckets))

    def open(self, stream_weights=False, eager=False, backend="tensorrt-rtx") -> DevicePasses:
        """Passes with engines that are no larger than `mc-generate` asks for."""
        self.driver = StandInDriver(eager=eager)
        bundle, limits = self.pipeline.bundle, self.pipeline.limit_video(self.options)
        budget = 0 if stream_weights else None
        given = bundle, self.driver, limits, list_required(bundle), backend, budget
        device, transformer = open_stand_in(*given), self.host.transformer
        timestep, weights = transformer.runners["timestep"], device.open_weights("block", 0)
        return DevicePasses(transformer.config, device, timestep, weights)

    def generate(self, passes, policy: str):
        self.pipeline.passes = passes
        chosen = self.pipeline.find_policy(policy, [] if policy == "none" else self.rule)
        given = {"prompt_embeds": self.embedding, "note": lambda _: None, "decode": False}
        return self.pipeline.run(policy=chosen, options=self.options, **given)


@pytest.fixture(scope="module")
def setups(export) -> dict[str, Setup]:
    return {case: Setup(case, export(GOLDEN / case, "magi")) for case in FRAMES}


@pytest.fixture(scope="module")
def expected(setups):
    """Runs in ONNX Runtime."""
    return {
        (case, policy): setup.generate(setup.host, policy)
        for case, setup in setups.items()
        for policy in POLICIES
    }


@pytest.mark.parametrize(
    ("backend", "stream_weights", "eager"),
    [
        ("tensorrt-rtx", False, False),
        ("tensorrt-rtx", False, True),
        ("tensorrt-rtx", True, False),
        ("tensorrt", False, False),
    ],
)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", FRAMES)
def test_a_run_on_a_gpu_is_the_run_on_the_cpu(
    setups, expected, case, policy, backend, stream_weights, eager
) -> None:
    setup, cpu = setups[case], expected[case, policy]
    video = setup.generate(setup.open(stream_weights, eager, backend), policy)
    assert setup.driver.faults == []
    np.testing.assert_allclose(video.latents, cpu.latents, atol=2e-5)
    np.testing.assert_array_equal(video.trace.mode, cpu.trace.mode)
    np.testing.assert_array_equal(video.trace.bucket, cpu.trace.bucket)
    counted = video.trace.count()
    assert policy == "none" or min(counted["reuse"], counted["partial"]) > 0
    assert (setup.driver.replays > 0) != stream_weights


def test_nothing_of_a_finished_run_stays_on_the_gpu(setups) -> None:
    setup = setups["magi-b"]
    passes, used = setup.open(), []
    for _ in range(2):
        setup.generate(passes, "none")
        used.append(setup.driver.total - setup.driver.cuMemGetInfo()[1])
    assert used[0] == used[1]


@pytest.mark.parametrize("case", FRAMES)
def test_weights_are_streamed_where_they_do_not_fit_beside_what_the_run_keeps(setups, case) -> None:
    setup = setups[case]
    bundle, options = setup.pipeline.bundle, replace(setup.options, num_frames=96)
    config, weights = setup.host.config, bundle.layer_weights("block", 0, "fp32").values()
    # Of a window of 4 chunks each branch keeps all; of texts there are 8 captions, and the null.
    branches, tokens, text = {"magi-a": 2, "magi-b": 3}[case], 4 * 6 * 4 * 6, 9 * 64
    row = 2 * 4 * config.key_heads * config.head_dim
    kept = config.layers * row * (branches * tokens + text)
    size = config.layers * sum(array.nbytes for array in weights)
    for budget, streamed in ((size + kept - 1, True), (size + kept, False)):
        pipeline = VideoPipeline(bundle, 1)
        limits = pipeline.limit_video(options)
        pipeline.use_device(DeviceOptions("tensorrt-rtx", limits, "fp32"))
        given = bundle, StandInDriver(), limits, list_required(bundle), "tensorrt-rtx", budget
        vars(pipeline)["device"] = open_stand_in(*given)
        assert pipeline.passes.streams_weights == streamed


@pytest.mark.parametrize("case", FRAMES)
def test_every_pass_that_is_timed_is_made_there(setups, case) -> None:
    setup = setups[case]
    setup.pipeline.passes = setup.open()
    backend = Backend("tensorrt-rtx", setup.pipeline, "fp32")
    cases = list_cases(backend, setup.options, ["block", "embed", "context"])
    for _ in range(3):  # plainly, recorded and replayed
        for timed in cases:
            timed.run()
    assert setup.driver.replays and setup.driver.faults == []


@pytest.mark.parametrize(
    ("frames", "kept"), [(24, 24), (96, 96), (120, 120), (144, 120), (240, 120)]
)
def test_engines_have_room_for_what_a_branch_keeps(setups, frames, kept) -> None:
    """Stages see 5, 4, 3 and 2 chunks, a finished chunk itself: 4 active ones, and one more."""
    setup = setups["magi-a"]
    limits = setup.pipeline.limit_video(replace(setup.options, num_frames=frames))
    assert limits == VideoLimits(64, 96, kept, 6)


# Faults: each patches something, and the run has to differ, or to fail.


def change_view(patch, change) -> None:
    recompute = DevicePasses._recompute

    def see(self, branch, chunk, x, rows, modulation, view):
        return recompute(self, branch, chunk, x, rows, modulation, change(chunk, view))

    patch(DevicePasses, "_recompute", see)


def see_one_chunk_less(patch) -> None:
    change_view(
        patch,
        lambda chunk, view: replace(view, chunks=[*view.chunks][min(1, len(view.chunks) - 1) :]),
    )


def see_as_far_as_the_first_stage(patch) -> None:
    change_view(
        patch, lambda chunk, view: replace(view, chunks=range(max(0, chunk - 3), chunk + 1))
    )


def see_the_text_of_the_branch(patch) -> None:
    change_view(patch, lambda chunk, view: replace(view, context=None))


def turn_the_ring_too_early(patch) -> None:
    list_slots = device_branch.list_slots
    patch(
        device_branch,
        "list_slots",
        lambda chunks, capacity, tokens: list_slots(chunks, capacity - 1, tokens),
    )


def replay_another_ranges_graph(patch) -> None:
    run_blocks, first = DevicePasses._run_blocks, {}

    def confuse(self, branch, kind, x):
        alike = first.setdefault((id(branch), kind.chunk, kind.size, kind.context), kind)
        run_blocks(self, branch, alike, x)

    patch(DevicePasses, "_run_blocks", confuse)


def replay_another_texts_graph(patch) -> None:
    run_blocks, first = DevicePasses._run_blocks, {}

    def confuse(self, branch, kind, x):
        alike = first.setdefault((id(branch), kind.size, kind.visible), kind.context)
        run_blocks(self, branch, kind._replace(context=alike), x)

    patch(DevicePasses, "_run_blocks", confuse)


def copy_keys_to_the_chunk_before(patch) -> None:
    copy_keys = DevicePasses.copy_keys

    class Shifted:
        def __init__(self, branch) -> None:
            self._branch = branch

        def __getattr__(self, name):
            return getattr(self._branch, name)

        def slots(self, chunk):
            return self._branch.slots(max(0, chunk - 1))

    patch(
        DevicePasses,
        "copy_keys",
        lambda self, source, target, chunk: copy_keys(self, source, Shifted(target), chunk),
    )


def copy_keys_the_other_way(patch) -> None:
    copy_keys = DevicePasses.copy_keys
    patch(
        DevicePasses,
        "copy_keys",
        lambda self, source, target, chunk: copy_keys(self, target, source, chunk),
    )


def copy_no_keys(patch) -> None:
    patch(DevicePasses, "copy_keys", lambda *_: None)


def read_the_velocity_before(patch) -> None:
    read, before = DevicePasses.read, {}

    def stale(self, out, *rest):
        reading = read(self, out, *rest)
        previous = before.get(out.shape, reading)
        before[out.shape] = reading
        return previous

    patch(DevicePasses, "read", stale)


def measure_the_latents_before(patch) -> None:
    to_host, before = DevicePasses.to_host, []

    def stale(self, values):
        before.append(to_host(self, values))
        return before[max(0, len(before) - 2)]

    patch(DevicePasses, "to_host", stale)


FAULTS = {
    see_one_chunk_less: "magi-a",
    see_as_far_as_the_first_stage: "magi-a",
    see_the_text_of_the_branch: "magi-a",
    turn_the_ring_too_early: "magi-a",
    replay_another_ranges_graph: "magi-a",
    replay_another_texts_graph: "magi-a",
    read_the_velocity_before: "magi-a",
    measure_the_latents_before: "magi-a",
    copy_keys_to_the_chunk_before: "magi-b",
    copy_keys_the_other_way: "magi-b",
    copy_no_keys: "magi-b",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda each: each.__name__)
def test_a_planted_fault_is_noticed(setups, expected, fault, monkeypatch) -> None:
    case = FAULTS[fault]
    setup, cpu = setups[case], expected[case, "motioncache"]
    with monkeypatch.context() as context:
        fault(context.setattr)
        try:
            video = setup.generate(setup.open(), "motioncache")
        except EngineError:
            return
    assert setup.driver.faults or not np.allclose(video.latents, cpu.latents, atol=1e-4)
