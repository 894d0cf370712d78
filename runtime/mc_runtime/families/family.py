"""What a family of models is.

Neighbours: `registry` has the families; `VideoPipeline` and `generate_chunks` ask them.
"""

__all__ = ["Family", "Place", "Prompts", "Rehearsal", "Run", "Saving"]

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mc_engines.building.bounds import Bounds, VideoLimits
from mc_engines.published import Published
from mc_engines.run_sizes import Kept
from mc_runtime import vae
from mc_runtime.denoise import Steps, Window
from mc_runtime.flops import ModelFlops, Work
from mc_runtime.inputs import Inputs, NamedText, Prompt
from mc_runtime.passes import Passes, Values
from mc_runtime.run_plan import RunPlan
from mc_runtime.schedule import LatentGrid
from mc_runtime.schedule import Window as WindowPlan
from mc_runtime.text import clean_prompt
from mc_runtime.vae import Coding, Decoder, Encoder, VaeParts
from motioncache import Policy

Prompts = Callable[[Prompt, Prompt, RunPlan], Sequence[NamedText]]


class Run(Protocol):
    """A generation of a family: what its windows have in common."""

    def open_window(self, window: Window, cut: WindowPlan) -> Steps:
        """Begin a window: give the steps that are taken in it."""
        ...


@dataclass(frozen=True)
class Place:
    """Where in a run a pass is made.

    Attributes:
        name: For tables.
        chunk: Position in the window.
        seen: Chunks whose keys the pass sees, its own included.
        kept: Chunks whose keys its branch keeps at once.
    """

    name: str
    chunk: int
    seen: Sequence[int]
    kept: int


@dataclass(frozen=True)
class Rehearsal:
    """The passes of a run one by one, in any order and again and again, for those who time them.

    Attributes:
        places: Where passes differ in what they see.
        make: Makes a pass, from its branch, its place, the embedded chunk and the rows that are
            computed anew; none of them is what is left of it where a chunk is reused as a whole.
    """

    places: Sequence[Place]
    make: Callable[[Any, Place, Values, NDArray[np.intp]], None]


@dataclass(frozen=True)
class Saving:
    """Settings with which a run holds less memory.

    Attributes:
        words: What they do.
        settings: Fields of the options.
    """

    words: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """A family of models. `config` is always the manifest's.

    Attributes:
        name: As the manifest has it.
        defaults: From a config to the options of a run, at the size of video that the model was
            trained for where that is known. What fields they have is the family's.
        grid: From a config to what a latent and a token stand for.
        guided: From options to whether a negative prompt is used.
        continued: From the frames of a given video and the options to how many are continued.
        plan: From options, latent frames that are given, grid and config to the plan of the run;
            refuses, with ValueError, what cannot be generated.
        timesteps: From options and config to what the model is told in each step of a chunk.
        measures_inputs: Whether the distances of steps are measured on the embedded latents, so
            that they are not known before the run; else they are those of the modulation.
        prompts: From prompt and negative prompt to the texts that are encoded, under their names.
        clean: Cleans a prompt.
        pads_text: See `TextEncoder.padded`.
        open_decoder: From the parts of a bundle's autoencoder to its decoder; BundleError where the
            bundle has none.
        open_encoder: The same of its encoder.
        passes: From config, options and plan to a `Mode` for every pass of a run that skips
            nothing, shape (rows, branches, chunks).
        slots: From the same to the chunks whose keys each branch keeps at once, and to how many
            chunks something is kept of for reuse, counted by branch where each keeps its own.
        savings: From config, options and grid to kinds of settings with which a run holds less,
            each kind from the mildest on.
        published: From a published configuration to what a manifest would say of it.
        prompt_tokens: From a config to the tokens of its prompts, where nobody has one yet.
        table_tokens: Of each of the tables, as published.
        parallel_text: Whether blocks attend to the text beside the chunks, and not after them.
        limits: From options and config to the largest video that engines of a run have to take.
        kept: From config and the bounds of such a video to what a run keeps on a GPU; None where
            two branches keep keys and residuals of a whole window.
        not_yet: Commands that do not take bundles of the family yet.
        vanilla: From a model's operations, the plan and the text tokens of each branch to what the
            original loop takes; None where it computes what the policy `none` does.
        tables: Of the bundle, that a run takes besides the texts.
        describe: From config, options, plan and the tokens of its texts and tables to what a trace
            has to say of a run, for those who count its work (`Sight`).
        start: Begins a run, with a policy that has accepted its shape.
        rehearse: From what computes passes, options, the plan of a run and config to its passes.
        keeps_velocity: Whether a reused token keeps its velocity, so that the head runs for those
            that are recomputed alone; else it keeps the residual of the blocks.
        decoded: What the decoder codes at a time.
        encoded: What the encoder does.
    """

    name: str
    defaults: Callable[[Mapping[str, Any]], Any]
    grid: Callable[[Mapping[str, Any]], LatentGrid]
    guided: Callable[[Any], bool]
    continued: Callable[[int, Any], int]
    plan: Callable[[Any, int, LatentGrid, Mapping[str, Any]], RunPlan]
    timesteps: Callable[[Any, Mapping[str, Any]], NDArray[Any]]
    measures_inputs: bool
    prompts: Prompts
    describe: Callable[[Mapping[str, Any], Any, RunPlan, Sequence[int]], dict[str, Any]]
    start: Callable[[Inputs, RunPlan, Passes, Policy], Run]
    limits: Callable[[Any, Mapping[str, Any]], VideoLimits]
    rehearse: Callable[[Passes, Any, RunPlan, Mapping[str, Any]], Rehearsal]
    passes: Callable[[Mapping[str, Any], Any, RunPlan], NDArray[np.int8]]
    slots: Callable[[Mapping[str, Any], Any, RunPlan], tuple[tuple[int, ...], int]]
    savings: Callable[[Mapping[str, Any], Any, LatentGrid], Sequence[Sequence[Saving]]]
    published: Callable[[Published], dict[str, Any]]
    prompt_tokens: Callable[[Mapping[str, Any]], tuple[int, ...]]
    table_tokens: tuple[int, ...] = ()
    parallel_text: bool = False
    keeps_velocity: bool = False
    vanilla: Callable[[ModelFlops, RunPlan, Sequence[int]], Work] | None = None
    kept: Callable[[Mapping[str, Any], Mapping[str, Bounds]], Kept] | None = None
    tables: tuple[str, ...] = ()
    clean: Callable[[str], str] = clean_prompt
    pads_text: bool = True
    open_decoder: Callable[[VaeParts], Decoder] = vae.open_decoder
    open_encoder: Callable[[VaeParts], Encoder] = vae.open_encoder
    decoded: Coding = vae.DECODED
    encoded: Coding = vae.ENCODED
    not_yet: tuple[str, ...] = ()

    def require(self, what: str) -> None:
        """Refuse what does not take bundles of the family yet.

        Raises:
            ValueError: With what it is.
        """
        if what in self.not_yet:
            raise ValueError(
                f"{what}: expected a bundle of another family, got one of {self.name}, for which "
                "it is not there yet. Use mc-generate and mc-inspect on the CPU."
            )
