"""Operations as the papers on caching count them, and what lies between their figures and ours.

Neighbours: `flops` counts what is computed; `scripts/roofline_check` predicts published runs.
"""

__all__ = ["explain_difference", "published_causal_work", "published_work"]

import numpy as np
from numpy.typing import NDArray

from mc_runtime.flops import (
    Job,
    ModelFlops,
    Work,
    causal_blocks,
    chunk_causal_work,
    count_due,
)

PUBLISHED_TEXT_TOKENS = 512


def published_work(flops: ModelFlops, job: Job) -> Work:
    """Count the uncached run as published: every chunk in every row, yet chunk-causal.

    It is not what the uncached run computes, which is `vanilla_work`: there, a chunk sees the
    whole window.

    Args:
        flops: Of the model.
        job: Of the generation.

    Returns:
        The operations; a forward is blocks and the keys of 512 text tokens, nothing else.

    Source:
        113 PF for SkyReels-V2 in MotionCache; FlowCache 1fdfa57, its spreadsheet of FLOPs.
    """
    return _published(flops, job, count_due(job).rows)


def published_causal_work(flops: ModelFlops, job: Job) -> Work:
    """Count, in the published way, the published cached code when it skips nothing.

    Chunks run only in the rows in which they take a step; a prefix once per window; there are no
    clean passes.

    Args:
        flops: Of the model.
        job: Of the generation.

    Returns:
        The operations; a forward is blocks and the keys of 512 text tokens, nothing else.

    Source:
        MotionCache a8d2a47, modules/transformer_motion.py.
    """
    passes = count_due(job)
    return _published(flops, job, passes.steps + passes.prefix)


def _published(flops: ModelFlops, job: Job, forwards: NDArray[np.int64]) -> Work:
    branches, computed = len(job.text_tokens), job.chunk_tokens * forwards
    return Work(
        embed=0,
        text_projection=0,
        text_keys=branches * int(forwards.sum()) * flops.text_keys(PUBLISHED_TEXT_TOKENS),
        blocks=branches * causal_blocks(flops, job.chunk_tokens, computed, PUBLISHED_TEXT_TOKENS),
        head=0,
    )


def explain_difference(flops: ModelFlops, job: Job) -> dict[str, int]:
    """Lead from the published count of the uncached run to ours of the policy `none`.

    Args:
        flops: Of the model.
        job: Of the generation.

    Returns:
        Lines that add up to `chunk_causal_work` less `published_work`. The first alone leads to
        `published_causal_work`.
    """
    ours, published = chunk_causal_work(flops, job), published_causal_work(flops, job)
    passes = count_due(job)
    finished = job.chunk_tokens * (passes.clean - passes.prefix)
    clean = sum(causal_blocks(flops, job.chunk_tokens, finished, text) for text in job.text_tokens)
    return {
        "chunks that take no step": published.total - published_work(flops, job).total,
        "text keys once per prompt": ours.text_keys - published.text_keys,
        "clean passes of finished chunks": clean,
        "length of the text": ours.blocks - clean - published.blocks,
        "embed": ours.embed,
        "text projection": ours.text_projection,
        "head": ours.head,
    }
