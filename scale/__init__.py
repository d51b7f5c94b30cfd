"""Beyond a laptop: several GPUs or the host's memory, the plan of what a run takes, and how long a step takes."""
