"""What of a model a prediction needs, from a bundle or a published configuration.

Neighbours: `predict` and `memory_plan` reckon with it; what differs between families the model's
`Family` says, from the manifest's `config` or from what it would be.
"""

__all__ = ["Model", "describe_model"]

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mc_engines.bundle import Bundle
from mc_engines.decoder_tape import DecoderShape
from mc_engines.manifest import Manifest
from mc_engines.published import PUBLISHED_BY_FAMILY, Published
from mc_engines.run_sizes import Kept, WindowShape
from mc_engines.specs import split_size
from mc_runtime.bench.roofline import Schedule
from mc_runtime.families.family import Family
from mc_runtime.families.registry import FAMILIES
from mc_runtime.flops import ModelFlops
from mc_runtime.pipeline import VideoPipeline
from mc_runtime.run_plan import RunPlan
from mc_runtime.schedule import LatentGrid

# Weights of the four engines of Wan's VAE: the sizes of engines in 16 bit, in README.md, by two.
_WAN_WEIGHTS = 184_000_000
_WAN_DECODER_WEIGHTS = 98_700_000  # of the decoder's two, in the files of an export
_FREQUENCIES = 256  # of the embedding of timesteps
_STATEFUL_DECODER = "vae_decoder_next"
_TRANSFORMER = "text_projection", "timestep", "embed", "head"  # with weights inside
_STORED = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Model:
    """What of a model a prediction needs; None where that is not told.

    Attributes:
        name: Of the bundle's folder or the published configuration.
        family: Of the model.
        config: The manifest's, or what is known of it.
        tokens: Of the prompts, and of the family's tables behind them.
        text_layer: Number of weights in a layer of its text encoder.
        vae_weights: Number of weights in the engines of its VAE.
        decoder: Of its VAE, where that keeps states from step to step.
        graph_weights: Number of weights inside the graphs that a generation opens.
        stored_bytes: Of a weight in its files.
    """

    name: str
    family: Family
    config: Mapping[str, Any]
    tokens: tuple[int, ...]
    text_layer: int | None = None
    vae_weights: int | None = None
    decoder: DecoderShape | None = None
    graph_weights: int = 0
    stored_bytes: int = 2

    @property
    def flops(self) -> ModelFlops:
        """Operations of its parts."""
        return ModelFlops.from_manifest(self.config["transformer"])

    @property
    def grid(self) -> LatentGrid:
        """Pixels per latent and latents per token."""
        return self.family.grid(self.config)

    @property
    def defaults(self) -> Any:
        """Of a generation."""
        return self.family.defaults(self.config)

    def plan(self, options: Any, prefix: int = 0) -> RunPlan:
        """Lay out a run.

        Args:
            options: Of the run, of the family's kind.
            prefix: Latent frames of a video that is continued.

        Returns:
            The plan.

        Raises:
            ValueError: A setting that cannot be generated.
        """
        return self.family.plan(options, prefix, self.grid, self.config)

    def slots(self, options: Any, plan: RunPlan) -> tuple[int, ...]:
        """Count the chunks whose keys each branch of a run keeps."""
        return self.family.slots(self.config, options, plan)[0]

    def lay_out(
        self,
        options: Any,
        plan: RunPlan,
        computed: float = 1.0,
        run: Mapping[str, Any] | None = None,
    ) -> Schedule:
        """Lay out the passes of a run.

        Args:
            options: Of the run.
            plan: Of the run.
            computed: Share of a chunk's tokens that its steps compute; 1 is the policy `none`.
            run: What a trace says of it; None for texts of `tokens`.

        Returns:
            The passes.
        """
        if run is None:
            run = self.family.describe(self.config, options, plan, self.tokens)
        mode = self.family.passes(self.config, options, plan)
        return Schedule.of_plan(plan, mode, run, self.slots(options, plan), computed)

    def describe_window(self, options: Any, plan: RunPlan) -> WindowShape:
        """Describe the largest window of a run, and what is kept of it."""
        f, shape = self.flops, plan.shape
        sight = self.lay_out(options, plan).sight
        slots, reused = self.family.slots(self.config, options, plan)
        kept = Kept(
            tuple(shape.tokens * chunks for chunks in slots),
            sum(sight.encoded),
            shape.tokens * reused,
            f.patch_out if self.family.keeps_velocity else 0,
        )
        return WindowShape(
            layers=f.layers,
            heads=self.config["transformer"]["heads"],
            dim=f.dim,
            ffn_dim=f.ffn_dim,
            chunk_tokens=shape.tokens,
            window_tokens=shape.tokens * int(sight.visible.max()),
            branches=shape.branches,
            text_tokens=int(sight.text.max()),
            key_dim=f.key_width,
            query_dim=f.query_width,
            queries=2 if self.family.parallel_text else 1,
            ffn_matrices=f.ffn_matrices,
            kept=kept,
        )


def describe_model(name: str) -> Model:
    """Read what is known of a model.

    Args:
        name: Folder of a bundle, or a published configuration such as skyreels-df-1.3b-540p.

    Returns:
        The model.

    Raises:
        BundleError: The bundle is damaged.
        ValueError: There is neither a folder nor a configuration of that name.
    """
    for family, models in PUBLISHED_BY_FAMILY.items():
        if name in models:
            return _describe_published(name, FAMILIES[family], models[name])
    if not Path(name).is_dir():
        names = [name for models in PUBLISHED_BY_FAMILY.values() for name in models]
        raise ValueError(
            f"{name}: expected a bundle or one of {', '.join(names)}, got neither. "
            "Pass the folder that mc-export wrote, or one of these names."
        )
    return _describe_bundle(name)


def _describe_published(name: str, family: Family, published: Published) -> Model:
    """Read a published configuration; of its parts those that it names are known."""
    config = family.published(published)
    text, vae = published.text_encoder, published.vae
    inside = _count_inside(config["transformer"])
    return Model(
        name,
        family,
        config,
        (*family.prompt_tokens(config), *family.table_tokens),
        None if text is None else _count_text_layer(text),
        None if vae is None else _WAN_WEIGHTS,
        None if vae is None else DecoderShape.from_config(vae),
        inside + (0 if vae is None else _WAN_DECODER_WEIGHTS),
    )


def _count_text_layer(config: Mapping[str, Any]) -> int:
    """Weights of a layer of T5 or umT5, but for norms and biases by distance."""
    attention = 4 * config["num_heads"] * config["d_kv"]
    return int(config["d_model"] * (attention + 3 * config["d_ff"]))


def _count_inside(transformer: Mapping[str, Any]) -> int:
    """Weights inside the graphs of a transformer of SkyReels-V2, whose memory on a CPU is told."""
    flops = ModelFlops.from_manifest(transformer)
    ends = flops.text_dim + flops.patch_in + flops.patch_out + _FREQUENCIES
    # Text: C x C. Timesteps: C x C and C x 6 C, and the same of frame rates.
    squares = 15 if transformer.get("fps_embedding") else 8
    return (ends + squares * flops.dim) * flops.dim


def _describe_bundle(name: str) -> Model:
    """Read a bundle."""
    pipeline = VideoPipeline(Bundle.open(name))
    family, manifest = pipeline.family, pipeline.bundle.manifest
    layer, vae = manifest.components.get("text_layer"), "vae" in manifest.config
    decoder = [name for name in manifest.components if vae and name.startswith("vae_decoder")]
    coders = [name for name in manifest.components if vae and name.startswith("vae_")]
    return Model(
        name,
        family,
        manifest.config,
        (*family.prompt_tokens(manifest.config), *_read_tables(pipeline.bundle, family)),
        None if layer is None else _count_inputs(manifest, "text_layer"),
        sum(_count_weights(manifest, coder) for coder in coders) if vae else None,
        _read_decoder(pipeline.bundle) if _STATEFUL_DECODER in decoder else None,
        sum(_count_weights(manifest, component) for component in (*_TRANSFORMER, *decoder)),
        _STORED[manifest.weights_dtype],
    )


def _read_tables(bundle: Bundle, family: Family) -> list[int]:
    """Tokens of each of a family's tables; none of one that the bundle lacks."""
    files = [f"weights/{table}.safetensors" for table in family.tables]
    return [
        len(bundle.map_tensors(file)["embedding"]) if file in bundle.manifest.files else 0
        for file in files
    ]


def _count_weights(manifest: Manifest, component: str) -> int:
    """Number of a component's weights: those inside its graphs, and those of all its layers."""
    file = manifest.files.get(f"onnx/{component}.onnx.data")  # that its precisions share
    inside = 0 if file is None else file.size // _STORED[manifest.weights_dtype]
    layers = sum(path.startswith(f"weights/{component}.") for path in manifest.files)
    return inside + layers * _count_inputs(manifest, component)


def _count_inputs(manifest: Manifest, component: str) -> int:
    """Number of weights that a layer of a component takes as inputs."""
    specs = manifest.components[component].graphs["fp32"].weights
    return sum(math.prod(map(int, spec.shape)) for spec in specs)


def _read_decoder(bundle: Bundle) -> DecoderShape:
    """Tell the decoder by what it keeps from step to step."""
    states = [
        spec
        for spec in bundle.graph(_STATEFUL_DECODER, "fp32").inputs
        if spec.name.startswith("state")
    ]
    sides = [split_size(str(spec.shape[-1]))[0] for spec in states]
    channels = [int(spec.shape[1]) for spec in states]
    return DecoderShape.from_states([*zip(channels, sides, strict=True)])
