"""The Ray pipelines: prepare, train, infer, serve; and local.py, a whole cluster on one machine for the demo.

Only this folder and jobs/ import ray. Each flow takes settings and returns the dictionary its job prints.
"""
