"""From a prompt to a video, on compiled engines and numpy."""

__all__ = ["Chunk", "GenerationOptions", "Progress", "Video", "VideoPipeline"]

from mc_runtime.generation import Progress
from mc_runtime.options import Chunk, GenerationOptions, Video
from mc_runtime.pipeline import VideoPipeline
