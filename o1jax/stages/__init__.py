"""The arrows of the loop: each reads its inputs, calls pure code, writes its result."""
