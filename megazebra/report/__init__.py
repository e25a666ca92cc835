"""One HTML page about a run: its metrics, configuration, checkpoints and evaluations. No torch, no network."""
