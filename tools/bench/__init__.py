"""What the tools/bench_*.py are made of."""
