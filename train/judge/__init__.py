"""Training a judge: its data, its fit, its metrics and figures."""
