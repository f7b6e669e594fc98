"""Two long-lived processes that do the same work, one with the published code and one with ours.

`benchmarks.published` starts both and gives them work in turn. They run in different environments,
so `protocol` needs the standard library alone, `model_work` torch, `published_code` what the
published code needs, and only `our_code` this project.
"""
