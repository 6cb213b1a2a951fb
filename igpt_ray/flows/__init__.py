"""The Ray pipelines, one module a command. Only this sub-package, jobs/ and benchmarks/ import ray.

A flow takes settings and returns the dictionary that its command prints as JSON.
"""
