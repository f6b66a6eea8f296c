"""O1-CODER in JAX: tree search, process rewards and RL for code models, in one loop."""
