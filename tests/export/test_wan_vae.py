"""The autoencoder's steps against diffusers' whole encode and decode."""

import onnx_ir
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderKLWan
from hypothesis import given, settings
from hypothesis import strategies as st

from mc_engines.errors import CheckpointError
from mc_export.islands import Island
from mc_export.onnx_export import ISLAND_SCOPE, export_component
from mc_export.random_source import RandomSource
from mc_export.wan_vae_components import describe_vae, vae_components, vae_tensors

TOLERANCE = 1e-4
FACTOR = 4  # diffusers encodes four frames at a time whatever the configuration says
CONFIG = dict(
    base_dim=8,
    z_dim=4,
    dim_mult=[1, 2, 2],
    num_res_blocks=1,
    temperal_downsample=[True, True],
    latents_mean=[0.1, -0.2, 0.3, 0.0],
    latents_std=[1.5, 0.5, 2.0, 1.0],
)
CONFIGS = {
    "small": CONFIG,
    "wan": CONFIG | dict(dim_mult=[1, 2, 4, 4], temperal_downsample=[False, True, True]),
}
PLAIN_OPS = {
    *("Add", "Clip", "Concat", "Conv", "Div", "MatMul", "Mul", "Pad", "ReduceL2", "Reshape"),
    *("Resize", "Shape", "Sigmoid", "Slice", "Softmax", "Split", "Squeeze", "Transpose"),
}


def make(config):
    """The components, and diffusers' model with the same weights; names and shapes must agree."""
    source = RandomSource(vae_tensors(config), torch.float32, seed=0)
    model = AutoencoderKLWan(**config).eval()
    model.load_state_dict({name: source.load(name) for name in source.names()})
    return {part.name: part for part in vae_components(config, source)}, model


def drive(part, run, steps):
    """Run the first step, then the later ones, on `run(component, arrays by name)`."""
    results, states = [], {}
    for index, step in enumerate(steps):
        component = f"{part}_{'next' if index else 'first'}"
        output, *new = run(component, step, states)
        states = {f"state_{i:02d}": state for i, state in enumerate(new)}
        results.append(output)
    return torch.cat(results, dim=2)


@torch.no_grad()
def compare(model, run, counts, height, width):
    """The largest error of decoding and encoding videos of so many latent frames.

    Our steps run once, over the longest: that of a shorter video is its beginning.
    """
    draw = torch.Generator().manual_seed(height)
    factor = 2 ** (len(model.config.dim_mult) - 1)
    latents = torch.randn((1, model.config.z_dim, max(counts), height, width), generator=draw)
    pixels = 1, 3, frames_of(max(counts)), height * factor, width * factor
    video = torch.rand(pixels, generator=draw) * 2 - 1
    frames = drive("vae_decoder", run, latents.split(1, dim=2))
    codes = drive("vae_encoder", run, video.split([1] + [FACTOR] * (max(counts) - 1), dim=2))
    assert frames.shape == video.shape and codes.shape == latents.shape
    assert (frames.abs() < 1).float().mean() > 0.5  # the clamp does not hide an error
    errors = []
    for count in counts:
        decoded = model.decode(latents[:, :, :count]).sample
        encoded = model.encode(video[:, :, : frames_of(count)]).latent_dist.mode()
        errors.append((frames[:, :, : frames_of(count)] - decoded).abs().max())
        errors.append((codes[:, :, :count] - encoded).abs().max())
    return max(errors)


def frames_of(count):
    return 1 + FACTOR * (count - 1)


@settings(max_examples=20, deadline=None)
@given(
    multiples=st.lists(st.sampled_from([1, 2, 4]), min_size=3, max_size=4),
    plain=st.integers(0, 2),
    blocks=st.integers(1, 2),
    decoder_width=st.sampled_from([None, 4]),
    count=st.integers(1, 4),
    size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_steps_equal_diffusers_on_any_model(multiples, plain, blocks, decoder_width, count, size):
    halvings = len(multiples) - 1
    config = CONFIG | dict(
        dim_mult=multiples,
        num_res_blocks=blocks,
        decoder_base_dim=decoder_width,
        temperal_downsample=[index != plain or halvings == 2 for index in range(halvings)],
    )
    components, model = make(config)

    def run(name, data, states):
        return components[name].module(data, **states)

    assert compare(model, run, [count], *size) <= TOLERANCE


@pytest.fixture(scope="module", params=CONFIGS)
def exported(request):
    """Components, graphs and diffusers' model; of the larger model, the later steps' graphs."""
    components, model = make(CONFIGS[request.param])
    graphs = {
        name: export_component(component)
        for name, component in components.items()
        if request.param == "small" or name.endswith("next")
    }
    return components, graphs, model


def test_graphs_equal_diffusers(exported):
    components, graphs, model = exported
    sessions = {name: open_session(graph) for name, graph in graphs.items()}

    def run(name, data, states):
        if name not in sessions:
            return components[name].module(data, **states)
        inputs = dict(zip(components[name].inputs, (data, *states.values()), strict=True))
        arrays = sessions[name].run(None, {key: x.numpy() for key, x in inputs.items()})
        return [torch.from_numpy(x) for x in arrays]

    for counts, size in (((1, 2, 5, 7), (3, 5)), ((2,), (8, 2))):  # neither size is the traced one
        assert compare(model, run, counts, *size) <= TOLERANCE


def open_session(graph):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    data = onnx_ir.serde.serialize_model(graph).SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def test_graphs_are_plain_and_small(exported):
    _, graphs, _ = exported
    for graph in graphs.values():
        assert graph.opset_imports[""] == 22
        assert {node.op_type for node in graph.graph} <= PLAIN_OPS
        assert sum(node.op_type == "Shape" for node in graph.graph) == 2  # of the attention


def test_norms_and_upsampling_are_islands(exported):
    components, graphs, _ = exported
    for name, graph in graphs.items():
        marked = [node for node in graph.graph if ISLAND_SCOPE in node.metadata_props]
        islands = [part for part in components[name].module.modules() if isinstance(part, Island)]
        assert {"ReduceL2", "Div"} <= {node.op_type for node in marked}
        assert not {"Conv", "MatMul", "Sigmoid"} & {node.op_type for node in marked}
        assert len({node.metadata_props[ISLAND_SCOPE] for node in marked}) == len(islands)


def test_sizes_are_multiples_of_the_latents(exported):
    components, graphs, model = exported
    factor = 2 ** (len(model.config.dim_mult) - 1)
    for name in ("vae_encoder_first", "vae_encoder_next"):
        dynamic = components[name].dynamic
        assert dynamic["frames"] == {3: f"{factor}*h", 4: f"{factor}*w"}
    frames = graphs["vae_decoder_next"].graph.outputs[0]
    assert [str(size) for size in frames.shape] == ["1", "3", "4", f"{factor}*h", f"{factor}*w"]
    first, later = (components[f"vae_decoder_{step}"] for step in ("first", "next"))
    assert (
        first.outputs
        == later.outputs
        == ("frames", *(f"next_{key}" for key in later.inputs if key != "latents"))
    )


def test_states_keep_their_shapes(exported):
    components, _, _ = exported
    for part in ("vae_encoder", "vae_decoder"):
        later = components[f"{part}_next"]
        _, *given = later.inputs.values()
        _, *new = later.module(**later.inputs)
        assert [x.shape for x in given] == [x.shape for x in new]


def test_half_precision_checkpoints_are_computed_in_float32():
    source = RandomSource(vae_tensors(CONFIG), torch.bfloat16, seed=0)
    for component in vae_components(CONFIG, source):
        assert {p.dtype for p in component.module.parameters()} == {torch.float32}
        assert not any(p.requires_grad for p in component.module.parameters())


def test_manifest_entry():
    assert describe_vae(CONFIGS["wan"] | {"dropout": 0.0, "_class_name": "AutoencoderKLWan"}) == {
        "z_dim": 4,
        "spatial_factor": 8,
        "temporal_factor": 4,
        "latents_mean": CONFIG["latents_mean"],
        "latents_std": CONFIG["latents_std"],
    }


WAN_22 = "Wan 2.2's autoencoder is another network: use the one of Wan 2.1."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_residual": True}, f"vae config: expected is_residual False, got True. {WAN_22}"),
        ({"patch_size": 2}, f"vae config: expected patch_size None, got 2. {WAN_22}"),
        (
            {"attn_scales": [0.5]},
            "vae config: expected attn_scales [], got [0.5]. "
            "Use one that attends at the latent's resolution alone.",
        ),
        (
            {"temperal_downsample": [True]},
            "vae config: expected 2 values of temperal_downsample, got 1. "
            "Check the vae's config.json.",
        ),
        (
            {"latents_std": [1.0]},
            "vae config: expected 4 values of latents_std, got 1. Check the vae's config.json.",
        ),
    ],
)
def test_other_networks_are_refused(change, message):
    with pytest.raises(CheckpointError) as error:
        vae_tensors(CONFIG | change)
    assert str(error.value) == message


def test_a_missing_key_is_named():
    with pytest.raises(CheckpointError) as error:
        vae_tensors({key: value for key, value in CONFIG.items() if key != "dim_mult"})
    assert str(error.value) == (
        "vae config: expected base_dim, z_dim, dim_mult, num_res_blocks, temperal_downsample, "
        "latents_mean, latents_std, got no dim_mult. Check the vae's config.json."
    )


def test_nan_in_a_weight_is_refused():
    class WithNan(RandomSource):
        def load(self, name):
            return super().load(name) * (torch.nan if name == "quant_conv.bias" else 1)

    with pytest.raises(CheckpointError, match=r"tensor 'quant_conv\.bias': expected finite"):
        vae_components(CONFIG, WithNan(vae_tensors(CONFIG), torch.float32, seed=0))
