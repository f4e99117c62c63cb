"""Files of a workdir and the record of their origin: the contract between stages, sweeps and reports."""
