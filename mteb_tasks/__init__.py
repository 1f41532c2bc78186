"""E5-V in MTEB: model entries, the paper's whole evaluation as tasks, and the report."""
