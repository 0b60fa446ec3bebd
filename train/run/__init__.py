"""What every training run needs, whatever it trains: strategies, checkpoints, preemption, schedules."""
