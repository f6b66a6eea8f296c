"""Monte-Carlo tree search on plain Python objects, in float64: what the forest is held against."""

import math

import numpy as np


class PlainNode:
  def __init__(self, parent=None, **step):
    self.parent = parent
    self.identity, self.logprob, self.score = None, 0.0, 0.0
    self.gumbel, self.terminal, self.cut = 0.0, False, False
    vars(self).update(step)
    self.visits, self.picks, self.total, self.prior = 0, 0, 0.0, 0.0
    self.own = 0  # returns seen at the node itself
    self.children = []
    self.depth = 0 if parent is None else parent.depth + 1

  @property
  def closed(self):
    if self.terminal or self.cut:
      return True
    return bool(self.children) and all(c.closed for c in self.children)


class PlainTree:
  """Monte-Carlo tree search as a textbook writes it."""

  def __init__(self, capacity):
    self.root, self.capacity = PlainNode(), capacity
    self.nodes = [self.root]
    self.full = False

  def select(self, rule, c, root_rule=None):
    node = self.root
    while node.children and not node.closed:
      asked = root_rule if root_rule and node is self.root else rule
      open_ = [child for child in node.children if not child.closed]
      node = max(open_, key=lambda child, node=node, asked=asked: asked(node, child, c))
    return node

  def expand(self, leaf, steps):
    if leaf.children or leaf.closed:
      return [None] * len(steps)
    if len(self.nodes) + len(steps) > self.capacity:
      self.full = True
      return [None] * len(steps)
    out = []
    for step in steps:
      same = [n for n in leaf.children if n.identity == step['identity']]
      if same:
        out.append(same[0])
        continue
      node = PlainNode(leaf, **step)
      leaf.children.append(node)
      self.nodes.append(node)
      out.append(node)
    up = leaf
    while up is not None:
      up.picks += 1
      up = up.parent
    weights = [math.exp(n.logprob) for n in leaf.children]
    for node, weight in zip(leaf.children, weights, strict=True):
      node.prior = weight / sum(weights)
    return out

  def backup(self, node, value):
    node.own += 1
    while node is not None:
      node.visits += 1
      node.total += value
      node = node.parent


def plain_uct(parent, child, c):
  if child.visits == 0:
    return math.inf
  return child.total / child.visits + c * math.sqrt(math.log(parent.visits) / child.visits)


def plain_puct(parent, child, c):
  value = child.total / child.visits if child.visits else child.score
  return value + c * child.prior * math.sqrt(max(parent.visits, 1)) / (1 + child.visits)


def completed_values(parent):
  """sigma(q) of a node's children, q completed by Danihelka et al. 2022, equation 33."""
  prior = np.array([child.prior for child in parent.children])
  picks = np.array([child.picks for child in parent.children])
  seen = np.array([child.visits > 0 for child in parent.children])
  means = np.array([child.total / max(child.visits, 1) for child in parent.children])
  mixed = parent.score
  if seen.any():
    mixed += picks.sum() * np.average(means[seen], weights=prior[seen])
  values = np.where(seen, means, mixed / (1 + picks.sum()))
  spread = values.max() - values.min()
  unit = (values - values.min()) / max(spread, 1e-8)
  return (50 + picks.max()) * 0.1 * unit


def plain_gumbel_interior(parent, child, c):
  del c
  weights = np.exp(completed_values(parent)) * [child.prior for child in parent.children]
  at = parent.children.index(child)
  picks = sum(child.picks for child in parent.children)
  return weights[at] / weights.sum() - child.picks / (1 + picks)


def halving(children, simulations):
  """(children in play, picks each gets) of every phase of sequential halving."""
  phases, left = [], simulations
  count = max(1, math.ceil(math.log2(children)))
  in_play = children
  while left > 0:
    share = max(1, simulations // (count * in_play))
    phases.append((in_play, share))
    left -= share * in_play
    in_play = max(min(2, children), in_play // 2)
  return phases


def plain_gumbel_root(simulations):
  """Best first among the children whose turn it is; where those are closed, among the others."""

  def rule(parent, child, c):
    del c
    spent = sum(sibling.picks for sibling in parent.children)
    wanted = 0
    for in_play, share in halving(len(parent.children), simulations):
      if spent < in_play * share:
        wanted += spent // in_play
        break
      spent, wanted = spent - in_play * share, wanted + share
    at = parent.children.index(child)
    score = child.gumbel + math.log(child.prior) + completed_values(parent)[at]
    return child.picks == wanted, score

  return rule
