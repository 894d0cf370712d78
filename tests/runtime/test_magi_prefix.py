"""Continuing latents on MAGI-1, against the published loop written down once more, chunk by chunk.

The model is a toy of two layers in which everything shows that a pass is told: the latents, the
time, the row of the null caption, the text, and the keys of every chunk that is seen. The loop of
the original has one memory of keys for all branches, a window whose chunks are computed at once,
and overwrites the frames that a prefix gives before every pass. As it is written down here it gives
what the original's own code gives with this toy (SandAI-org/MAGI-1 6ff822e, video_generate.py and
forward_dispatcher, run on a CPU), in all cases within 6e-7.
"""

import re
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from magi_corrections import CONFIG, SCHEDULE, Field

from mc_runtime.families.magi_schedule import MagiOptions
from mc_runtime.families.magi_work import plan_uncached
from mc_runtime.families.registry import FAMILIES
from mc_runtime.generation import generate_chunks
from mc_runtime.inputs import Inputs
from mc_runtime.passes import WINDOW
from mc_runtime.patches import patchify
from mc_runtime.pipeline import VideoPipeline
from mc_runtime.run_plan import RunPlan
from mc_runtime.trace_report import list_chunks, report_page, summarise
from motioncache import DecisionTrace, Mode, make_policy, none

CHUNKS, SIZE, STEPS, TOLERANCE = 6, 6, 8, 2e-5
BASE = {
    "guidance_passes": 3,
    "guidance_timesteps": (0.0, 0.0217, 0.1, 0.3, 0.999),
    "history_guidance_scales": (1.5, 1.5, 1.5, 1.0, 1.0),
    "text_guidance_scales": (7.5, 7.5, 7.5, 0.0, 0.0),
    "nearly_clean_timestep": None,
}
MODELS = {
    "distilled": replace(SCHEDULE, num_inference_steps=STEPS),
    "base": replace(SCHEDULE, num_inference_steps=STEPS, distilled=False, **BASE),
    "every chunk seen": replace(
        SCHEDULE, num_inference_steps=STEPS, kv_ranges=(), clean_kv_range=None
    ),
}
# Latent frames: an image, parts of a chunk, whole chunks, and both.
PREFIXES = 0, 1, 4, 6, 8, 12, 23
TEXT = np.array([[[0.3], [-0.1]]], np.float32)
NULL = np.array([[[-0.6]]], np.float32)
SPECIAL = np.linspace(0.1, 2, 20, dtype=np.float32)[None, :, None]


def embed_condition(timestep, null_row, length):
    """What the toy makes of the condition; one number."""
    return np.sin(3 * timestep) + 0.2 * null_row + 0.01 * length


def make_keys(hidden, condition):
    """A number per token."""
    return hidden.mean(axis=-1) + condition


def attend(hidden, seen):
    """Add the mean of the keys that are seen."""
    return hidden + np.mean(seen)


def move(hidden, condition, text):
    """Velocity of every token: of what it has seen, its condition, and the text."""
    return np.tanh(hidden) * (1 + condition) + hidden / 4 + text


class Toy(Field):
    """The toy as `Passes`: keys are kept by branch."""

    encoded = 0

    @property
    def timestep(self):
        def run(inputs):
            length = inputs.get("distill", np.zeros(1))
            values = inputs["timesteps"], inputs["null_row"], length
            return {"modulation": embed_condition(*values)[:, None]}

        return SimpleNamespace(run=run)

    def encode_context(self, embedding):
        self.encoded += 1
        return float(embedding.mean())

    def open_branch(self, context, angles, capacity=None):
        return {}

    def recompute(self, branch, chunk, x, rows, modulation, view=WINDOW):
        condition = float(modulation.ravel()[0])
        keys = branch.setdefault(chunk, np.full((2, x.shape[1]), np.nan))
        hidden = x[0, rows]
        for layer in (0, 1):
            keys[layer, rows] = make_keys(hidden, condition)
            seen = np.concatenate([branch[other][layer] for other in view.chunks])
            hidden = attend(hidden, seen)
        return move(hidden, condition, view.context).astype(np.float32)[None]

    def copy_keys(self, source, target, chunk):
        target[chunk] = source[chunk].copy()


class Published:
    """The published loop, over whole windows."""

    def __init__(self, schedule, noise, prefix):
        self.schedule, self.prefix, self.video = schedule, prefix, noise.astype(np.float64)
        self.memories = {}, {}  # of both layers
        self.offset = prefix.shape[1] // SIZE
        self.lengths = 2 * STEPS / 4 if schedule.distilled else 0

    def forward(self, window, null_row, texts, ranges, keep):
        """Velocities of the chunks of a window, by chunk; their latents and times are given."""
        conditions = {
            chunk: embed_condition(time, null_row, self.lengths)
            for chunk, (_, time) in window.items()
        }
        hidden = {chunk: rows for chunk, (rows, _) in window.items()}
        for memory in self.memories:
            own = {chunk: make_keys(rows, conditions[chunk]) for chunk, rows in hidden.items()}
            known = memory | own
            if keep:
                memory.update(own)
            for chunk, rows in hidden.items():
                seen = [known[other] for other in range(*ranges[chunk])]
                hidden[chunk] = attend(rows, np.concatenate(seen))
        return {
            chunk: move(rows, conditions[chunk], texts[chunk]) for chunk, rows in hidden.items()
        }

    def read_chunk(self, chunk):
        """Rows of a chunk, with the frames of the prefix put in."""
        video = self.video
        given = min(self.prefix.shape[1], video.shape[1])
        video[:, :given] = self.prefix[:, :given]
        return patchify(video[:, chunk * SIZE : (chunk + 1) * SIZE], (1, 2, 2))[0].astype(float)

    def range_of(self, chunk, step):
        ranges, clean = self.schedule.kv_ranges, self.schedule.clean_kv_range
        if not ranges:
            return 0, chunk + 1
        size = clean if step == STEPS else ranges[step // (STEPS // len(ranges))]
        return max(0, chunk + 1 - size), chunk + 1

    def run(self):
        clean, null = self.schedule.clean_timestep, float(NULL.mean())
        main = self.schedule.guidance_passes == 1
        if self.offset:
            size = self.schedule.clean_kv_range or 8
            window = {chunk: (self.read_chunk(chunk), clean) for chunk in range(self.offset)}
            ranges = {chunk: (max(0, chunk + 1 - size), chunk + 1) for chunk in window}
            self.forward(window, 1 if main else 0, dict.fromkeys(window, null), ranges, True)
        for stage in range(self.offset, CHUNKS + 3):
            for index in range(STEPS // 4):
                self.take_row(stage, index)
        self.video[:, : self.prefix.shape[1]] = self.prefix
        return self.video

    def take_row(self, stage, index):
        first, null = max(self.offset, stage - 3), float(NULL.mean())
        steps = {
            chunk: (stage - chunk) * STEPS // 4 + index
            for chunk in range(first, min(CHUNKS, stage + 1))
        }
        captions = {chunk: caption_of(CHUNKS - chunk) for chunk in steps}
        if first > self.offset and index == 0:
            steps = {first - 1: STEPS} | steps
            captions[first - 1] = null
        times = [*self.schedule.timesteps[:-1], self.schedule.clean_timestep]
        window = {c: (self.read_chunk(c), float(times[step])) for c, step in steps.items()}
        ranges = {chunk: self.range_of(chunk, step) for chunk, step in steps.items()}
        nulls = dict.fromkeys(window, null)
        if self.schedule.guidance_passes == 1:
            velocity = self.forward(window, 1, captions, ranges, True)
            if window[first][1] > 0.3:
                alone = {first: (first, first + 1)}
                one = {first: window[first]}
                copy = self.forward(one, 1, captions, alone, False)[first]
                velocity[first] = 0.7 * velocity[first] + 0.3 * copy
        else:
            text = self.forward(window, 1, captions, ranges, False)
            history = self.forward(window, 0, nulls, ranges, True)
            velocity = {}
            for chunk in range(first, max(window) + 1):
                one, own = {chunk: window[chunk]}, {chunk: (chunk, chunk + 1)}
                alone = self.forward(one, 0, nulls, own, False)[chunk]
                p, q = (1.5, 7.5) if window[chunk][1] < 0.3 - 1e-7 else (1.0, 0.0)
                velocity[chunk] = (1 - p) * alone + (p - q) * history[chunk] + q * text[chunk]
        for chunk in range(first, max(window) + 1):
            rows, time = window[chunk]
            self.write_chunk(chunk, rows + velocity[chunk] * (self.after(steps[chunk]) - time))

    def after(self, step):
        return float(self.schedule.timesteps[step + 1])

    def write_chunk(self, chunk, rows):
        height, width = self.video.shape[2] // 2, self.video.shape[3] // 2
        grid = rows.reshape(SIZE, height, width, 2, 2).transpose(0, 1, 3, 2, 4)
        frames = slice(chunk * SIZE, (chunk + 1) * SIZE)
        self.video[0, frames] = grid.reshape(SIZE, 2 * height, 2 * width)


def caption_of(left):
    """The prompt behind two special tokens: chunks left, at most 8, and quality."""
    values = [SPECIAL[0, 6 + min(left, 8), 0], SPECIAL[0, 1, 0], *TEXT.ravel()]
    return float(np.mean(values, dtype=np.float32))


def draw(frames, seed):
    return np.random.default_rng(seed).standard_normal((1, frames, 4, 8)).astype(np.float32)


class Result(NamedTuple):
    """Latents chunk by chunk, and how they came about."""

    chunks: list
    trace: DecisionTrace
    plan: RunPlan
    model: Toy

    @property
    def latents(self):
        return np.concatenate(self.chunks, axis=1)


def generate(schedule, prefix, policy=None):
    """Generate a video of 6 chunks that begins with a prefix."""
    options = MagiOptions(24 * CHUNKS, 32, 64, STEPS)
    config = {
        "transformer": CONFIG["transformer"] | {"distilled": schedule.distilled},
        "schedule": asdict(schedule) | {"temporal_factor": 4},
    }
    family = FAMILIES["magi"]
    plan = family.plan(options, prefix.shape[1], family.grid(config), config)
    inputs = Inputs((TEXT, NULL, SPECIAL), draw(36, 0), prefix, options, config, "toy")
    run = plan, Toy(), None, policy or none(), lambda _: None
    generation = generate_chunks(family, inputs, *run)
    return Result([chunk.latents for chunk in generation], generation.trace, plan, run[1])


@pytest.mark.parametrize("frames", PREFIXES)
@pytest.mark.parametrize("model", MODELS)
def test_latents_are_those_of_the_published_loop(model, frames):
    prefix = draw(frames, 1)
    found = generate(MODELS[model], prefix)
    expected = Published(MODELS[model], draw(36, 0), prefix).run()
    assert [chunk.shape[1] for chunk in found.chunks] == [SIZE] * CHUNKS
    np.testing.assert_array_equal(found.latents[:, :frames], prefix)
    np.testing.assert_allclose(found.latents, expected, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("frames", PREFIXES)
@pytest.mark.parametrize("model", MODELS)
def test_the_work_of_a_continued_video_is_known_before_it(model, frames):
    found = generate(MODELS[model], draw(frames, 1))
    captions = found.trace.run["encoded_tokens"][:-1]
    planned = plan_uncached(MODELS[model], found.plan, captions, null=1)
    np.testing.assert_array_equal(planned.mode, found.trace.mode)
    left = CHUNKS - frames // SIZE  # chunks that are generated, whole or in part
    assert found.model.encoded == left + 1 == len(captions) + 1


def test_given_chunks_are_evaluated_clean_once_without_the_prompt():
    """Two are given and three are finished before the last, which is seen by nobody."""
    found = generate(MODELS["base"], draw(12, 1))
    clean = (found.trace.mode == Mode.CLEAN).any(axis=0)  # by branch: text, history, alone
    assert clean.tolist() == [
        [False, False, True, True, True, False],
        [True, True, True, True, True, False],
        [False] * CHUNKS,
    ]


@pytest.mark.parametrize("compat", ["fixed", "reference"])
def test_given_frames_stay_whatever_is_reused(compat):
    settings = {"threshold": 0.3, "chunk_threshold": 0.1, "warmup_steps": 1, "coarse_steps": 2}
    policy = make_policy("motioncache", settings | {"compat": compat}, "magi")
    prefix = draw(8, 1)
    found = generate(MODELS["distilled"], prefix, policy)
    np.testing.assert_array_equal(found.latents[:, :8], prefix)
    assert {Mode.REUSE, Mode.PARTIAL} & set(found.trace.mode[:, 0, 1].tolist())
    assert np.isfinite(found.latents).all()


def test_thresholds_of_zero_reuse_nothing():
    settings = {"threshold": 0.0, "chunk_threshold": 0.0, "warmup_steps": 1, "coarse_steps": 2}
    for model in MODELS.values():
        policy = make_policy("motioncache", settings, "magi")
        cached, uncached = (generate(model, draw(8, 1), each).latents for each in (policy, none()))
        np.testing.assert_array_equal(cached, uncached)


@pytest.mark.parametrize(
    ("model", "names"),
    [("base", ["text", "history", "uncond"]), ("distilled", ["main", "nearly clean"])],
)
def test_the_record_of_a_run_calls_its_branches_by_their_names(model, names):
    trace = generate(MODELS[model], draw(8, 1)).trace
    assert list(dict.fromkeys(line["branch"] for line in trace.lines())) == names
    heads, *_ = list_chunks(summarise(trace))
    assert heads[2:-1] == [f"recomputed, {name}" for name in names]
    assert "data:image/png" in report_page(trace, None)


class ToyPipeline(VideoPipeline):
    """The toy behind the interface that users see, with an encoder that averages pixels."""

    passes = Toy()

    def __init__(self):
        sizes = {"in_channels": 1, "text_dim": 1, "distilled": True}
        config = {
            "transformer": CONFIG["transformer"] | sizes,
            "schedule": asdict(MODELS["distilled"]) | {"temporal_factor": 4, "fps": 24},
            "video": {},
        }
        files = ("weights/null_text.safetensors",)
        manifest = SimpleNamespace(
            family="magi", config=config, files=files, model=None, presets={}
        )
        bundle = {"manifest": manifest, "model_hash": "toy", "path": "toy"}
        super().__init__(SimpleNamespace(map_tensors=lambda _: {"embedding": NULL[0]}, **bundle))
        self.encoded = []

    @property
    def encoder(self):
        return SimpleNamespace(encode=self.encode)

    def encode(self, frames):
        self.encoded.append(frames)
        cells = frames.mean(axis=3).reshape(len(frames) // 4, 4, 4, 8, 8, 8)
        return cells.mean(axis=(1, 3, 5))[None].astype(np.float32) / 255


SETTINGS = {"num_frames": 48, "height": 32, "width": 64, "num_inference_steps": STEPS}


def test_latents_of_a_run_are_continued():
    pipeline = ToyPipeline()
    run = partial(pipeline.run, prompt_embeds=TEXT, decode=False, note=[].append, **SETTINGS)
    first = run().latents
    second = run(prefix_latents=first[:, :8]).latents
    assert second.shape == first.shape == (1, 12, 4, 8)
    np.testing.assert_array_equal(second[:, :8], first[:, :8])
    assert np.abs(second[:, 8:] - first[:, 8:]).max() > 0.1
    message = "prefix_latents: expected float32 (1, n, 4, 8), got float32 (1, 12, 4, 7)."
    with pytest.raises(ValueError, match=re.escape(message)):
        run(prefix_latents=first[..., :7])


def test_an_image_is_a_latent_frame_and_of_a_video_the_last_whole_ones_are_taken():
    pipeline = ToyPipeline()
    run = partial(pipeline.run, prompt_embeds=TEXT, decode=False, note=[].append, **SETTINGS)
    video = np.random.default_rng(2).integers(0, 256, (45, 32, 64, 3), np.uint8)
    found = run(image=video[0]).latents
    (shown,) = pipeline.encoded
    np.testing.assert_array_equal(shown, np.stack([video[0]] * 4))
    np.testing.assert_array_equal(found[:, :1], pipeline.encode(shown))
    for given, taken in ((video, video[-32:]), (video[:15], video[3:15]), (video[:4], video[:4])):
        found = run(video=given).latents
        np.testing.assert_array_equal(pipeline.encoded[-1], taken)
        np.testing.assert_array_equal(found[:, : len(taken) // 4], pipeline.encode(taken))
    run(video=video, overlap_history=8)
    np.testing.assert_array_equal(pipeline.encoded[-1], video[-8:])
    for wrong, message in (
        ({"video": video[:3]}, "video: expected at least 4 frames, which make a latent frame, got"),
        ({"overlap_history": 6}, "overlap_history: expected a multiple of 4, got 6. Use 4 or 8."),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            run(**wrong)


def test_a_prefix_leaves_something_to_generate():
    generate(MODELS["distilled"], draw(35, 1))
    message = (
        "video to continue: expected fewer frames than num_frames (144), which counts them too, "
        "got 144. Cut it or raise num_frames."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        generate(MODELS["distilled"], draw(36, 1))
