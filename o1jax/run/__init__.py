"""A run's folder: what is finished, what is half done, what was measured, what is shown."""
