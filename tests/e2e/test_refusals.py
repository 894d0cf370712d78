"""What cannot be generated is refused before the work starts, with the way out."""

from dataclasses import replace

import numpy as np
import pytest

from mc_engines.errors import BundleError
from mc_runtime.options import GenerationOptions
from mc_runtime.pipeline import VideoPipeline
from motioncache import make_policy

OPTIONS = GenerationOptions(
    num_frames=37, height=32, width=32, num_inference_steps=2, base_num_frames=37
)
EMBEDS = np.zeros((1, 3, 48), np.float32)
LATENTS = np.zeros((16, 10, 4, 4), np.float32)
VIDEO = np.zeros((25, 32, 32, 3), np.uint8)
LONG_WARMUP = make_policy("flowcache", {"threshold": 0.1, "coefficients": (1.0, 0.0)})
SIZES_FOLLOW = "Its sizes follow from the model, num_frames, height and width."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "prompt: expected either prompt or prompt_embeds, got neither. Pass one of them."),
        (
            {"prompt": "a cat", "prompt_embeds": EMBEDS},
            "prompt: expected either prompt or prompt_embeds, got both. Pass one of them.",
        ),
        (
            {"prompt": "", "negative_prompt": "", "negative_prompt_embeds": EMBEDS},
            "negative_prompt: expected either negative_prompt or negative_prompt_embeds, got "
            "both. Pass one of them.",
        ),
        (
            {"prompt_embeds": EMBEDS[:, :, :40]},
            f"prompt_embeds: expected float32 (1, T, 48), got float32 (1, 3, 40). {SIZES_FOLLOW}",
        ),
        (
            {"prompt_embeds": EMBEDS[0]},
            f"prompt_embeds: expected float32 (1, T, 48), got float32 (3, 48). {SIZES_FOLLOW}",
        ),
        (
            {"prompt_embeds": EMBEDS, "negative_prompt_embeds": EMBEDS.astype(np.float16)},
            "negative_prompt_embeds: expected float32 (1, T, 48), got float16 (1, 3, 48). "
            f"{SIZES_FOLLOW}",
        ),
        (
            {"prompt": "a cat", "latents": LATENTS[:, :5]},
            f"latents: expected float32 (16, 10, 4, 4), got float32 (16, 5, 4, 4). {SIZES_FOLLOW}",
        ),
        (
            {"prompt": "a cat", "latents": LATENTS.astype(np.float64)},
            f"latents: expected float32 (16, 10, 4, 4), got float64 (16, 10, 4, 4). {SIZES_FOLLOW}",
        ),
        (
            {"prompt": "a cat", "image": VIDEO[0]},
            "video to continue: expected at least 17 frames, a chunk of 5 latent frames, got 1 "
            "latent frames. Pass a longer video.",
        ),
        (
            {"prompt": "a cat", "image": VIDEO[0, :16]},
            "image: expected uint8 (32, 32, 3), got uint8 (16, 32, 3). Resize the frames.",
        ),
        (
            {"prompt": "a cat", "image": VIDEO[0], "video": VIDEO},
            "video to continue: expected one of video, image, prefix_latents, got video and "
            "image. Pass one of them.",
        ),
        (
            {"prompt": "a cat", "prefix_latents": LATENTS[:, :5]},
            "prefix_latents: expected none, as of this model a first latent frame stands for 1 "
            "frame and any other for 4, got some. Pass the frames as video.",
        ),
        (
            {"prompt": "a cat", "video": VIDEO[:, :16]},
            "video: expected uint8 (n, 32, 32, 3), got uint8 (25, 16, 32, 3). Resize the frames.",
        ),
        (
            {"prompt": "a cat", "video": VIDEO / np.float32(255)},
            "video: expected uint8 (n, 32, 32, 3), got float32 (25, 32, 32, 3). Resize the frames.",
        ),
        (
            {"prompt": "a cat", "video": VIDEO[:0]},
            "video: expected uint8 (n, 32, 32, 3), got uint8 (0, 32, 32, 3). Resize the frames.",
        ),
        (
            {"prompt": "a cat", "video": VIDEO[:10]},
            "video to continue: expected at least 17 frames, a chunk of 5 latent frames, got 3 "
            "latent frames. Pass a longer video.",
        ),
        (
            {"prompt": "a cat", "video": VIDEO, "overlap_history": 18},
            "overlap_history: expected 4k + 1 frames from one chunk (17) to below base_num_frames "
            "(33), got 18. Use 17.",
        ),
        (
            {"prompt": "a cat", "video": VIDEO[:13]},
            "video to continue: expected at least 17 frames, a chunk of 5 latent frames, got 4 "
            "latent frames. Pass a longer video.",
        ),
        (
            {"prompt": "a cat", "video": VIDEO, "num_frames": 17},
            "num_frames: expected a count that fills whole chunks of 5 latent frames beyond the 5 "
            "given, got 17. Use 37.",
        ),
        (
            {"prompt": "a cat", "num_frames": 40},
            "num_frames: expected a count that fills whole chunks of 5 latent frames, got 40. "
            "Use 37 or 57.",
        ),
        (
            {"prompt": "a cat", "height": 40},
            "height: expected a multiple of 16, got 40. Use 32 or 48.",
        ),
        (
            {"prompt": "a cat", "num_inference_steps": 0},
            "num_inference_steps: expected a whole number, got 0. Use 1 to 1000.",
        ),
        (
            {"prompt": "a cat", "policy": "taylor"},
            "policy: expected one of none, teacache, flowcache, motioncache, got taylor. "
            "Write NAME or NAME:PRESET.",
        ),
        (
            {"prompt": "a cat", "policy": LONG_WARMUP},
            "warmup_steps: expected at most 1 with 2 steps, as steps 0 to warmup_steps are "
            "computed in full, got 4. Lower it or raise num_inference_steps.",
        ),
    ],
)
def test_a_wrong_argument_is_refused_before_any_work(tiny, monkeypatch, arguments, message):
    for name in ("encode_prompt", "generate_chunks"):
        monkeypatch.delattr(f"mc_runtime.pipeline.{name}")
    monkeypatch.setattr(tiny, "encoder", None)
    with pytest.raises(ValueError) as error:
        tiny.generate(options=OPTIONS, **arguments)
    assert str(error.value) == message


def test_an_unknown_setting_is_refused(tiny):
    with pytest.raises(TypeError, match="num_steps"):
        tiny.generate("a cat", num_steps=3)


def test_without_guidance_the_negative_prompt_is_not_needed(tiny):
    options = replace(OPTIONS, guidance_scale=1.0)
    video = tiny.run(prompt_embeds=EMBEDS, options=options, decode=False)
    assert video.latents.shape == LATENTS.shape


def test_another_family_is_refused(tiny):
    bundle = replace(tiny.bundle, manifest=replace(tiny.bundle.manifest, family="wan"))
    with pytest.raises(ValueError) as error:
        VideoPipeline(bundle)
    assert str(error.value) == (
        f"{bundle.path}: expected a bundle of the family skyreels or magi, got wan. "
        "Export a checkpoint of one of these."
    )


def test_a_bundle_of_the_transformer_alone_generates_latents(golden):
    assert golden.pipeline.bundle.manifest.missing == ("text_encoder", "tokenizer", "vae")
    video = golden.pipeline.run(options=golden.options, decode=False, **golden.inputs)
    assert video.frames is None
    assert video.latents.shape == golden.inputs["latents"].shape


@pytest.mark.parametrize(
    ("changed", "component"),
    [
        ({"decode": True}, "vae_decoder_first"),
        ({"prompt": "a cat", "prompt_embeds": None}, "text_layer"),
        ({"negative_prompt_embeds": None}, "text_layer"),
        ({"video": True}, "vae_encoder_first"),
    ],
)
def test_what_the_transformer_alone_cannot_do_is_said(golden_case, changed, component):
    case = golden_case("skyreels-a")
    arguments = {"decode": False, **case.inputs, **changed}
    if "video" in changed:
        size = (25, case.options.height, case.options.width, 3)
        arguments["video"] = np.zeros(size, np.uint8)
    with pytest.raises(BundleError) as error:
        case.pipeline.generate(options=case.options, **arguments)
    assert str(error.value) == (
        f"{case.pipeline.bundle.path}: expected component '{component}', got none. Its checkpoint "
        "lacked text_encoder and tokenizer and vae: export again from one that has it."
    )
