"""A right and a wrong program, and limits, for tests with real zygotes."""

from o1jax.sandbox import Job, Limits
from o1jax.types import TestCase

ECHO = (TestCase('a', 'a'), TestCase('b c', 'b c'))
RIGHT, WRONG = Job('print(input())', ECHO), Job('print(1)', ECHO)
LIMITS = Limits(cpu_s=0.5)
