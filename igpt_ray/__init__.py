"""Image GPT ("Generative Pretraining from Pixels") as a distributed system on Ray."""
