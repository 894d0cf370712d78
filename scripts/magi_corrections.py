"""Print what `compat="fixed"` mends of the published cache of MAGI-1, in figures of no model.

The loop runs the published job, 7 chunks of 64 steps, but the transformer is a stand-in whose
velocity is 1 everywhere, so that every token should travel from x to x + 1 whatever is computed
when. The stand-in writes down what each pass sees. docs/decisions/010 has the table.

    python scripts/magi_corrections.py
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mc_runtime.families.magi_schedule import MagiOptions, MagiSchedule
from mc_runtime.families.registry import FAMILIES
from mc_runtime.generation import generate_chunks
from mc_runtime.inputs import Inputs
from mc_runtime.passes import WINDOW, Reading, View
from mc_runtime.patches import patchify
from mc_runtime.rope import BandRope
from mc_runtime.run_plan import RunPlan
from motioncache import DecisionTrace, Policy, make_policy, replay
from motioncache.config import MAGI_FIXED, MAGI_REFERENCE, Compat, MagiSwitches

# MAGI-1 4.5B, distilled: SandAI-org/MAGI-1 6ff822e, example/4.5B/4.5B_distill_config.json, with
# the range that MotionCache's own config/sample/vbench.json has.
SCHEDULE = MagiSchedule(
    num_inference_steps=64, window_chunks=4, chunk_frames=6, kv_ranges=(5, 4, 3, 2),
    clean_kv_range=1, clean_timestep=0.9999, guidance_passes=1, guidance_timesteps=(0.0,),
    history_guidance_scales=(1.5,), text_guidance_scales=(7.5,), nearly_clean_timestep=0.3,
    shortcut_mode="8,16,16", distilled=True, max_text_tokens=800,
)  # fmt: skip
CONFIG: dict[str, Any] = {
    "transformer": {"distilled": True, "max_text_tokens": 800, "patch_size": (1, 2, 2)},
    "schedule": asdict(SCHEDULE) | {"temporal_factor": 4},
}
OPTIONS = MagiOptions(num_frames=168, height=16, width=32)  # 7 chunks of 6 * 1 * 2 tokens
FULL, FINE = 5, 25  # the first steps after the published warm-up and coarse phase
INTERVALS = {2: "second", 3: "third", 4: "fourth"}
BOTH = MAGI_REFERENCE, MAGI_FIXED
NEVER = 1e9  # a threshold that nothing reaches

Latents = NDArray[np.float32]


class Pass(NamedTuple):
    """A pass that the stand-in was asked for.

    Attributes:
        branch: Number of the branch.
        chunk: Of the video.
        timestep: Of the model, 0 to 1.
        rows: The tokens that were computed.
        seen: Chunks whose keys were seen.
    """

    branch: int
    chunk: int
    timestep: float
    rows: tuple[int, ...]
    seen: tuple[int, ...]


@dataclass
class Field:
    """A transformer whose velocity is 1 everywhere, as `Passes` has it.

    Attributes:
        passes: All that were asked for, in order.
        config: Sizes, as far as the loop asks for them.
        branches: Opened so far.
    """

    passes: list[Pass] = field(default_factory=list)
    config: Any = field(
        default_factory=lambda: SimpleNamespace(
            rope=BandRope((1.0,)), patch_size=(1, 2, 2), out_channels=1
        )
    )
    branches: int = 0

    @property
    def timestep(self) -> Any:
        """What computes the modulation: here the timestep itself."""
        return SimpleNamespace(run=lambda inputs: {"modulation": inputs["timesteps"][:, None]})

    def timed(self, clock: Any) -> "Field":
        """Itself: time does not matter."""
        return self

    def bucket(self, recomputed: int, tokens: int) -> int:
        """As many tokens as are computed."""
        return recomputed

    def encode_context(self, embedding: Any) -> Any:
        """No text is looked at."""
        return embedding

    def open_branch(self, context: Any, angles: Any, capacity: int | None = None) -> int:
        """Number the branches."""
        self.branches += 1
        return self.branches - 1

    def embed(self, patches: Latents) -> Latents:
        """The patches themselves, so that distances are those of the latents."""
        return patches

    def recompute(
        self,
        branch: int,
        chunk: int,
        x: Latents,
        rows: NDArray[np.intp],
        modulation: Latents,
        view: View = WINDOW,
    ) -> Latents:
        """Write the pass down, and give its tokens a velocity of 1."""
        seen = range(chunk + 1) if view.chunks is None else view.chunks
        timestep = float(modulation.ravel()[0])
        self.passes.append(Pass(branch, chunk, timestep, tuple(rows.tolist()), tuple(seen)))
        return np.ones_like(x[:, rows])

    def copy_keys(self, source: int, target: int, chunk: int) -> None:
        """There are no keys."""

    def read(self, out: Latents, *_: Any) -> Reading:
        """The velocity."""
        return Reading(out)

    def to_host(self, values: Latents) -> Latents:
        """It is there."""
        return values


class Run(NamedTuple):
    """What came out of a run.

    Attributes:
        moved: Final minus initial latents of every token, shape (chunks, F * P).
        trace: Of the run.
        passes: That were made.
    """

    moved: NDArray[np.float64]
    trace: DecisionTrace
    passes: Sequence[Pass]


def lay_out(options: MagiOptions = OPTIONS) -> RunPlan:
    """Plan the job."""
    family = FAMILIES["magi"]
    return family.plan(options, 0, family.grid(CONFIG), CONFIG)


def start_evenly(options: MagiOptions = OPTIONS) -> Latents:
    """Latents to start from: 1, and 2 at the odd positions of odd frames, so that these move."""
    frames = FAMILIES["magi"].grid(CONFIG).latent_frames(options.num_frames)
    start = np.ones((1, frames, options.height // 8, options.width // 8), np.float32)
    start[:, 1::2, :, start.shape[3] // 2 :] = 2
    return start


def run(policy: Policy, options: MagiOptions = OPTIONS) -> Run:
    """Run the job with a policy."""
    family, model, plan = FAMILIES["magi"], Field(), lay_out(options)
    text = np.zeros((1, 1, 1), np.float32)
    start = start_evenly(options)
    inputs = Inputs((text, text, text[:, :0]), start, start[:, :0], options, CONFIG, "none")
    generation = generate_chunks(family, inputs, plan, model, None, policy, lambda _: None)
    latents = np.concatenate([chunk.latents for chunk in generation], axis=1)
    chunks, tokens = plan.shape.active.shape[1], plan.shape.tokens
    moved = patchify(latents - start, model.config.patch_size).reshape(chunks, tokens, -1)
    return Run(moved.mean(axis=2, dtype=np.float64), generation.trace, model.passes)


def force(masks: NDArray[np.bool_], switches: MagiSwitches, options: MagiOptions) -> Policy:
    """Compute what is said of every step, shape (N, F * P), the same in all chunks."""
    plan = lay_out(options)
    steps = plan.matrices[0].step - 1
    forced = masks[steps.clip(0, len(masks) - 1)].astype(np.int8)
    forced[~plan.shape.active] = -1
    branches = np.repeat(forced[:, None], plan.shape.branches, axis=1)
    named = asdict(switches)
    return replay(
        DecisionTrace.from_masks(branches, plan.shape.frames, switches.clean_pass, switches=named)
    )


def take_turns(interval: int) -> NDArray[np.bool_]:
    """All tokens in the warm-up, then every n-th step: at first all at once, later by turns."""
    steps = np.arange(SCHEDULE.num_inference_steps)[:, None]
    turn = np.arange(lay_out().shape.tokens) * (steps >= FINE)
    return (steps < FULL) | ((steps - FULL + 1 + turn) % interval == 0)


def never_compute(compat: Compat | MagiSwitches) -> Policy:
    """MotionCache with thresholds that nothing reaches, so that only what is forced is computed."""
    settings = {"threshold": NEVER, "chunk_threshold": NEVER, "compat": compat}
    return make_policy("motioncache", settings, "magi")


def partial_passes(found: Run) -> list[Pass]:
    """Those over some tokens of a chunk, of the branch that sees the chunks before."""
    return [
        each for each in found.passes if each.branch == 0 and len(each.rows) < found.moved.shape[1]
    ]


def clean_passes(found: Run) -> list[Pass]:
    """Those of finished chunks."""
    return [each for each in found.passes if each.timestep > SCHEDULE.timesteps[-2]]


def count_last(found: Run) -> int:
    """Tokens that are computed in the last steps of all chunks."""
    last = found.trace.step == SCHEDULE.num_inference_steps
    return int((found.trace.recompute[:, 0][last] == 1).sum())


def write_table() -> str:
    """Write the figures down, as docs/decisions/010 has them."""
    lines = ["| | `reference` | `fixed` | switch |", "|---|--:|--:|---|"]

    def write(what: str, switch: str, cells: Iterable[str]) -> None:
        lines.append(f"| {what} | {' | '.join(cells)} | `{switch}` |")

    for interval, name in INTERVALS.items():
        turns = take_turns(interval)
        forced = [run(force(turns, switches, OPTIONS)) for switches in BOTH]
        paths = (f"{found.moved.mean():.3f}, {found.moved.min():.3f}" for found in forced)
        write(f"path of a token in every {name} step, mean and least", "reuse_velocity", paths)
    passes = [partial_passes(found) for found in forced]
    seen = (f"{sum(one.chunk in one.seen for one in each)} of {len(each)}" for each in passes)
    write("passes over some tokens that see the keys of their own chunk", "own_keys", seen)
    found = [run(never_compute(switches)) for switches in BOTH]
    chunks, tokens = found[0].moved.shape
    last = (f"{count_last(each)} of {chunks * tokens}" for each in found)
    write("tokens computed in the last steps of chunks, at most reuse", "force_last_step", last)
    clean = (f"{len(clean_passes(each))} of {chunks - 1}" for each in found)
    write("chunks with a clean pass before others see them finished", "clean_pass", clean)
    alone = (str(sum(one.branch == 1 for one in each.passes)) for each in forced)
    write("nearly clean passes", "nearly_clean", alone)
    return "\n".join(lines)


if __name__ == "__main__":
    print(write_table())
