"""Foundation of every room: errors, checks, settings, safe reading, atomic writing, journals, console, chips."""
