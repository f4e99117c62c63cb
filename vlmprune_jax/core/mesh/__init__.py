"""Device mesh, sharding rules, and cooperation of the processes of a run."""
