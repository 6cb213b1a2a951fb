"""Speed and quality beside the alternatives, taking turns in one run: what `jobs/bench.py` calls, a file a subject."""
