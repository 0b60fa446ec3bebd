"""Low-rank adapters of drafters: what they change, their folder, and drafters that have one."""
