"""Reading compiled programs: written by hand, and of products whose bytes are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from o1jax.parallel import make_mesh
from o1jax.plan.hlo import Program

HEAD = 'HloModule m, is_scheduled=true, num_partitions=4\n'
SUM = """
%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}
"""


def entry(*lines: str) -> str:
  body = '\n'.join(f'  {line}' for line in lines)
  head = '\nENTRY %main (p: f32[8,128]) -> f32[8,128] {\n  %p = f32[8,128]{1,0} parameter(0)\n'
  return f'{head}{body}\n}}\n'


def reduced(groups: str) -> str:
  line = f'ROOT %r = f32[8,128]{{1,0}} all-reduce(%p), channel_id=1, {groups}, to_apply=%sum'
  return HEAD + SUM + entry(line)


@pytest.mark.parametrize(
  'groups, size',
  [
    ('replica_groups={{0,2},{1,3}}', 2),
    ('replica_groups=[1,4]<=[4]', 4),
    ('replica_groups=[2,2]<=[2,2]T(1,0), use_global_device_ids=true', 2),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}", 2),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a','b'}", 4),
    ("replica_groups=mesh['a'=8,'b'=2] {'a':(1)4}", 4),
    ('replica_groups={}', 4),
  ],
)
def test_every_spelling_of_a_group_is_read(groups, size):
  (found,) = Program(reduced(groups)).collectives
  assert (found.kind, found.payload, found.group, found.times) == ('all-reduce', 4096, size, 1)
  assert found.sent == 2 * (size - 1) / size * 4096


def test_bytes_sent_are_those_of_a_ring():
  text = HEAD + entry(
    '%g = bf16[32,128]{1,0} all-gather(%p), replica_groups=[1,4]<=[4], dimensions={0}',
    '%s = f32[2,128]{1,0} reduce-scatter(%p), replica_groups=[1,4]<=[4], to_apply=%sum',
    '%t = f32[8,128]{1,0} all-to-all(%p), replica_groups=[1,4]<=[4]',
    '%c = f32[8,128]{1,0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}',
    'ROOT %o = f32[8,128]{1,0} add(%p, %t)',
  )
  sent = {c.kind: c.sent for c in Program(text).collectives}
  assert sent == {
    'all-gather': 3 / 4 * 32 * 128 * 2,
    'reduce-scatter': 3 / 4 * 4096,
    'all-to-all': 3 / 4 * 4096,
    'collective-permute': 4096,
  }


def test_a_start_and_its_done_are_one_collective():
  text = HEAD + entry(
    '%a = (f32[8,128]{1,0}, f32[32,128]{1,0}) all-gather-start(%p), replica_groups=[1,4]<=[4]',
    '%d = f32[32,128]{1,0} all-gather-done(%a)',
    'ROOT %o = f32[8,128]{1,0} slice(%d), slice={[0:8], [0:128]}',
  )
  assert Program(text).sent == 3 / 4 * 32 * 128 * 4


def test_a_collective_spread_over_fusions_counts_once():
  gather = '%g = f32[32,128]{1,0} all-gather(%q), replica_groups=[1,4]<=[4], dimensions={0}'
  part = (
    '\n%{} (q: f32[8,128]) -> f32[32,128] {{\n  %q = f32[8,128]{{1,0}} parameter(0)\n  {}\n{}}}\n'
  )
  start = (
    '  ROOT %x = f32[32,128]{1,0} custom-call(%g), custom_call_target="AsyncCollectiveStart"\n'
  )
  fusions = part.format('first', gather, start)
  fusions += part.format('async_collective_fusion.7', gather, start.replace('Start', 'Done'))
  fusions += part.format('last', gather, start.replace('Start', 'Done'))
  lines = [
    f'%{n} = f32[32,128]{{1,0}} fusion(%p), kind=kCustom, calls=%{n}'
    for n in ('first', 'async_collective_fusion.7', 'last')
  ]
  text = HEAD + fusions + entry(*lines, 'ROOT %o = f32[8,128]{1,0} add(%p, %p)')
  assert Program(text).sent == 3 / 4 * 32 * 128 * 4


def test_a_sum_of_which_a_slice_is_kept_is_a_reduce_scatter():
  fused = """
%all-reduce-scatter.1 (q: f32[8,128]) -> f32[2,128] {
  %q = f32[8,128]{1,0} parameter(0)
  %r = f32[8,128]{1,0} all-reduce(%q), replica_groups=[1,4]<=[4], to_apply=%sum
  ROOT %s = f32[2,128]{1,0} slice(%r), slice={[0:2], [0:128]}
}
"""
  call = 'ROOT %f = f32[2,128]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1'
  (found,) = Program(HEAD + SUM + fused + entry(call)).collectives
  assert (found.kind, found.sent) == ('reduce-scatter', 3 / 4 * 4096)


LOOP = """
%body (s: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %s = (s32[], f32[8,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[8,128]{1,0} get-tuple-element(%s), index=1
  %y = f32[8,128]{1,0} all-reduce(%x), replica_groups=[1,4]<=[4], to_apply=%sum
  ROOT %t = (s32[], f32[8,128]{1,0}) tuple(%i, %y)
}

%condition (s: (s32[], f32[8,128])) -> pred[] {
  %n = s32[]{:T(128)} constant(7)
  %s = (s32[], f32[8,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %lt = pred[] compare(%i, LIMIT), direction=LT
}
"""


@pytest.mark.parametrize(
  'limit, said, times',
  [
    ('%n', '', 7),  # a TPU's program: the limit stands in the condition
    ('%i', ', backend_config={"known_trip_count":{"n":"5"}}', 5),
    ('%i', '', 3),  # ends when its data says so
  ],
)
def test_what_stands_in_a_loop_counts_as_often_as_it_runs(limit, said, times):
  loop = '%w = (s32[], f32[8,128]{1,0}) while(%t0), condition=%condition, body=%body' + said
  text = HEAD + SUM + LOOP.replace('LIMIT', limit)
  text += entry(
    '%z = s32[] constant(0)',
    '%t0 = (s32[], f32[8,128]{1,0}) tuple(%z, %p)',
    loop,
    'ROOT %o = f32[8,128]{1,0} get-tuple-element(%w), index=1',
  )
  program = Program(text, unknown_trips=3)
  assert program.sent == times * 2 * 3 / 4 * 4096
  assert program.traffic == times * 2 * 4096


def test_of_two_branches_the_dearer_counts():
  branches = """
%cheap (q: f32[8,128]) -> f32[8,128] {
  ROOT %q = f32[8,128]{1,0} parameter(0)
}

%dear (q2: f32[8,128]) -> f32[8,128] {
  %q2 = f32[8,128]{1,0} parameter(0)
  ROOT %r = f32[8,128]{1,0} all-reduce(%q2), replica_groups=[1,4]<=[4], to_apply=%sum
}
"""
  line = 'ROOT %c = f32[8,128]{1,0} conditional(%k, %p, %p), branch_computations={%cheap, %dear}'
  text = HEAD + SUM + branches + entry('%k = s32[] constant(1)', line)
  assert Program(text).sent == 2 * 3 / 4 * 4096


def test_traffic_counts_slices_as_slices_and_leaves_out_the_chip_s_own_memory():
  fused = """
%sliced (a: f32[10,8,128], i: s32[], b: f32[8,128]) -> f32[8,128] {
  %a = f32[10,8,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %b = f32[8,128]{1,0} parameter(2)
  %d = f32[1,8,128]{2,1,0} dynamic-slice(%a, %i, %i, %i), dynamic_slice_sizes={1,8,128}
  %e = f32[8,128]{1,0} bitcast(%d)
  ROOT %m = f32[8,128]{1,0} multiply(%e, %b)
}

%changed (c: f32[10,8,128], j: s32[], u: f32[1,8,128]) -> f32[10,8,128] {
  %c = f32[10,8,128]{2,1,0} parameter(0)
  %j = s32[] parameter(1)
  %u = f32[1,8,128]{2,1,0} parameter(2)
  ROOT %v = f32[10,8,128]{2,1,0} dynamic-update-slice(%c, %u, %j, %j, %j)
}
"""
  text = (
    HEAD
    + fused
    + entry(
      '%z = s32[] constant(0)',
      '%big = f32[10,8,128]{2,1,0:T(8,128)} broadcast(%z), dimensions={}',  # 40960 written, 4 read
      '%one = f32[8,128]{1,0:T(8,128)S(1)} fusion(%big, %z, %p), kind=kLoop, calls=%sliced',  # 8192
      '%u1 = f32[1,8,128]{2,1,0:T(8,128)S(1)} bitcast(%one)',
      'ROOT %two = f32[10,8,128]{2,1,0} fusion(%big, %z, %u1), kind=kLoop, calls=%changed',  # 4096
    )
  )
  # Each index is 4 bytes where it is read: once by the broadcast, once by each fusion.
  assert Program(text).traffic == 40960 + 4 + (4096 + 4096 + 4) + (4096 + 4)


def test_traffic_sees_slices_within_fusions_of_a_fusion():
  fused = """
%taken (w: f32[10,8,128]) -> f32[8,128] {
  %w = f32[10,8,128]{2,1,0} parameter(0)
  %s = f32[1,8,128]{2,1,0} slice(%w), slice={[3:4], [0:8], [0:128]}
  ROOT %b = f32[8,128]{1,0} bitcast(%s)
}

%outer (x: f32[8,128], w2: f32[10,8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0} parameter(0)
  %w2 = f32[10,8,128]{2,1,0} parameter(1)
  %layer = f32[8,128]{1,0} fusion(%w2), kind=kLoop, calls=%taken
  ROOT %m = f32[8,128]{1,0} multiply(%x, %layer)
}
"""
  text = (
    HEAD
    + fused
    + entry(
      '%z = s32[] constant(0)',
      '%big = f32[10,8,128]{2,1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"',
      'ROOT %one = f32[8,128]{1,0} fusion(%p, %big), kind=kOutput, calls=%outer',
    )
  )
  assert Program(text).traffic == 40960 + 3 * 4096


def test_a_sum_over_a_split_axis_is_one_all_reduce_of_the_product():
  mesh = make_mesh({'tensor': 8}, jax.devices()[:8])
  x = jax.ShapeDtypeStruct((64, 512), jnp.float32, sharding=NamedSharding(mesh, P(None, 'tensor')))
  w = jax.ShapeDtypeStruct((512, 32), jnp.float32, sharding=NamedSharding(mesh, P('tensor')))
  whole = NamedSharding(mesh, P())
  compiled = jax.jit(jnp.matmul, out_shardings=whole).lower(x, w).compile()
  assert Program(compiled.as_text()).sent == 2 * 7 / 8 * 64 * 32 * 4


def test_scanned_layers_gather_each_layer_s_part():
  mesh = make_mesh({'fsdp': 8}, jax.devices()[:8])
  at = lambda *shape, spec: jax.ShapeDtypeStruct(  # noqa: E731
    shape, jnp.float32, sharding=NamedSharding(mesh, spec)
  )
  rows, layers = at(1024, 128, spec=P('fsdp')), at(6, 128, 128, spec=P(None, 'fsdp'))

  def through(x, layers):
    step = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
    return jax.lax.scan(step, x, layers)[0]

  compiled = jax.jit(through, out_shardings=rows.sharding).lower(rows, layers).compile()
  program = Program(compiled.as_text())
  # Each layer's 64 KiB are gathered, in the loop or all before it: cheaper than moving the rows.
  assert program.sent == 7 / 8 * 6 * 128 * 128 * 4
  assert {c.kind for c in program.collectives} == {'all-gather'}


def test_what_is_no_program_is_refused():
  with pytest.raises(ValueError, match='no ENTRY'):
    Program('nothing of the kind')
