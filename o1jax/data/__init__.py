"""Problems, reasoning paths and roll-outs as token rows and batches."""
