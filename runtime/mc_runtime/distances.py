"""The distances of a run's steps, before the run.

Neighbours: `motioncache.DistanceTable` says what they are; `denoise` gives them to the policy,
`mc-inspect --policy` and `mc-calibrate` measure them alone.
"""

__all__ = ["measure_distances"]

from mc_engines.onnxruntime_runner import open_runner
from mc_runtime.options import GenerationOptions
from mc_runtime.pipeline import VideoPipeline
from mc_runtime.sampler import sampler_table
from mc_runtime.transformer import TransformerConfig, encode_timesteps
from motioncache import DistanceTable


def measure_distances(pipeline: VideoPipeline, options: GenerationOptions) -> DistanceTable:
    """Measure how far the modulation moves from step to step.

    Args:
        pipeline: Of the bundle; nothing but the graph for timesteps is opened.
        options: Of the run.

    Returns:
        The table.
    """
    table = sampler_table(
        options.num_inference_steps, options.flow_shift, options.sigma_table, options.first_sample
    )
    runner = open_runner(pipeline.bundle, "timestep", "fp32", pipeline.threads)
    config = TransformerConfig.from_manifest(pipeline.bundle.manifest.config["transformer"])
    conditions = encode_timesteps(runner, config, table.timesteps, options.fps)
    return DistanceTable.from_modulation(conditions.modulation)
