"""Lay frames of videos out in a picture: a row per video, eight frames evenly from first to last.

python scripts/frame_strip.py VIDEO... -o PICTURE.png [--overlay]
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mc_runtime.overlay import LEGEND_HEIGHT
from mc_runtime.video import read_frames

COLUMNS = 8
WIDTH = 128  # pixels of a frame in the picture


def lay_out(videos: list[NDArray[np.uint8]]) -> Image.Image:
    """Lay videos out, each shape (frames, height, width, 3)."""
    rows = []
    for frames in videos:
        chosen = frames[np.linspace(0, len(frames) - 1, COLUMNS).round().astype(int)]
        row = Image.fromarray(np.concatenate(list(chosen), axis=1))
        size = WIDTH * COLUMNS, round(row.height * WIDTH * COLUMNS / row.width)
        rows.append(np.asarray(row.resize(size, Image.Resampling.BOX)))
    return Image.fromarray(np.concatenate(rows))


def set_below(strip: Image.Image, legend: NDArray[np.uint8]) -> Image.Image:
    """Put a legend, shape (height, width, 3), under a strip."""
    picture = ImageOps.expand(strip, (0, 0, 0, len(legend)), "white")
    picture.paste(Image.fromarray(legend), (0, strip.height))
    return picture


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("videos", nargs="+", type=Path, metavar="VIDEO")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--overlay", action="store_true", help="show the legend of overlays once")
    arguments = parser.parse_args()
    videos = [np.stack(list(read_frames(video))) for video in arguments.videos]
    if arguments.overlay:
        strip = lay_out([frames[:, :-LEGEND_HEIGHT] for frames in videos])
        picture = set_below(strip, videos[0][0, -LEGEND_HEIGHT:])
    else:
        picture = lay_out(videos)
    picture.save(arguments.output)
