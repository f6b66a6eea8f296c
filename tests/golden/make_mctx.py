"""Writes mctx.json: visit counts of DeepMind's mctx on the toy tree.

    pip install mctx==0.0.71
    python tests/golden/make_mctx.py

Kept beside its numbers and not run in CI. PUCT is `muzero_policy` without noise at the root, its
logarithmic term switched off by a huge base, on plain means, with the value of an unvisited child
in place of its mean; Gumbel is `gumbel_muzero_policy` as it comes.
"""

from __future__ import annotations

import json
import pathlib

import jax
import jax.numpy as jnp
import mctx
import numpy as np
import toy_tree as toy

HERE = pathlib.Path(__file__).parent
C = 1.25


def means(tree, node_index):
  """Plain means, and an unvisited child's value."""
  state = tree.embeddings[node_index]
  values = toy.value(toy.child(state, jnp.arange(toy.ACTIONS)))
  return jnp.where(tree.children_visits[node_index] > 0, tree.qvalues(node_index), values)


def step(params, key, action, state):
  del params, key
  state = toy.child(state, action)
  ones = jnp.ones(state.shape)
  out = mctx.RecurrentFnOutput(
    reward=0 * ones, discount=ones, prior_logits=toy.logits(state), value=toy.value(state)
  )
  return out, state


def visits(out) -> list:
  return np.asarray(out.search_tree.summary().visit_counts).astype(int).tolist()


def main() -> None:
  state = toy.roots()
  root = mctx.RootFnOutput(prior_logits=toy.logits(state), value=toy.value(state), embedding=state)
  puct = mctx.muzero_policy(
    None,
    jax.random.key(0),
    root,
    step,
    num_simulations=toy.SIMULATIONS,
    dirichlet_fraction=0.0,
    pb_c_init=C,
    pb_c_base=1e12,
    qtransform=means,
  )
  gumbel = mctx.gumbel_muzero_policy(
    None,
    jax.random.key(1),
    root,
    step,
    num_simulations=toy.SIMULATIONS,
    max_num_considered_actions=toy.ACTIONS,
  )
  noise = np.asarray(gumbel.search_tree.extra_data.root_gumbel)
  deepest = int(np.asarray(puct.search_tree.node_visits > 0).sum(-1).max())
  golden = {
    'c': C,
    'puct': visits(puct),
    'gumbel': visits(gumbel),
    'noise': [[float(x) for x in row] for row in noise],
  }
  (HERE / 'mctx.json').write_text(json.dumps(golden) + '\n')
  print(f'{toy.TREES} trees of {deepest} nodes')


if __name__ == '__main__':
  main()
