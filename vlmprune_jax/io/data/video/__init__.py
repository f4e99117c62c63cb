"""Video files to sampled frames: decoding in a separate process with limits."""
