"""What training costs: time of a step, memory, processes, and the cost model."""
