"""What a written folder holds, and the proof that it loads."""
