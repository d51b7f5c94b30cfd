"""How a run is executed, and nothing of the paper: fast ways, models, a run's folder and state, files, tables."""
