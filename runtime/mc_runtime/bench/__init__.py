"""`mc-bench`: latency, memory and cost of a bundle, measured here or predicted elsewhere.

`cli` has the commands; `policies` and `policy_report` compare cache policies.
"""
