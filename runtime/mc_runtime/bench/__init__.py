"""`mc-bench`: latency, memory and cost of a bundle, measured here or predicted elsewhere.

`cli` has the commands. `run` compares cache policies (`policies`, `policy_report`,
`policy_page`), or times engines and whole generations (`sweep`, `generation`, `latency_report`,
`latency_page`); `compare` holds two of those reports against each other; `predict` walks a schedule
over a `roofline`.
"""

__all__: list[str] = []
