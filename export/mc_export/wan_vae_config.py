"""Sizes of the Wan 2.1 video autoencoder, read from a checkpoint's configuration.

Neighbours: `wan_vae` builds the networks from them, `wan_vae_components` the components.
"""

__all__ = ["WanVaeConfig"]

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from mc_engines.errors import CheckpointError

_WAN_22 = "Wan 2.2's autoencoder is another network: use the one of Wan 2.1."
# Keys that would change the network, and the only value of each that is supported.
_FIXED: dict[str, tuple[Any, str]] = {
    "is_residual": (False, _WAN_22),
    "patch_size": (None, _WAN_22),
    "attn_scales": ([], "Use one that attends at the latent's resolution alone."),
}


@dataclass(frozen=True)
class WanVaeConfig:
    """Sizes of the autoencoder, with the names and defaults of diffusers' configuration.

    Attributes:
        base_dim: Channels of the encoder's widest picture.
        decoder_base_dim: Channels of the decoder's widest picture; None means `base_dim`.
        z_dim: Channels of a latent frame.
        dim_mult: Multiple of the base channels at each resolution, from the picture down.
        num_res_blocks: Residual layers of the encoder at each resolution; the decoder has one more.
        temperal_downsample: Whether the frame rate halves with each halving of the resolution.
        latents_mean: Mean of each latent channel over the training data.
        latents_std: Standard deviation of each latent channel over the training data.
        in_channels: Channels of a pixel frame that is encoded.
        out_channels: Channels of a pixel frame that is decoded.
    """

    base_dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temperal_downsample: tuple[bool, ...]
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    decoder_base_dim: int | None = None
    in_channels: int = 3
    out_channels: int = 3

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "WanVaeConfig":
        """Read a checkpoint's configuration.

        Args:
            config: diffusers' keys; those that do not change the network are ignored.

        Returns:
            The sizes.

        Raises:
            CheckpointError: A key is missing, lists disagree in length, or it is another network.
        """
        for key, (plain, reason) in _FIXED.items():
            if config.get(key, plain) != plain:
                raise CheckpointError(
                    f"vae config: expected {key} {plain}, got {config[key]}. {reason}"
                )
        given = {field.name: config[field.name] for field in fields(cls) if field.name in config}
        needed = [field.name for field in fields(cls) if field.default is MISSING]
        missing = [name for name in needed if name not in given]
        if missing:
            raise CheckpointError(
                f"vae config: expected {', '.join(needed)}, got no {', '.join(missing)}. "
                "Check the vae's config.json."
            )
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in given.items()
        }
        result = cls(**values)
        result._check_lengths()
        return result

    @property
    def spatial_factor(self) -> int:
        """Pixels of a frame that one position of a latent frame stands for, along each side."""
        return int(2 ** (len(self.dim_mult) - 1))

    @property
    def temporal_factor(self) -> int:
        """Pixel frames of every step but the first."""
        return int(2 ** sum(self.temperal_downsample))

    def _check_lengths(self) -> None:
        expected = {
            "temperal_downsample": len(self.dim_mult) - 1,
            "latents_mean": self.z_dim,
            "latents_std": self.z_dim,
        }
        for name, length in expected.items():
            if len(getattr(self, name)) != length:
                raise CheckpointError(
                    f"vae config: expected {length} values of {name}, "
                    f"got {len(getattr(self, name))}. Check the vae's config.json."
                )
