"""How well a model reads: loss by position and by length of context, recall tasks, a RULER-style set."""
