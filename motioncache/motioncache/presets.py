"""Finding a policy by its name: the registry, the published presets, those of a bundle.

A preset is a set of settings with where they come from. Published ones hold for the published
configurations they were used on; everything else is made by `mc-calibrate` on the very bundle and
stored in its manifest. Nothing is guessed: a polynomial of one model says nothing on another.
"""

__all__ = [
    "POLICIES",
    "PUBLISHED",
    "Preset",
    "choose_policy",
    "list_presets",
    "list_required",
    "make_policy",
]

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

from motioncache import flowcache, magi_flowcache, magi_motion, motion, teacache
from motioncache.options import parse_options
from motioncache.policy import Policy, none


@dataclass(frozen=True)
class NoneConfig:
    """The policy `none` has no settings."""


class Entry(NamedTuple):
    """A policy of the registry: its settings, and the function that binds them."""

    config_type: type
    build: Callable[[Any], Policy]


_NONE = Entry(NoneConfig, lambda config: none())
# By family of models. TeaCache has no rule for MAGI-1: published, it stops old chunks for good.
POLICIES: dict[str, dict[str, Entry]] = {
    "skyreels": {
        "none": _NONE,
        "teacache": Entry(teacache.TeaCacheConfig, teacache.build),
        "flowcache": Entry(flowcache.FlowCacheConfig, flowcache.build),
        "motioncache": Entry(motion.MotionCacheConfig, motion.build),
    },
    "magi": {
        "none": _NONE,
        "flowcache": Entry(magi_flowcache.MagiFlowCacheConfig, magi_flowcache.build),
        "motioncache": Entry(magi_motion.MagiMotionCacheConfig, magi_motion.build),
    },
}


@dataclass(frozen=True)
class Preset:
    """Settings of a policy, and what is known of them.

    Attributes:
        policy: Name of the policy.
        name: Of the preset.
        options: Fields of the policy's configuration.
        origin: `published`, or `calibrated` on the bundle that carries it.
        source: Where the settings come from.
        models: Published configurations it holds for; empty for the bundle that carries it.
        family: Of the models it holds for.
        steps: Denoising steps of a chunk that it was made for; None where that is not known.
        reached: What it reached where it was made, such as a speed-up and a PSNR.
    """

    policy: str
    name: str
    options: Mapping[str, Any]
    origin: Literal["published", "calibrated"]
    source: str
    models: tuple[str, ...] = ()
    family: str = "skyreels"
    steps: int | None = None
    reached: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """As the command line names it, such as `flowcache:slow`."""
        return f"{self.policy}:{self.name}"

    def to_json(self) -> dict[str, Any]:
        """The preset as it stands in a manifest."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return values | {"models": list(self.models)}

    @classmethod
    def from_json(cls, key: str, value: Mapping[str, Any]) -> "Preset":
        """Read a preset of a manifest.

        Args:
            key: Its name there, for messages.
            value: As `to_json` wrote it.

        Returns:
            The preset.

        Raises:
            ValueError: A field is missing or unknown.
        """
        try:
            options = {
                name: tuple(option) if isinstance(option, list) else option
                for name, option in value["options"].items()
            }
            return cls(**{**value, "options": options, "models": tuple(value["models"])})
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"preset {key}: expected the fields of a preset, got {error}. "
                "Run mc-calibrate again."
            ) from error


# Fitted on Wan2.1's text-to-video models, for e0: TeaCache 7c10efc, TeaCache4Wan2.1,
# teacache_generate.py. The published code uses them for SkyReels-V2.
_WAN_1_3B = (-5.21862437e4, 9.23041404e3, -5.28275948e2, 1.36987616e1, -4.99875664e-2)
_WAN_14B = (-3.03318725e5, 4.90537029e4, -2.65530556e3, 5.87365115e1, -3.15583525e-1)
_SMALL = ("skyreels-df-1.3b-540p",)
_LARGE = ("skyreels-df-14b-540p", "skyreels-df-14b-720p")
_STEPS = 50  # of both papers' measurements
_MAGI = ("magi-4.5b-distill",)
_MAGI_STEPS = 64
_FLOWCACHE = "FlowCache (mikeallen39/FlowCache 1fdfa57), run_flowcache_{}.sh"


def _published_flowcache(name: str, threshold: float) -> Preset:
    options = {"threshold": threshold, "coefficients": _WAN_1_3B}
    source = _FLOWCACHE.format(name)
    return Preset("flowcache", name, options, "published", source, _SMALL, steps=_STEPS)


def _unmeasured_flowcache(name: str, threshold: float) -> Preset:
    options = {"threshold": threshold, "coefficients": _WAN_14B}
    source = f"{_FLOWCACHE.format(name)}, with the coefficients its code has for 14B; no result"
    return Preset("flowcache", name, options, "published", source, _LARGE)


PUBLISHED = (
    *(
        make(name, threshold)
        for make in (_published_flowcache, _unmeasured_flowcache)
        for name, threshold in (("slow", 0.1), ("fast", 0.15))
    ),
    Preset(
        "motioncache",
        "published",
        {"threshold": 0.1, "coefficients": _WAN_1_3B},
        "published",
        "MotionCache (ywlq/MotionCache a8d2a47), run_vbench.sh; whether it is the paper's slow or "
        "fast setting is not known",
        _SMALL,
        steps=_STEPS,
    ),
    *(
        Preset(
            "flowcache",
            name,
            {"threshold": threshold},
            "published",
            f"FlowCache (mikeallen39/FlowCache 1fdfa57), {file}",
            _MAGI,
            "magi",
            _MAGI_STEPS,
        )
        for name, threshold, file in (
            ("slow", 0.01, "yaml_config/sample/flowcache_vbench.yaml"),
            ("fast", 0.015, "yaml_config/single_run/config.yaml"),
        )
    ),
    Preset(
        "motioncache",
        "published",
        {"threshold": 0.0065, "chunk_threshold": 0.0065},
        "published",
        "MotionCache (ywlq/MotionCache a8d2a47), MotionCache4MAGI-1/addconfig/config.yaml; whether "
        "it is the paper's slow or fast setting is not known",
        _MAGI,
        "magi",
        _MAGI_STEPS,
    ),
)


def list_presets(model: str | None, stored: Mapping[str, Any]) -> dict[str, Preset]:
    """List the presets that hold for a bundle.

    Args:
        model: Published configuration of the bundle, or None.
        stored: Presets of its manifest.

    Returns:
        Presets by key, such as `flowcache:slow`; one of the bundle replaces a published one.

    Raises:
        ValueError: A preset of the manifest is damaged.
    """
    published = {preset.key: preset for preset in PUBLISHED if model in preset.models}
    return published | {key: Preset.from_json(key, value) for key, value in stored.items()}


def choose_policy(
    spec: str, pairs: Iterable[str], family: str, model: str | None, stored: Mapping[str, Any]
) -> Policy:
    """Make the policy that `--policy NAME[:PRESET]` and `--policy-option FIELD=VALUE` ask for.

    Without a preset the settings come from the bundle's calibrated one, else from the only
    published one that holds, else from the options alone.

    Args:
        spec: NAME or NAME:PRESET.
        pairs: Settings that win over those of the preset.
        family: Of the bundle.
        model: Published configuration of the bundle, or None.
        stored: Presets of its manifest.

    Returns:
        The policy.

    Raises:
        ValueError: There is no such policy or preset, the preset is of other models, or a setting
            is wrong or missing.
    """
    name, _, preset_name = spec.partition(":")
    known = POLICIES[family]
    if name not in known:
        raise ValueError(
            f"policy: expected one of {', '.join(known)}, got {name}. Write NAME or NAME:PRESET."
        )
    preset = _find_preset(name, preset_name, family, model, stored)
    if preset is not None and preset.family != family:
        raise ValueError(
            f"preset {preset.key}: expected one for the family {family}, got one for "
            f"{preset.family}. Run mc-calibrate on this bundle."
        )
    options = dict(preset.options) if preset else {}
    changes = parse_options(known[name].config_type, pairs)
    policy = make_policy(name, options | changes, family)
    if preset is None:
        return policy
    label = f"{preset.name} (changed)" if changes else preset.name
    return replace(policy, preset=label, made_for_steps=preset.steps)


def make_policy(name: str, options: Mapping[str, Any], family: str = "skyreels") -> Policy:
    """Bind settings to a policy of the registry.

    Args:
        name: Of the policy.
        options: Fields of its configuration.
        family: Of the model it is for.

    Returns:
        The policy.

    Raises:
        ValueError: A setting is unknown, wrong, or missing.
    """
    config_type, build = POLICIES[family][name]
    known = {entry.name: entry for entry in fields(config_type)}
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"policy {name}: expected settings of {', '.join(known) or 'none'}, got "
            f"{', '.join(unknown)}. Leave them out."
        )
    missing = [key for key in list_required(name, family) if key not in options]
    if missing:
        raise ValueError(
            f"policy {name}: expected {' and '.join(missing)} for this model, got none. Run "
            "mc-calibrate BUNDLE to measure them, or name a preset or --policy-option."
        )
    return build(config_type(**options))


def list_required(name: str, family: str = "skyreels") -> tuple[str, ...]:
    """List the settings that a policy has no default for, because they are a model's.

    Args:
        name: Of the policy.
        family: Of the model it is for.

    Returns:
        Fields of its configuration.

    Example:
        >>> list_required("flowcache"), list_required("flowcache", "magi")
        (('threshold', 'coefficients'), ('threshold',))
    """
    entries = fields(POLICIES[family][name].config_type)
    return tuple(entry.name for entry in entries if entry.default is MISSING)


def _find_preset(
    name: str, preset_name: str, family: str, model: str | None, stored: Mapping[str, Any]
) -> Preset | None:
    """Look up a named preset, or the one that holds where none is named."""
    own = {key: value for key, value in stored.items() if key.startswith(f"{name}:")}
    presets = {
        preset.name: preset for preset in list_presets(model, own).values() if preset.policy == name
    }
    if not preset_name:
        only = next(iter(presets.values())) if len(presets) == 1 else None
        return presets.get("calibrated", only)
    if preset_name in presets:
        return presets[preset_name]
    key = f"{name}:{preset_name}"
    others = [preset for preset in PUBLISHED if (preset.family, preset.key) == (family, key)]
    holds = f"It holds for {', '.join(m for p in others for m in p.models)} alone. " * bool(others)
    listed = ", ".join(presets) or "none"
    raise ValueError(
        f"policy {name}: expected a preset of this bundle ({listed}), got {preset_name}. {holds}"
        "Run mc-calibrate BUNDLE to make one."
    )
