"""What `tools/bench_migration.py` measures: conversions in a process of their own, and bounds."""
