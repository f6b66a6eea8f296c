"""The plan of a run: every step compiled for devices that are not there, and what it adds up to."""

import dataclasses
import json
import types

import jax
import pytest

from o1jax import config as config_lib
from o1jax.models import Model, ModelConfig
from o1jax.parallel import make_mesh
from o1jax.parallel.platform import platform
from o1jax.plan import chips, counts, measure, plan, steps
from o1jax.plan import step as step_lib
from o1jax.plan.__main__ import main
from o1jax.plan.arguments import Arguments, device_bytes
from o1jax.plan.flops import Flops
from o1jax.plan.hlo import Program
from o1jax.plan.step import Step
from o1jax.stages.fit import optimizer

ARCH = ModelConfig(512, 64, 2, 4, 2, 160, max_position=256)
MODEL = Model(ARCH)
PARAMETERS = sum(x.size for x in jax.tree.leaves(MODEL.shapes()))
SETTINGS = [
  'data.max_prompt_tokens=32',
  'data.max_path_tokens=32',
  'search.rows=16',
  'eval.rows=16',
  'policy_sft.optim.batch=16',
  'mesh.fsdp=4',
  'mesh.tensor=2',
]


@pytest.fixture(scope='module')
def shape(tmp_path_factory):
  """A Hub config.json, and nothing beside it."""
  path = tmp_path_factory.mktemp('shapes') / 'tiny.json'
  path.write_text(json.dumps(ARCH.to_hub()))
  return str(path)


@pytest.fixture(scope='module')
def command(shape, tmp_path_factory):
  """Arguments of the command for the tiny model, but for the topology."""
  path = tmp_path_factory.mktemp('configs') / 'run.yaml'
  path.write_text('run: {rounds: 1}\nmodel: {path: /no/such/folder}\n')
  return ['--config', str(path), '--model-config', shape, *SETTINGS]


@pytest.fixture(scope='module')
def planned(command):
  """`policy_sft` and `decode` for eight H100, as the command prints them."""
  from contextlib import redirect_stdout
  from io import StringIO

  text = StringIO()
  args = ['--topology', 'h100:8', '--steps', 'policy_sft,decode', '--price', '2.5', '--json']
  with redirect_stdout(text):
    code = main([*command, *args, '--efficiency', '0.5'])
  assert code == 0
  return json.loads(text.getvalue())


def test_the_plan_of_a_tiny_run(planned):
  assert planned['parameters'] == PARAMETERS
  assert planned['mesh'] == {'data': 1, 'fsdp': 4, 'sequence': 1, 'tensor': 2}
  assert planned['compiled_for'] == 'virtual CPU devices'
  decode, sft = planned['steps']
  assert (sft['step'], sft['rows'], sft['width']) == ('policy_sft', 16, 64)
  # Parameters and two moments in float32, over eight devices, but for norms and biases.
  assert sft['argument_bytes'] == pytest.approx(12 * PARAMETERS / 8, rel=0.05)
  assert sft['peak_bytes'] > 16 * PARAMETERS / 8  # the gradient too
  assert sft['fits'] and sft['there_bytes'] == 80e9
  # Each device gathers its share of every parameter at least once.
  assert sft['sent_bytes'] > 4 * PARAMETERS / 2 * 3 / 4 / 2
  # 16 rows of 64 columns of keys and values of one head each, and a half of the parameters.
  cache = 2 * 2 * (16 // 4) * 64 * 16 * 4
  assert decode['peak_bytes'] > cache + 4 * PARAMETERS / 8
  assert decode['flops']['computed'] > 16 * 32 * 2 * (PARAMETERS - 512 * 64)


def test_the_roofline_names_what_sets_the_time(planned):
  for row in planned['steps']:
    line, chip = row['roofline'], chips.CHIPS['h100']
    assert line['compute'] == row['flops']['computed'] / 8 / chip.f32
    assert line['memory'] == row['traffic_bytes'] / chip.bandwidth
    assert line['interconnect'] == row['sent_bytes'] / chip.link
    assert line['seconds'] == max(line[k] for k in ('compute', 'memory', 'interconnect'))
    assert line[line['bound']] == line['seconds']


def test_hours_and_cost_add_up(planned):
  run = planned['run']
  seconds = sum(row['calls'] * row['roofline']['seconds'] for row in planned['steps'])
  assert run['hours'] == pytest.approx(seconds / 3600 / 0.5)
  assert run['chip_hours'] == pytest.approx(8 * run['hours'])
  assert run['cost_usd'] == pytest.approx(2.5 * run['chip_hours'])
  updates = 2 * config_lib.Config().policy_sft.optim.steps  # round 0 and the control
  assert run['tokens_trained'] == updates * 16 * 64


def test_the_tables(command, capsys):
  assert main([*command, '--topology', 'cpu:8', '--steps', 'prefill']) == 0
  out = capsys.readouterr().out
  assert 'cpu:8, 8 devices of ' in out and 'mesh data=1 fsdp=4 sequence=1 tensor=2' in out
  assert 'compiled for virtual CPU devices' in out
  row = next(line for line in out.splitlines() if '16 x 32' in line)
  assert 'prefill' in row and 'yes' in row
  assert 'tokens generated, at most' in out


def test_what_does_not_fit_is_said_with_the_most_rows_that_do(command, capsys, monkeypatch):
  peak = measure.estimate(one_step('prefill'), chips.parse('cpu:8'), 'float32', 8).peak_bytes
  beside = plan.beside_bytes(Arguments(config_of(run={'rounds': 1}), MODEL, mesh_of()), 'prefill')
  small = dataclasses.replace(chips.CHIPS['cpu'], memory=peak + beside)
  monkeypatch.setitem(chips.CHIPS, 'cpu', small)
  assert main([*command, '--topology', 'cpu:8', '--steps', 'prefill']) == 1
  out = capsys.readouterr().out
  assert 'prefill: 16 rows do not fit; the most that do are 8 (search.rows)' in out


def test_what_the_run_holds_beside_a_step_counts():
  given = Arguments(config_of(run={'rounds': 2}), MODEL, mesh_of())
  one = device_bytes(given.base())
  assert one == pytest.approx(4 * PARAMETERS / 8, rel=0.05)  # norms and biases lie whole
  prm = device_bytes(given.params('prm'))
  assert prm == one + 4 * (64 * 64 + 64 + 2)  # the head lies whole
  # Base, TCG, round 0's two policies and PRM, the control; in RL this round's policy and PRM too.
  assert plan.beside_bytes(given, 'policy_sft') == 5 * one + prm
  assert plan.beside_bytes(given, 'rl') == 6 * one + 2 * prm
  assert plan.beside_bytes(given, 'decode') == 6 * one + prm + 2 * one  # RL's moments


def test_adapters_share_the_base():
  lora = {'policy': {'rank': 2}, 'tcg': {'rank': 2}, 'prm': {'rank': 2}}
  given = Arguments(config_of(lora=lora, run={'rounds': 2}), MODEL, mesh_of())
  state, frozen = given.state('policy', optimizer(given.config.policy_sft.optim))
  assert device_bytes(frozen) >= device_bytes(given.base())
  factors = sum(x.size for x in jax.tree.leaves(state.params))
  assert factors == step_lib.factors(given, 'policy') < PARAMETERS / 10
  assert step_lib.factors(given, 'prm') == 2 * factors
  assert sum(x.size for x in jax.tree.leaves(state.opt_state)) == 2 * factors + 2
  whole = Arguments(config_of(run={'rounds': 2}), MODEL, mesh_of())
  assert plan.beside_bytes(given, 'decode') < 0.2 * plan.beside_bytes(whole, 'decode')
  found = steps.of_run(given.config, MODEL, mesh_of())
  for name in ('policy_sft', 'prm', 'rl'):
    assert next(step for step in found if step.name == name).lower(64).out_info is not None
  quantised = Arguments(config_of(lora=lora | {'base': 'nf4'}), MODEL, mesh_of())
  assert device_bytes(quantised.base()) < 0.6 * device_bytes(given.base())


def config_of(**sections):
  nested: dict = {}
  for key, value in (text.split('=') for text in SETTINGS if not text.startswith('mesh')):
    *names, last = key.split('.')
    inner = nested
    for part in names:
      inner = inner.setdefault(part, {})
    inner[last] = int(value)
  return config_lib.check(nested | sections)


def mesh_of():
  return make_mesh({'fsdp': 4, 'tensor': 2}, jax.devices()[:8])


def one_step(name) -> Step:
  found = steps.of_run(config_of(), MODEL, mesh_of())
  return next(step for step in found if step.name == name)


def test_bisection_finds_what_a_scan_finds(monkeypatch):
  topology = dataclasses.replace(chips.parse('cpu:1'))
  for most in range(12):

    def fits(step, topology, dtype, rows, beside, most=most):
      assert rows % 4 == 0
      return types.SimpleNamespace(fits=rows <= 4 * most, compile_s=0.0)

    monkeypatch.setattr(measure, 'estimate', fits)
    step = Step('s', 'k', 48, 4, 8, None, None)
    assert measure.largest_rows(step, topology, 'float32') == 4 * most


def test_a_compiler_that_runs_out_of_memory_says_how_much_it_wanted():
  text = (
    'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. '
  )
  text += 'Used 16.37G of 15.75G hbm. Exceeded hbm capacity by 636.33M.'

  def lower(rows):
    raise jax.errors.JaxRuntimeError(text)

  step = Step('s', 'k', 8, 4, 8, lower, lambda rows: Flops(rows, rows))
  found = measure.estimate(step, chips.parse('v5e:2x2'), 'float32')
  assert not found.fits and found.peak_bytes == int(16.37 * 2**30)
  with pytest.raises(jax.errors.JaxRuntimeError, match='another'):
    lower = types.SimpleNamespace(
      lower=lambda rows: (_ for _ in ()).throw(jax.errors.JaxRuntimeError('another fault'))
    )
    measure.estimate(
      dataclasses.replace(step, lower=lower.lower), chips.parse('v5e:2x2'), 'float32'
    )


def test_a_program_that_cannot_be_read_still_has_its_memory():
  def unreadable():
    raise jax.errors.JaxRuntimeError('INTERNAL: RET_CHECK failure proto.operand_ids_size()')

  memory = types.SimpleNamespace(peak_memory_in_bytes=3 << 30)
  compiled = types.SimpleNamespace(memory_analysis=lambda: memory, as_text=unreadable)
  lowered = types.SimpleNamespace(compile=lambda: compiled)
  traced = []
  lower = lambda rows: traced.append(platform()) or lowered  # noqa: E731
  step = Step('s', 'k', 8, 4, 8, lower, lambda rows: Flops(rows, rows))
  found = measure.estimate(step, chips.parse('v5e:2x2'), 'float32', beside=1 << 30)
  assert traced == ['tpu'] and platform() == 'cpu'  # in the form that a TPU runs
  assert found.fits and found.peak_bytes == 3 << 30 and found.roofline is None
  assert not measure.estimate(step, chips.parse('v5e:2x2'), 'float32', beside=13 << 30).fits


@pytest.mark.parametrize(
  'settings, names',
  [
    ({'algorithm': 'grpo'}, {'rl'}),
    ({'algorithm': 'grpo', 'kl_coef': 0.1}, {'rl', 'rl/logprobs'}),
    ({'algorithm': 'dpo', 'minibatch': 96}, {'rl', 'rl/logprobs'}),
    ({'algorithm': 'ppo', 'critic': 'own'}, {'rl', 'rl/values'}),
  ],
)
def test_a_run_has_the_steps_that_its_config_asks_for(settings, names):
  config = config_lib.check({'rl': settings, 'data': {'max_path_tokens': 80}})
  found = steps.of_run(config, MODEL, make_mesh({}, jax.devices()[:1]))
  always = {'tcg/sft', 'tcg/logprobs', 'tcg/dpo', 'tcg/control', 'policy_sft', 'prm'}
  always |= {'prefill', 'expand', 'decode', 'score'}
  assert {step.name for step in found} == always | {'prm/scores'} | names
  called = counts.calls(config, found)
  assert called.keys() == {step.name for step in found} and min(called.values()) > 0
  for step in found:  # traced, not compiled: the arguments are what the functions expect
    if step.name in names:
      assert step.lower(step.rows).out_info is not None


def test_rows_stay_on_their_devices_in_training():
  """The parameters travel, not the states: these would be 40 times more bytes."""
  model = Model(ModelConfig(128, 32, 2, 4, 2, 64, max_position=512))
  config = config_lib.check(
    {
      'data': {'max_prompt_tokens': 128, 'max_path_tokens': 128},
      'policy_sft': {'optim': {'batch': 64}},
    }
  )
  mesh = make_mesh({'fsdp': 8}, jax.devices()[:8])
  step = next(s for s in steps.of_run(config, model, mesh) if s.name == 'policy_sft')
  sent = Program(step.lower(64).compile().as_text()).sent
  parameters = 4 * sum(x.size for x in jax.tree.leaves(model.shapes()))
  one_state = 4 * 64 * 256 * 32
  assert sent < 8 * parameters < one_state


def test_counts_of_a_small_run():
  config = config_lib.check(
    {
      'run': {'rounds': 1},
      'data': {'train_problems': 10, 'dev_problems': 5, 'test_problems': 7, 'max_path_tokens': 50},
      'search': {'simulations': 6, 'children': 4},
      'rl': {'iterations': 3, 'problems': 2, 'group': 4, 'minibatch': 4, 'control': False},
      'tcg': {'problems': 10, 'samples': 2, 'eval_problems': 5, 'max_tokens': 20},
      'eval': {'samples': 2, 'test_time': False},
    }
  )
  assert counts.sampled(config) == {
    'search': 10 * 8,  # two simulations of four
    'rl': 3 * 8,
    'dev': 2 * 3 * 5,  # after SFT and RL, greedy and two samples
    'prm dev': 32 * 5,
    'test': 3 * 3 * 7,
    'prm test': 2 * 32 * 7,
  }
  parts = 10 * 2 + 6 * 5
  assert counts.generated(config) == 50 * (80 + 24 + 30 + 160 + 63 + 448) + 20 * parts
  assert counts.trained(config)['rl'] == 3 * 2
  renewing = config.model_copy(update={'prm': config.prm.model_copy(update={'renew': True})})
  assert counts.trained(renewing)['prm'] == 2 * counts.trained(config)['prm']
  more = counts.sampled(renewing)
  assert more['prm test'] == 3 * 32 * 7 and more['prm dev'] == 2 * 32 * 5
  last = config.prm.model_copy(update={'renew': 'last', 'samples': 4, 'renew_steps': 7})
  rounds = config.run.model_copy(update={'rounds': 3})
  judge = config.data.model_copy(update={'judge_problems': 20})
  held = config.model_copy(update={'prm': last, 'run': rounds, 'data': judge})
  assert counts.trained(held)['prm'] == 3 * config.prm.optim.steps + 7
  assert counts.sampled(held)['prm'] == 4 * (3 * 10 + 3 * 6 + 20)
  assert counts.kept(held, 'rl')['prm'] == 3 and counts.kept(held, 'prm')['prm'] == 3
  told = {'test_time': True, 'search': 'voted', 'search_children': 2, 'search_simulations': 5}
  voted = config.model_copy(update={'eval': config.eval.model_copy(update=told)})
  # Three policies, each searched and beside it sampled with as many tokens.
  assert counts.sampled(voted)['search test'] == 3 * 2 * 10 * 7
  told = {'rule': 'distinct', 'simulations': 5}
  distinct = config.model_copy(update={'search': config.search.model_copy(update=told)})
  assert counts.sampled(distinct)['search'] == counts.sampled(distinct)['search control'] == 10 * 5


def test_the_published_shapes_have_the_published_sizes():
  sizes = {'1.5b': 1_543_714_304, '7b': 7_615_616_512}
  for name, size in sizes.items():
    config = config_lib.Config()
    model = plan.model_of(config, f'configs/shapes/qwen2.5-coder-{name}.json')
    assert sum(x.size for x in jax.tree.leaves(model.shapes())) == size
    assert model.config.dtype == 'float32'  # model.dtype, not what the weights are kept in


@pytest.mark.parametrize(
  'topology, message',
  [
    ('v5:2x2', "no chip 'v5'; did you mean v5p?"),
    ('h10:8', "no chip 'h10'; did you mean h100?"),
    ('v5e', "'v5e' has no shape of devices; give the slice, as in v5e:4x4"),
    ('cpu:0', "'cpu:0' has no shape of devices; give as in cpu:8"),
    ('cpu:4096', 'JAX has 8 CPU devices; start it with'),
  ],
)
def test_topologies_that_there_are_not(command, capsys, topology, message):
  assert main([*command, '--topology', topology]) == 2
  assert message in capsys.readouterr().err


def test_without_libtpu_the_command_says_what_to_install(command, capsys, monkeypatch):
  monkeypatch.setattr(chips.importlib.util, 'find_spec', lambda name: None)
  assert main([*command, '--topology', 'v5e:2x2']) == 2
  assert "pip install 'o1jax[tpu-plan]'" in capsys.readouterr().err


def test_a_libtpu_that_jax_was_not_made_with_is_named(monkeypatch):
  versions = {'libtpu': '0.0.52', 'jax': '0.10.2'}
  monkeypatch.setattr(chips.metadata, 'version', versions.__getitem__)
  wanted = ['numpy>=2', 'libtpu==0.0.42.*; extra == "tpu"']
  monkeypatch.setattr(chips.metadata, 'requires', lambda name: wanted)
  assert 'libtpu 0.0.52 is not the one for jax 0.10.2 (==0.0.42.*)' in chips.unfit_libtpu()
  versions['libtpu'] = '0.0.42.1'
  assert chips.unfit_libtpu() is None


@pytest.mark.parametrize(
  'more, message',
  [
    (['--steps', 'policy_stf'], "no step 'policy_stf'; did you mean policy_sft?"),
    (['mesh.fsdp=3'], 'needs 6 devices, found 8; use data=8'),
    (['policy_sft.optim.batch=6'], 'batch=6 does not divide over data*fsdp=4'),
    (['mesh.tensor=8', 'mesh.fsdp=1'], 'heads=4 does not divide over tensor=8'),
    (['--model-config', 'configs'], "'configs': expected a Hub config.json"),
    (['--model-config', 'none.json'], 'none.json does not exist'),
  ],
)
def test_faults_are_named(command, capsys, more, message):
  assert main([*command, '--topology', 'cpu:8', *more]) == 2
  assert message in capsys.readouterr().err


@pytest.mark.parametrize(
  'option', [['--price', '-1'], ['--efficiency', '0'], ['--efficiency', '2']]
)
def test_prices_and_shares_are_checked(command, option):
  with pytest.raises(SystemExit) as end:
    main([*command, '--topology', 'cpu:8', *option])
  assert end.value.code == 2


def test_what_jax_reads_is_set_before_it_starts():
  environ = {'XLA_FLAGS': '--xla_one=1'}
  chips.prepare(chips.parse('h100:8'), environ)
  assert environ['JAX_PLATFORMS'] == 'cpu'
  assert environ['XLA_FLAGS'].startswith('--xla_one=1 --xla_force_host_platform_device_count=8')
  assert chips.parse('v5p:2x2x4').count == 16
  assert chips.parse('cpu:2').memory < chips.parse('cpu:1').memory


def test_a_tpu_s_compiler_is_asked(command, capsys):
  pytest.importorskip('libtpu')
  args = ['--topology', 'v5e:2x2', '--steps', 'prefill', '--json', 'mesh.fsdp=2']
  assert main([*command, *args]) == 0
  (row,) = json.loads(capsys.readouterr().out)['steps']
  assert row['peak_bytes'] > 4 * PARAMETERS / 4 and row['there_bytes'] == int(15.75 * 2**30)
  assert row['roofline']['seconds'] > 0


def test_a_tpu_s_kernel_is_compiled(command, capsys, tmp_path):
  pytest.importorskip('libtpu')
  args = ['--topology', 'v5e:2x2', '--steps', 'policy_sft', '--json', 'mesh.fsdp=2']
  assert main([*command, *args, 'model.attention=splash', '--dump', str(tmp_path)]) == 0
  (row,) = json.loads(capsys.readouterr().out)['steps']
  assert row['fits'] and row['traffic_bytes'] > 0
  assert 'splash' in (tmp_path / 'policy_sft.hlo.txt').read_text()
