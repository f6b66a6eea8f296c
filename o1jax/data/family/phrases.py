"""How a clause is said: at least four phrases for every operation, read-out and context clause.

`{k}` is the slot of the parameter. A number is one token together with the space before it, so a
phrase is cut at ` {k}` into the fragments that the tokenizer knows whole.
"""

from __future__ import annotations

OP_PHRASES: dict[str, tuple[str, ...]] = {
  'le': (
    'keep the numbers up to {k}',
    'keep only values of at most {k}',
    'drop everything above {k}',
    'throw out numbers bigger than {k}',
  ),
  'lt': (
    'keep the numbers below {k}',
    'keep only values under {k}',
    'drop everything from {k} up',
    'throw out numbers that reach {k}',
  ),
  'ge': (
    'keep the numbers from {k} up',
    'keep only values of at least {k}',
    'drop everything below {k}',
    'throw out numbers smaller than {k}',
  ),
  'gt': (
    'keep the numbers above {k}',
    'keep only values over {k}',
    'drop everything up to {k}',
    'throw out numbers not above {k}',
  ),
  'even': (
    'keep the even numbers',
    'remove the odd ones',
    'leave only even values',
    'filter out anything odd',
  ),
  'odd': (
    'keep the odd numbers',
    'remove the even ones',
    'leave only odd values',
    'filter out anything even',
  ),
  'add': (
    'add {k} to each',
    'increase every number by {k}',
    'raise each value by {k}',
    'put {k} on top of each number',
  ),
  'sub': (
    'subtract {k} from each',
    'decrease every number by {k}',
    'lower each value by {k}',
    'take {k} away from each number',
  ),
  'mod': (
    'take each modulo {k}',
    'replace each by its remainder by {k}',
    'reduce every number mod {k}',
    'keep what is left of each after division by {k}',
  ),
  'div': (
    'divide each by {k} rounding down',
    'take the whole part of each over {k}',
    'integer-divide every number by {k}',
    'cut each to its quotient by {k}',
  ),
  'square': (
    'square each',
    'multiply each by itself',
    'raise each to the power of two',
    'replace every number by its square',
  ),
  'double': (
    'double each',
    'multiply each by two',
    'replace every number by twice itself',
    'add each number to itself',
  ),
  'absdiff': (
    "take each one's distance to {k}",
    'replace each by its gap from {k}',
    'measure how far each is from {k}',
    'use the absolute difference of each and {k}',
  ),
  'sort_asc': (
    'sort in ascending order',
    'sort the numbers upwards',
    'arrange from lowest to highest',
    'order with the smallest in front',
  ),
  'sort_desc': (
    'sort in descending order',
    'sort the numbers downwards',
    'arrange from highest to lowest',
    'order with the largest in front',
  ),
  'cumsum': (
    'take running totals',
    'replace each by the sum so far',
    'make cumulative sums',
    'add up as you go',
  ),
  'diffs': (
    'take differences of neighbours',
    'subtract each from the next',
    'list the steps between neighbours',
    'replace the list by its adjacent differences',
  ),
  'dup': (
    'write each number twice',
    'repeat every number in place',
    'duplicate each element',
    'put a copy behind each number',
  ),
  'reverse': (
    'reverse the list',
    'turn the order around',
    'read it from back to front',
    'flip the whole list',
  ),
  'swap': (
    'swap the two ends',
    'exchange the first and the last',
    'let first and last change places',
    'trade the outer items',
  ),
  'dedupe': (
    'drop repeats keeping the first of each',
    'remove duplicates in order',
    'keep one of every kind',
    'make the items unique',
  ),
  'once': (
    'keep what occurs exactly once',
    'remove all that has a duplicate',
    'leave only the singles',
    'throw out anything repeated',
  ),
  'drop_first': (
    'drop the first {k}',
    'cut {k} off the front',
    'skip the leading {k}',
    'remove {k} from the start',
  ),
  'drop_last': (
    'drop the last {k}',
    'cut {k} off the back',
    'skip the trailing {k}',
    'remove {k} from the end',
  ),
  'take_first': (
    'take the first {k}',
    'keep just the leading {k}',
    'cut the list down to {k} items',
    'stop after {k} items',
  ),
  'rotl': (
    'rotate left by {k}',
    'move {k} from the front to the back',
    'shift to the left around by {k}',
    'let the first {k} go to the end',
  ),
  'rotr': (
    'rotate right by {k}',
    'move {k} from the back to the front',
    'shift to the right around by {k}',
    'let the last {k} go to the start',
  ),
  'evpos': (
    'take every second from the first on',
    'keep positions one, three and so on',
    'pick every other item starting with the first',
    'skip each second item',
  ),
  'odpos': (
    'take every second from the second on',
    'keep positions two, four and so on',
    'pick every other item starting with the second',
    'skip each first item of a pair',
  ),
  'longer': (
    'keep words longer than {k}',
    'drop words of up to {k} letters',
    'keep words with more than {k} letters',
    'leave words whose length exceeds {k}',
  ),
  'shorter': (
    'keep words shorter than {k}',
    'drop words of {k} letters or more',
    'keep words with fewer than {k} letters',
    'leave words whose length is below {k}',
  ),
  'vowel': (
    'keep words starting with a vowel',
    'drop words that begin with a consonant',
    'leave words with a vowel in front',
    'choose the words opening with a vowel',
  ),
  'consonant': (
    'keep words starting with a consonant',
    'drop words that begin with a vowel',
    'leave words with a consonant in front',
    'choose the words opening with a consonant',
  ),
  'alpha': (
    'sort alphabetically',
    'put in dictionary order',
    'order the words from a to z',
    'arrange by alphabet',
  ),
  'alpha_desc': (
    'sort in reverse alphabetical order',
    'put in backward dictionary order',
    'order the words from z to a',
    'arrange by alphabet from the end',
  ),
  'sort_len': (
    'sort by length',
    'put the shortest words first',
    'order by how long they are',
    'arrange from short to long',
  ),
  'upper': (
    'write all words in capitals',
    'make every word upper-case',
    'turn all letters into capitals',
    'capitalise the words fully',
  ),
  'upper_first': (
    'write the first word in capitals',
    'make the leading word upper-case',
    'turn the first word into capitals',
    'capitalise just the first word fully',
  ),
  'rev_each': (
    'reverse each word',
    'spell every word backwards',
    'turn the letters of each word around',
    'mirror the words one by one',
  ),
  'length': (
    'replace each word by its length',
    'take the length of each word',
    'count the letters of every word',
    'go from words to their sizes',
  ),
  'vowels': (
    'replace each word by its vowel count',
    'take the number of vowels of each word',
    'count the vowels of every word',
    'go from words to how many vowels they have',
  ),
}

# After "print " or "return ".
READOUT_PHRASES: dict[str, tuple[str, ...]] = {
  'list': ('the list', 'every item', 'what is left in order', 'the resulting items'),
  'join': (
    "the items joined with ' - '",
    "everything with ' - ' in between",
    "the list glued by ' - '",
    "one string with ' - ' between items",
  ),
  'first': ('the first item', 'the item at the front', 'the leading one', 'the head of the list'),
  'last': ('the last item', 'the item at the back', 'the final one', 'the end of the list'),
  'sum': ('the sum', 'the total', 'the numbers added up', 'what they add up to'),
  'count': (
    'how many numbers remain',
    'the number of values',
    'the size of the list',
    'how long the list is',
  ),
  'max': ('the largest number', 'the maximum', 'the biggest value', 'the highest one'),
  'min': ('the smallest number', 'the minimum', 'the least value', 'the lowest one'),
  'words': (
    'how many words remain',
    'the number of words',
    'the word count',
    'how many strings are left',
  ),
  'letters': (
    'the number of letters',
    'how many letters there are in all',
    'the combined length',
    'the letter count',
  ),
}

# Clauses that mean something only after the clause before them.
CONTEXT_PHRASES: dict[str, tuple[str, ...]] = {
  'again': (
    'do that once more',
    'repeat the last step',
    'apply that again',
    'and the same again',
  ),
  'same': (
    'do the same but with {k}',
    'the same again with {k} instead',
    'repeat that using {k}',
    'once more but with {k}',
  ),
  'opposite': (
    'then do the opposite',
    'now the other way round',
    'do the counterpart of that',
    'then the contrary step',
  ),
  'more': (
    'again with one more',
    'repeat it with the number raised by one',
    'the same with the next larger number',
    'do it again counting one higher',
  ),
}

HEADS: dict[tuple[str, str], str] = {
  ('stdin', 'ints'): 'Read a line of integers.',
  ('stdin', 'words'): 'Read a line of words.',
  ('function', 'ints'): 'Write solve(a) for a list of integers.',
  ('function', 'words'): 'Write solve(a) for a list of words.',
}
VERBS = {'stdin': 'print ', 'function': 'return '}
