"""Image GPT ("Generative Pretraining from Pixels") as a distributed system on Ray."""

__version__ = "0.2.0"
