"""Files of a checkpoint: validated reading, verified and atomic writing."""
