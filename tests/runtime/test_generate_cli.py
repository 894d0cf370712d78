"""mc-generate: what it asks the pipeline for, what it writes and says, and what a run leaves."""

import json
from dataclasses import fields
from types import SimpleNamespace
from typing import ClassVar

import av
import numpy as np
import pytest
from click.testing import CliRunner

from mc_engines.errors import McError
from mc_runtime import generate_cli
from mc_runtime.families.registry import FAMILIES
from mc_runtime.generate_cli import main
from mc_runtime.generation import Generation, Progress
from mc_runtime.options import Chunk, GenerationOptions
from mc_runtime.schedule import WAN_GRID
from motioncache import DecisionTrace, Preset, choose_policy, replay

CALIBRATED = Preset(
    "flowcache", "calibrated", {"threshold": 0.2, "coefficients": [1, 0]}, "calibrated", "here"
)
PRESETS = {CALIBRATED.key: CALIBRATED.to_json()}
MASKS = np.array([1, 1, 0, 0, 1, 0, -1, -1], np.int8).reshape(4, 1, 1, 2)
TRACE = DecisionTrace.from_masks(MASKS, frames=1, clean_pass=True)
SIZES = ("--height", "32", "--width", "48", "--num-frames", "57")
PROMPT = ("--prompt", "a bird")


class FakePipeline:
    """Stands at the seam: random chunks from the seed, and a note of what was asked for."""

    grid = WAN_GRID
    default_options = GenerationOptions()
    family = FAMILIES["skyreels"]
    calls: ClassVar[list] = []
    chunks = 3
    ends_with: BaseException | None = None

    def __init__(self, bundle, threads=None):
        self.bundle, self.threads = bundle, threads

    @classmethod
    def from_bundle(cls, path, threads=None):
        manifest = SimpleNamespace(model=None, presets=PRESETS)
        digest = f"{path.name:0<64}"
        return cls(SimpleNamespace(path=path, model_hash=digest, manifest=manifest), threads)

    def limit_video(self, options):
        """On the CPU no engine is chosen by it."""

    def find_policy(self, policy, options=()):
        if isinstance(policy, DecisionTrace):
            return replay(policy)
        return choose_policy(policy, options, "skyreels", None, PRESETS)

    def generate(self, *, options, callback, note, decode, **arguments):
        self.calls.append({"options": options, "threads": self.threads, "decode": decode})
        self.calls[-1] |= arguments
        note("prompt: expected at most 512 tokens, got 600. The last 88 were cut.")
        return Generation(TRACE, self._chunks(options, callback, decode))

    def _chunks(self, options, callback, decode):
        draw = np.random.default_rng(options.seed)
        shape = (16, 5, options.height // 8, options.width // 8)
        for index in range(self.chunks):
            callback(Progress(index + 1, 3, index, 3, 1.0))
            frames = np.zeros((20 if index else 17, options.height, options.width, 3), np.uint8)
            latents = draw.standard_normal(shape, np.float32)
            yield Chunk(index, 3, latents, frames if decode else None, 1.5, 0.5, {"full": 2})
        if self.ends_with is not None:
            raise self.ends_with


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(generate_cli, "VideoPipeline", FakePipeline)
    monkeypatch.setattr(FakePipeline, "calls", [])
    return FakePipeline


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def generate(*arguments, code=0, bundle="bundle"):
    result = CliRunner().invoke(main, [str(bundle), *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def refused(message, *arguments, code=2):
    assert generate(*arguments, code=code).stderr.endswith(message + "\n")
    assert not FakePipeline.calls


def count_frames(path):
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def latents_of(path):
    with np.load(path) as arrays:
        assert arrays.files == ["latents"]
        return arrays["latents"]


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_flags_and_defaults_are_those_of_the_options(fake, folder):
    generate(*PROMPT, "--save-latents", "out.npz")
    assert fake.calls[0]["options"] == GenerationOptions()
    flags = {option.opts[0] for option in main.params}
    assert {f"--{entry.name.replace('_', '-')}" for entry in fields(GenerationOptions)} <= flags


def test_the_size_that_the_model_was_trained_for_is_the_default(fake, folder, monkeypatch):
    monkeypatch.setattr(fake, "default_options", GenerationOptions(height=64, width=80))
    generate(*PROMPT, "--save-latents", "out.npz")
    generate(*PROMPT, "--save-latents", "other.npz", "--width", "96")
    sizes = [(call["options"].height, call["options"].width) for call in fake.calls]
    assert sizes == [(64, 80), (64, 96)]


def test_every_setting_reaches_the_pipeline(fake, folder):
    settings = {
        "num_frames": 57, "height": 32, "width": 48, "num_inference_steps": 7,
        "guidance_scale": 2.5, "flow_shift": 3.0, "fps": 16, "seed": 9, "ar_step": 2,
        "causal_block_size": 5, "base_num_frames": 77, "overlap_history": 37,
        "addnoise_condition": 0, "sigma_table": "skyreels", "first_sample": "copied",
    }  # fmt: skip
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    texts = ("--prompt", "a", "--negative-prompt", "b", "--threads", "2")
    generate(*flags, *texts, "--save-latents", "out.npz")
    call = fake.calls[0]
    assert call["options"] == GenerationOptions(**settings)
    asked = (call[name] for name in ("prompt", "negative_prompt", "threads", "decode"))
    assert (*asked, call["policy"].name) == ("a", "b", 2, False, "none")


def test_a_run_leaves_video_latents_and_record(fake, folder):
    result = generate(*PROMPT, *SIZES, "-o", "out.mp4", "--save-latents", "out.npz")
    assert names(folder) == {"out.mp4", "out.npz", "out.json"}
    assert count_frames("out.mp4") == 57
    assert latents_of("out.npz").shape == (16, 15, 4, 6)
    assert latents_of("out.npz").dtype == np.float32
    record = json.loads((folder / "out.json").read_text())
    assert (record["interrupted"], len(record["chunks"])) == (False, 3)
    assert result.stdout == "done: out.mp4, out.npz\n"
    assert result.stderr.splitlines() == [
        "prompt: expected at most 512 tokens, got 600. The last 88 were cut.",
        "Nothing is cached. Faster: --policy flowcache:calibrated",
        "first chunk after 1.5 s, 2 left",
        "chunk 2 of 3, 1.5 s, 1 left",
        "chunk 3 of 3, 1.5 s, 0 left",
    ]


def test_quiet_prints_nothing(fake, folder):
    assert generate(*PROMPT, *SIZES, "-o", "out.mp4", "--quiet").output == ""
    refused_again = generate(*PROMPT, *SIZES, "-o", "out.mp4", "--quiet", code=2)
    assert "out.mp4: expected a new file" in refused_again.stderr


def test_without_a_video_the_record_is_beside_the_latents(fake, folder):
    generate(*PROMPT, *SIZES, "--save-latents", "x.npz")
    assert names(folder) == {"x.npz", "x.json"}


def test_ctrl_c_keeps_the_finished_chunks(fake, folder, monkeypatch):
    monkeypatch.setattr(fake, "chunks", 2)
    monkeypatch.setattr(fake, "ends_with", KeyboardInterrupt())
    outputs = ("-o", "out.mp4", "--save-latents", "out.npz")
    result = generate(*PROMPT, *SIZES, *outputs, code=130)
    assert result.stdout == "interrupted after 2 chunks: out.mp4, out.npz\n"
    assert count_frames("out.mp4") == 37
    assert latents_of("out.npz").shape == (16, 10, 4, 6)
    record = json.loads((folder / "out.json").read_text())
    assert (record["interrupted"], len(record["chunks"])) == (True, 2)
    assert names(folder) == {"out.mp4", "out.npz", "out.json"}


def test_ctrl_c_before_the_first_chunk_leaves_nothing(fake, folder, monkeypatch):
    monkeypatch.setattr(fake, "chunks", 0)
    monkeypatch.setattr(fake, "ends_with", KeyboardInterrupt())
    outputs = ("-o", "out.mp4", "--save-latents", "out.npz")
    result = generate(*PROMPT, *SIZES, *outputs, code=130)
    assert result.stdout == "interrupted after 0 chunks: nothing to keep\n"
    assert names(folder) == set()


def test_a_failure_keeps_the_finished_chunks(fake, folder, monkeypatch):
    monkeypatch.setattr(fake, "ends_with", McError("block: NaN in chunk 3."))
    outputs = ("-o", "out.mp4", "--save-latents", "out.npz")
    result = generate(*PROMPT, *SIZES, *outputs, code=1)
    assert result.stderr.endswith("block: NaN in chunk 3.\n")
    assert count_frames("out.mp4") == 57
    assert latents_of("out.npz").shape == (16, 15, 4, 6)
    assert json.loads((folder / "out.json").read_text())["interrupted"] is True


def test_a_disk_that_fills_up_keeps_the_latents(fake, folder, monkeypatch):
    def write(writer, frames):
        raise OSError("out.mp4: expected a file that can be written, got: no space.")

    monkeypatch.setattr(generate_cli.VideoWriter, "write", write)
    outputs = ("-o", "out.mp4", "--save-latents", "out.npz")
    result = generate(*PROMPT, *SIZES, *outputs, code=1)
    assert result.stderr.endswith("out.mp4: expected a file that can be written, got: no space.\n")
    assert "Traceback" not in result.stderr
    assert names(folder) == {"out.npz", "out.json"}
    assert latents_of("out.npz").shape == (16, 5, 4, 6)


def test_outputs_are_checked_before_the_bundle_is_opened(fake, folder, monkeypatch):
    monkeypatch.setattr(fake, "from_bundle", None)
    refused("Error: Missing option '-o' or '--save-latents'. Name an output.", *PROMPT)
    (folder / "out.mp4").touch()
    exists = "expected a new file, got one that exists. Pass --overwrite."
    refused(f"out.mp4: {exists}", *PROMPT, "-o", "out.mp4")
    (folder / "b.json").touch()
    refused(f"b.json: {exists}", *PROMPT, "-o", "b.mp4")
    refused(
        f"no/x.mp4: expected an existing folder, got none. Run: mkdir -p {folder}/no",
        *PROMPT, "-o", "no/x.mp4",
    )  # fmt: skip


def test_a_missing_extra_is_found_before_the_bundle_is_opened(fake, folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    monkeypatch.setattr(fake, "from_bundle", None)
    message = "av: not installed. Run: pip install 'motioncache[video]'"
    refused(message, *PROMPT, "-o", "out.mp4", code=1)


def test_overwrite_replaces(fake, folder):
    for name in ("out.mp4", "out.json"):
        (folder / name).write_text("old")
    generate(*PROMPT, *SIZES, "-o", "out.mp4", "--overwrite")
    assert count_frames("out.mp4") == 57


def test_outputs_must_differ(fake, folder):
    own = "expected a file of its own, got another output or an input. Choose another name."
    refused(f"out.x: {own}", *PROMPT, "-o", "out.x", "--save-latents", "out.x")
    refused(f"out.json: {own}", *PROMPT, "-o", "out.mp4", "--save-latents", "out.json")
    np.savez("n.npz", noise=np.zeros((16, 5, 4, 6), np.float32))
    arguments = ("--latents", "n.npz", "--save-latents", "n.npz", "--overwrite")
    refused(f"n.npz: {own}", *PROMPT, *arguments)


def test_the_help_has_both_defaults_where_families_differ():
    text = " ".join(CliRunner().invoke(main, ["--help"]).stdout.split())
    assert "[default: (17; MAGI-1: 32)]" in text


def test_an_image_is_read_at_the_size_of_the_video(fake, folder):
    with av.open("x.png", "w", format="image2") as file:
        stream = file.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "rgb24"
        picture = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 200, np.uint8), "rgb24")
        file.mux(stream.encode(picture))
        file.mux(stream.encode())
    generate(*PROMPT, *SIZES, "--image", "x.png", "-o", "out.mp4")
    image = fake.calls[0]["image"]
    assert image.shape == (32, 48, 3) and (image == 200).all()


def test_latents_to_begin_with_give_height_and_width(fake, folder):
    latents = np.zeros((16, 7, 4, 6), np.float32)
    np.savez("start.npz", latents=latents)
    problem = "height: expected 32, which the latents have, got 64. Leave it out."
    start = "--prefix-latents", "start.npz"
    refused(problem, *PROMPT, *start, "--height", "64", "-o", "out.mp4")
    generate(*PROMPT, *start, "-o", "out.mp4")
    call = fake.calls[0]
    assert (call["options"].height, call["options"].width) == (32, 48)
    assert call["options"].num_frames == GenerationOptions().num_frames
    np.testing.assert_array_equal(call["prefix_latents"], latents)


@pytest.mark.parametrize(
    "flag", ["--video", "--image", "--prefix-latents", "--prompt-embeds", "--latents", "--repeat"]
)
def test_a_missing_input_is_wrong_usage(fake, folder, flag):
    text = generate(*PROMPT, "-o", "out.mp4", flag, "none", code=2).stderr
    assert f"Error: Invalid value for '{flag}': File 'none' does not exist." in text


def test_sizes_follow_from_the_noise(fake, folder):
    noise = np.ones((16, 10, 4, 6), np.float32)
    np.savez("n.npz", noise=noise)
    generate(*PROMPT, "--latents", "n.npz", "--save-latents", "out.npz", "--height", "32")
    options = fake.calls.pop()["options"]
    assert (options.num_frames, options.height, options.width) == (37, 32, 48)
    refused(
        "height: expected 32, which the latents have, got 64. Leave it out.",
        *PROMPT, "--latents", "n.npz", "--save-latents", "b.npz", "--height", "64",
    )  # fmt: skip


def test_noise_without_its_axes_is_refused(fake, folder):
    np.savez("n.npz", noise=np.zeros((1, 16, 5, 4, 6), np.float32))
    refused(
        "noise: expected float32 (16, frames, h, w), got float32 (1, 16, 5, 4, 6). "
        "Leave out axes of size 1.",
        *PROMPT, "--latents", "n.npz", "--save-latents", "b.npz",
    )  # fmt: skip


def test_an_array_that_is_missing_is_named(fake, folder):
    np.savez("e.npz", prompt_embeds=np.zeros((1, 3, 8), np.float32), other=np.zeros(1))
    missing = "got prompt_embeds, other. Add it to the file."
    refused(
        f"e.npz: expected an array 'negative_prompt_embeds', {missing}",
        "--prompt-embeds", "e.npz", "--save-latents", "b.npz",
    )  # fmt: skip
    refused(
        f"e.npz: expected an array 'noise', {missing}",
        *PROMPT, "--latents", "e.npz", "--save-latents", "b.npz",
    )  # fmt: skip
    generate("--prompt-embeds", "e.npz", "--save-latents", "b.npz", "--guidance-scale", "1")
    assert fake.calls[0]["prompt_embeds"].shape == (1, 3, 8)
    assert fake.calls[0]["negative_prompt_embeds"] is None


def damaged_npz():
    np.savez("whole.npz", noise=np.arange(1000.0))
    return open("whole.npz", "rb").read()[:-100]


@pytest.mark.parametrize(
    "content",
    [lambda: b"", lambda: b"text", damaged_npz, lambda: b"\x93NUMPY\x01\x00"],
    ids=["empty", "text", "cut", "npy"],
)
def test_what_is_no_npz_is_refused(fake, folder, content):
    (folder / "n.npz").write_bytes(content())
    arguments = (*PROMPT, "--latents", "n.npz", "--save-latents", "b.npz")
    text = generate(*arguments, code=2).stderr
    assert text.startswith("n.npz: expected an npz file, got: ")
    assert text.endswith(". Write it with numpy.savez.\n")


def test_a_lone_array_is_no_npz(fake, folder):
    np.save("n.npy", np.zeros(3))
    arguments = (*PROMPT, "--latents", "n.npy", "--save-latents", "b.npz")
    assert "n.npy: expected an npz file, got: " in generate(*arguments, code=2).stderr


def test_a_video_is_read_at_the_size_of_the_output(fake, folder):
    with generate_cli.VideoWriter(folder / "in.mp4", 24, 96, 96) as writer:
        writer.write(np.zeros((20, 96, 96, 3), np.uint8))
    generate(*PROMPT, *SIZES, "--video", "in.mp4", "--save-latents", "out.npz")
    assert fake.calls[0]["video"].shape == (17, 32, 48, 3)


def test_repeat_asks_for_the_same_again(fake, folder):
    np.savez("n.npz", noise=np.ones((16, 15, 4, 6), np.float32))
    settings = ("--seed", "5", "--flow-shift", "3", "--threads", "2", "--latents", "n.npz")
    generate(*PROMPT, *settings, "--negative-prompt", "b", "--save-latents", "a.npz")
    generate("--repeat", "a.json", "--save-latents", "b.npz")
    first, second = fake.calls
    np.testing.assert_array_equal(first.pop("latents"), second.pop("latents"))
    assert first == second
    assert (folder / "a.npz").read_bytes() == (folder / "b.npz").read_bytes()


def test_flags_win_over_a_record(fake, folder):
    np.savez("e.npz", prompt_embeds=np.zeros((1, 3, 8), np.float32))
    generate(
        "--prompt-embeds", "e.npz", "--guidance-scale", "1", "--seed", "5", "--fps", "16",
        "--save-latents", "a.npz",
    )  # fmt: skip
    generate("--repeat", "a.json", *PROMPT, "--seed", "0", "--save-latents", "b.npz")
    call = fake.calls[1]
    assert (call["prompt"], call["prompt_embeds"]) == ("a bird", None)
    assert (call["options"].seed, call["options"].fps) == (0, 16)
    generate("--repeat", "b.json", "--prompt-embeds", "e.npz", "--save-latents", "c.npz")
    assert fake.calls[2]["prompt"] is None
    assert fake.calls[2]["prompt_embeds"].shape == (1, 3, 8)


def test_repeat_on_another_bundle_is_refused(fake, folder):
    generate(*PROMPT, "--save-latents", "a.npz")
    text = generate("--repeat", "a.json", "--save-latents", "b.npz", bundle="c", code=2).stderr
    assert text == (
        "a.json: expected the bundle bundle000000, got c with c00000000000. "
        "Repeat the run on the bundle it used.\n"
    )


def test_golden_latents_need_neither_text_encoder_nor_vae(golden_case, folder):
    golden = golden_case("skyreels-a")
    options, inputs = golden.options, golden.checkpoint / "inputs.npz"
    names = "num_inference_steps flow_shift guidance_scale fps addnoise_condition"
    generate(
        *(f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names.split()),
        "--latents", inputs, "--prompt-embeds", inputs, "--threads", "1",
        "--save-latents", "out.npz", bundle=golden.pipeline.bundle.path,
    )  # fmt: skip
    error = abs(latents_of("out.npz") - golden.expected["latents_uncached"]).max()
    assert error <= 1e-3


def test_a_prompt_becomes_a_video_and_again_the_same(tiny_bundle, folder):
    size = ("--num-frames", "17", "--height", "32", "--width", "48", "--num-inference-steps", "2")
    size += ("--threads", "1")
    long = "bird " * 600
    outputs = ("-o", "a.mp4", "--save-latents", "a.npz")
    result = generate("--prompt", long, *size, *outputs, bundle=tiny_bundle)
    assert "prompt: expected at most 512 tokens, got " in result.stderr
    assert count_frames("a.mp4") == 17
    outputs = ("-o", "b.mp4", "--save-latents", "b.npz")
    generate("--repeat", "a.json", *outputs, bundle=tiny_bundle)
    for ending in ("mp4", "npz"):
        assert (folder / f"a.{ending}").read_bytes() == (folder / f"b.{ending}").read_bytes()


def test_policy_options_reach_the_policy_and_the_record(fake, folder):
    options = ("--policy-option", "threshold=0.5", "--policy-option", "compat=reference")
    generate(*PROMPT, "--policy", "flowcache:calibrated", *options, "--save-latents", "out.npz")
    config = fake.calls[0]["policy"].config
    assert (config.threshold, config.coefficients, config.compat) == (0.5, (1, 0), "reference")
    record = json.loads((folder / "out.json").read_text())
    assert (record["policy"], record["preset"]) == ("flowcache", "calibrated (changed)")
    generate("--repeat", "out.json", "--save-latents", "again.npz")
    assert fake.calls[1]["policy"].config == config


def test_a_single_option_wins_over_the_recorded_one(fake, folder):
    generate(*PROMPT, "--policy", "flowcache", "--save-latents", "out.npz")
    option = ("--policy-option", "threshold=0.7")
    generate("--repeat", "out.json", *option, "--save-latents", "again.npz")
    assert fake.calls[1]["policy"].config.threshold == pytest.approx(0.7)
    assert fake.calls[1]["policy"].config.coefficients == (1, 0)


def test_a_repeated_run_keeps_the_name_of_its_preset(fake, folder, monkeypatch):
    generate(*PROMPT, "--policy", "flowcache", "--save-latents", "out.npz")
    monkeypatch.setattr(f"{__name__}.PRESETS", {})
    generate("--repeat", "out.json", "--save-latents", "again.npz")
    assert fake.calls[1]["policy"].preset == "calibrated"


def test_a_trace_that_cannot_be_written_costs_nothing_else(fake, folder, monkeypatch):
    def fail(self, file):
        raise OSError("disk full")

    (folder / "t").write_text("the old one")
    monkeypatch.setattr(DecisionTrace, "write", fail)
    outputs = ("--trace", "t", "--save-latents", "out.npz", "--overwrite")
    generate(*PROMPT, *outputs, code=1)
    assert (folder / "t").read_text() == "the old one"
    assert {"out.npz", "out.json"} <= names(folder)


def test_another_policy_wins_over_the_recorded_options(fake, folder):
    generate(*PROMPT, "--policy", "flowcache", "--save-latents", "out.npz")
    generate("--repeat", "out.json", "--policy", "none", "--save-latents", "again.npz")
    assert fake.calls[1]["policy"].name == "none"


def test_a_trace_is_written_exactly_where_asked_and_replayed(fake, folder):
    generate(*PROMPT, "--trace", "t", "--save-latents", "out.npz")
    assert names(folder) == {"t", "t.jsonl", "out.npz", "out.json"}
    assert (DecisionTrace.load("t").recompute == MASKS).all()
    generate(*PROMPT, "--replay", "t", "--save-latents", "again.npz")
    assert fake.calls[1]["policy"].name == "replay"
    generate("--repeat", "again.json", "--save-latents", "third.npz")
    assert fake.calls[2]["policy"].name == "replay"
    generate("--repeat", "again.json", "--policy", "none", "--save-latents", "fourth.npz")
    assert fake.calls[3]["policy"].name == "none"


def test_a_trace_is_not_overwritten(fake, folder):
    (folder / "t.jsonl").touch()
    message = "t.jsonl: expected a new file, got one that exists. Pass --overwrite."
    refused(message, *PROMPT, "--trace", "t", "--save-latents", "out.npz")


def test_replay_and_policy_exclude_each_other(fake, folder):
    TRACE.save(folder / "t")
    message = "--replay forces what is recomputed. Leave --policy out."
    refused(message, *PROMPT, "--replay", "t", "--policy", "none", "--save-latents", "o.npz")


@pytest.mark.parametrize(
    ("distances", "shares", "said"),
    [
        ([np.nan, 0.1, 0.1], [1, 1, 1], "0% of the tokens were reused after the warm-up. The "),
        ([np.nan, 0.1, 0.1], [1, 0, 0], "100% of the tokens were reused after the warm-up. Hardly"),
        ([np.nan, 0.1, 0.1], [1, 0, 1], "50% of the tokens were reused after the warm-up.\n"),
    ],
)
def test_a_run_says_how_much_it_reused(fake, folder, monkeypatch, distances, shares, said):
    masks = np.array(shares, np.int8).reshape(3, 1, 1, 1)
    trace = DecisionTrace.from_masks(masks, frames=1, clean_pass=True)
    trace.distance[:, 0, 0] = distances
    monkeypatch.setattr(f"{__name__}.TRACE", trace)
    assert said in generate(*PROMPT, "--save-latents", "out.npz").stderr
