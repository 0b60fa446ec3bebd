"""The labelling page: its server, who may use it, and what can be marked."""
