"""From a prompt to a video: `VideoPipeline` opens a bundle and generates chunk by chunk.

The path: `encode_prompt`, `plan_windows`, `step_matrix`, `denoise_window`, `Decoder.decode`;
`mc_runtime.video` writes the frames.
"""

__all__ = ["VideoPipeline"]

import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_engines.building.bounds import VideoLimits, bound_symbols
from mc_engines.bundle import Bundle
from mc_engines.device.device import Device
from mc_engines.device.opening import DeviceOptions, list_components, open_device
from mc_engines.device.runner import DeviceRunner
from mc_engines.onnxruntime_providers import Provider
from mc_engines.onnxruntime_runner import open_runner
from mc_engines.runner import Arrays, Runner
from mc_runtime.device_passes import DevicePasses, list_required, open_device_passes
from mc_runtime.families.registry import FAMILIES
from mc_runtime.generation import Generation, Progress, generate_chunks
from mc_runtime.inputs import Inputs, check_array, check_policy
from mc_runtime.opened_once import opened_once
from mc_runtime.options import Video
from mc_runtime.passes import HostPasses, Passes
from mc_runtime.prefix import Prefix, choose_prefix
from mc_runtime.run_plan import RunPlan
from mc_runtime.schedule import LatentGrid
from mc_runtime.text import TextEncoder, Tokenizer, encode_prompt
from mc_runtime.transformer import Transformer, TransformerConfig, open_transformer
from mc_runtime.vae import Decoder, Encoder, VaeParts
from motioncache import DecisionTrace, Policy, choose_policy, replay

Embedding = NDArray[np.float32]
Latents = NDArray[np.float32]


class VideoPipeline:
    """A bundle that is ready to generate. Several threads may generate at once.

    Attributes:
        bundle: What was opened.
        threads: Threads of one operator; None lets ONNX Runtime take every physical core.
        provider: What ONNX Runtime runs graphs on.
        family: Of the model.
    """

    def __init__(
        self, bundle: Bundle, threads: int | None = None, provider: Provider = "cpu"
    ) -> None:
        if bundle.manifest.family not in FAMILIES:
            raise ValueError(
                f"{bundle.path}: expected a bundle of the family {' or '.join(FAMILIES)}, "
                f"got {bundle.manifest.family}. Export a checkpoint of one of these."
            )
        self.family = FAMILIES[bundle.manifest.family]
        self.bundle = bundle
        self.threads = threads
        self.provider = provider
        self._device_options: DeviceOptions | None = None
        self._opening = threading.RLock()

    def use_device(self, options: DeviceOptions) -> None:
        """Run on a GPU from now on, to be called before the first generation.

        Args:
            options: Which engines, and for which sizes.
        """
        self._device_options = options

    @opened_once
    def device(self) -> Device | None:
        """The GPU with the engines of the transformer, and of other parts where there are any.

        Returns:
            It; None where everything runs in ONNX Runtime.

        Raises:
            EngineError: An engine is missing; the message says which command makes it.
        """
        if (options := self._device_options) is None:
            return None
        wanted = {*list_required(self.bundle), *list_components(self.bundle, options)}
        components = [name for name in self.bundle.manifest.components if name in wanted]
        return open_device(self.bundle, options, components)

    @classmethod
    def from_bundle(cls, path: str | Path, threads: int | None = None) -> "VideoPipeline":
        """Open a bundle.

        Args:
            path: Its folder.
            threads: Threads of one operator; None lets ONNX Runtime take every physical core.

        Returns:
            The pipeline; engines are loaded when they are first needed.

        Raises:
            BundleError: The bundle is damaged or incomplete.
            ValueError: The bundle is of another family.
        """
        return cls(Bundle.open(path), threads)

    @opened_once
    def transformer(self) -> Transformer:
        """The transformer's engines."""
        return open_transformer(self.bundle, self.threads, self.provider)

    @property
    def passes(self) -> Passes:
        """What the loop asks of the transformer."""
        return HostPasses(self.transformer) if self.device is None else self._device_passes

    @opened_once
    def _device_passes(self) -> DevicePasses:
        device, options = self.device, self._device_options
        assert device is not None and options is not None
        timestep = open_runner(self.bundle, "timestep", "fp32", self.threads)
        manifest = self.bundle.manifest.config
        config = TransformerConfig.from_manifest(manifest["transformer"])
        symbols, kept = bound_symbols(manifest, options.limits), None
        if self.family.kept is not None:
            kept = self.family.kept(manifest, symbols)
        return open_device_passes(device, config, timestep, symbols, kept)

    @opened_once
    def text_encoder(self) -> TextEncoder:
        """The text encoder's engines; raises BundleError where the bundle has none."""
        layer, norm = self._open("text_layer"), self._open("text_norm")
        config = self.bundle.manifest.config["text_encoder"]
        return TextEncoder(
            Tokenizer.from_folder(self.bundle.path / "tokenizer"),
            self.bundle.map_tensors("weights/text_embed.safetensors")["table"],
            layer,
            norm,
            partial(self._layer_weights, "text_layer"),
            partial(self._layer_weights, "text_norm", 0),
            config["layers"],
            config["relative_buckets"],
            config["relative_max_distance"],
            self.family.clean,
            self.family.pads_text,
        )

    @opened_once
    def decoder(self) -> Decoder:
        """The VAE's decoder; raises BundleError where the bundle has none."""
        return self.family.open_decoder(self._vae_parts)

    @opened_once
    def encoder(self) -> Encoder:
        """The VAE's encoder; raises BundleError where the bundle has none."""
        return self.family.open_encoder(self._vae_parts)

    def _layer_weights(self, component: str, layer: int) -> Arrays:
        """Weights as what runs them takes them, so that nothing is cast there and back."""
        if self.device is not None and component in self.device.engines:
            return self.device.load_weights(component, layer)
        return self.bundle.layer_weights(component, layer, "fp32")

    def _open(self, component: str, form: str = "fp32") -> Runner:
        if self.device is not None and component in self.device.engines:
            outputs, states = self.device.engines[component].graph.outputs, set()
            if component.replace("_first", "_next") in self.device.engines:  # which takes them
                states = {spec.name for spec in outputs if spec.name.startswith("next_state")}
            return DeviceRunner(self.device, component, frozenset(states))
        return open_runner(self.bundle, component, form, self.threads, self.provider)

    @property
    def _vae_parts(self) -> VaeParts:
        config = self.bundle.manifest.config.get("vae", {})
        return VaeParts(config, self._open, self._layer_weights, self.bundle.map_tensors)

    @property
    def grid(self) -> LatentGrid:
        """Pixels per latent and latents per token."""
        return self.family.grid(self.bundle.manifest.config)

    @property
    def default_options(self) -> Any:
        """The defaults, at the size of video that the model was trained for where that is known."""
        return self.family.defaults(self.bundle.manifest.config)

    def limit_video(self, options: Any) -> VideoLimits:
        """Return the largest video that engines of a run have to take."""
        return self.family.limits(options, self.bundle.manifest.config)

    def plan(self, options: Any, prefix_latent_frames: int = 0) -> RunPlan:
        """Lay out a run on this model.

        Args:
            options: Of the run.
            prefix_latent_frames: Of the video to continue.

        Returns:
            The plan.

        Raises:
            ValueError: A setting that cannot be generated.
        """
        config = self.bundle.manifest.config
        return self.family.plan(options, prefix_latent_frames, self.grid, config)

    def generate(
        self,
        prompt: str | None = None,
        *,
        negative_prompt: str | None = None,
        prompt_embeds: Embedding | None = None,
        negative_prompt_embeds: Embedding | None = None,
        latents: Latents | None = None,
        video: NDArray[np.uint8] | None = None,
        image: NDArray[np.uint8] | None = None,
        prefix_latents: Latents | None = None,
        policy: Policy | DecisionTrace | str = "none",
        decode: bool = True,
        callback: Callable[[Progress], None] = lambda _: None,
        note: Callable[[str], None] = warnings.warn,
        options: Any = None,
        **settings: Any,
    ) -> Generation:
        """Generate a video and yield each chunk as soon as it is clean.

        Everything is checked, and prompts are encoded, before this returns.

        Args:
            prompt: What to show.
            negative_prompt: What not to show; empty if it is not given. Used with guidance alone.
            prompt_embeds: Instead of `prompt`, shape (1, T, text_dim), float32.
            negative_prompt_embeds: Instead of `negative_prompt`, the same shape but for T.
            latents: Initial noise, shape (16, frames, h, w), float32; drawn from `seed` if None.
            video: Frames (n, height, width, 3), uint8; the last `overlap_history` are continued.
            image: A frame (height, width, 3), uint8, to begin with; SkyReels-V2 refuses it.
            prefix_latents: Latents (16, n, h, w) of MAGI-1 to begin with, instead of `video`.
            policy: What `find_policy` takes: NAME, NAME:PRESET, a policy, or a trace to replay.
            decode: Decode the latents to frames.
            callback: Called after every row of the schedule; an exception it raises ends the run.
            note: Called with what the caller should know, such as that the prompt was cut.
            options: Settings; `default_options` if None.
            **settings: Single fields of the options, over those of `options`.

        Returns:
            An iterator of chunks, which also has the trace of what the policy decided.

        Raises:
            ValueError: A setting or an input that cannot be generated from.
            TypeError: An unknown setting.
            BundleError: The bundle lacks what the inputs need, such as a text encoder.
        """
        chosen = replace(options or self.default_options, **settings)
        prefix = self._choose_prefix(chosen, (video, image, prefix_latents))
        plan = self.plan(chosen, prefix.count(self.grid))
        chosen_policy = self.find_policy(policy)
        check_policy(chosen_policy, plan.shape, note)
        decoder = self.decoder if decode else None
        noise = self._noise(latents, chosen)
        texts = (prompt, prompt_embeds), (negative_prompt, negative_prompt_embeds)
        embeddings = [self.embed_text(*pair, note) for pair in self.family.prompts(*texts, plan)]
        embeddings += [self._read_table(name, note) for name in self.family.tables]
        rest = chosen, self.bundle.manifest.config, self.bundle.model_hash
        inputs = Inputs(tuple(embeddings), noise, self._encode_prefix(prefix, chosen), *rest)
        run = inputs, plan, self.passes, decoder, chosen_policy, callback
        return generate_chunks(self.family, *run)

    def run(self, prompt: str | None = None, **arguments: Any) -> Video:
        """Generate a whole video.

        Args:
            prompt: What to show.
            **arguments: As for `generate`.

        Returns:
            The latents, and the frames unless `decode` is False.

        Raises:
            ValueError: As `generate`.
            EngineError: An engine failed, or computed NaN.
        """
        generation = self.generate(prompt, **arguments)
        chunks = list(generation)
        frames = [chunk.frames for chunk in chunks if chunk.frames is not None]
        latents = np.concatenate([chunk.latents for chunk in chunks], axis=1)
        return Video(latents, np.concatenate(frames) if frames else None, generation.trace)

    def find_policy(
        self, policy: Policy | DecisionTrace | str, options: Sequence[str] = ()
    ) -> Policy:
        """Make a policy for this bundle.

        Args:
            policy: A policy, which is returned; NAME or NAME:PRESET; or a trace to replay.
            options: Settings FIELD=VALUE of a policy given by name.

        Returns:
            The policy.

        Raises:
            ValueError: There is none of that name, a setting is wrong or missing, or the trace is
                of another bundle.
        """
        if isinstance(policy, Policy):
            return policy
        manifest = self.bundle.manifest
        if isinstance(policy, str):
            return choose_policy(policy, options, manifest.family, manifest.model, manifest.presets)
        recorded = policy.run.get("bundle", self.bundle.model_hash)
        if recorded != self.bundle.model_hash:
            raise ValueError(
                f"trace: expected one of the bundle {self.bundle.model_hash[:12]}, got one of "
                f"{recorded[:12]}. Replay it on the bundle it was recorded with."
            )
        return replay(policy)

    def _choose_prefix(self, options: Any, sources: tuple[Any, Any, Any]) -> Prefix:
        """What the video begins with: of a video, an image and latents the one that is given."""
        return choose_prefix(*sources, options, self.family, self.grid, self._latent_shape)

    def _encode_prefix(self, prefix: Prefix, options: Any) -> Latents:
        """Latents to begin with; of no frames where nothing is given."""
        if prefix.frames is not None:
            return self.encoder.encode(prefix.frames)
        none = np.zeros(self._latent_shape(0, options), np.float32)
        return none if prefix.latents is None else prefix.latents

    def _latent_shape(self, frames: Any, options: Any) -> tuple[Any, ...]:
        channels = self.bundle.manifest.config["transformer"]["in_channels"]
        factor = self.grid.spatial_factor
        return channels, frames, options.height // factor, options.width // factor

    def draw_noise(self, options: Any) -> Latents:
        """Draw the initial latents of a whole video from its seed, shape (16, frames, h, w)."""
        shape = self._latent_shape(self.grid.latent_frames(options.num_frames), options)
        return np.random.default_rng(options.seed).standard_normal(shape, np.float32)

    def _noise(self, latents: Latents | None, options: Any) -> Latents:
        """Initial latents of the whole video, given or drawn."""
        if latents is None:
            return self.draw_noise(options)
        frames = self.grid.latent_frames(options.num_frames)
        check_array("latents", latents, self._latent_shape(frames, options))
        return latents

    def _read_table(self, name: str, note: Callable[[str], None]) -> Embedding:
        """A table of embeddings that the family wants, shape (1, T, text_dim); T may be 0."""
        file = f"weights/{name}.safetensors"
        if file not in self.bundle.manifest.files:
            note(f"{name}: expected a table in the bundle, got none. The prompt goes without.")
            return np.zeros((1, 0, self.bundle.manifest.config["transformer"]["text_dim"]), "f4")
        return self.bundle.map_tensors(file)["embedding"][None].astype(np.float32)

    def embed_text(
        self, name: str, text: str | Embedding, note: Callable[[str], None]
    ) -> Embedding:
        """Encode a prompt.

        Args:
            name: Of the prompt, for messages.
            text: The prompt; an embedding is checked and returned.
            note: Called where the prompt had to be cut.

        Returns:
            shape (1, T, text_dim).

        Raises:
            ValueError: An embedding of another kind.
            BundleError: The bundle has no text encoder.
        """
        if not isinstance(text, str):
            text_dim = self.bundle.manifest.config["transformer"]["text_dim"]
            check_array(f"{name}_embeds", text, (1, "T", text_dim))
            return text
        encoder = self.text_encoder
        limit = int(self.bundle.manifest.config["text_encoder"]["max_tokens"])
        encoded = encode_prompt(text, encoder, limit)
        if encoded.cut:
            note(
                f"{name}: expected at most {limit} tokens, got {limit + encoded.cut}. "
                f"The last {encoded.cut} were cut."
            )
        return encoded.embedding
