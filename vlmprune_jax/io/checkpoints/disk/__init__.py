"""Files of a checkpoint: validated reading, streamed writing."""
