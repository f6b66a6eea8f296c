"""A bucket on the loopback: what gcsfs, TensorStore and Orbax use of Cloud Storage's JSON.

    with served('lab') as bucket:
      subprocess.run(..., env=os.environ | bucket.env)   # there, gs://lab is this one

Objects are whole or not there, as in the real one: an upload that breaks off leaves nothing.
`python tests/fake_bucket.py` serves one by hand and prints its environment.
"""

import contextlib
import dataclasses
import http.server
import json
import re
import threading
import urllib.parse


@dataclasses.dataclass
class Bucket:
  name: str
  url: str = ''
  objects: dict[str, bytes] = dataclasses.field(default_factory=dict)
  generations: dict[str, int] = dataclasses.field(default_factory=dict)
  lock: threading.RLock = dataclasses.field(default_factory=threading.RLock)
  clock: int = 0
  uploads: dict[str, tuple[str, str, bytes]] = dataclasses.field(default_factory=dict)

  @property
  def env(self):
    """Settings that send a process's `gs://` here."""
    return {
      'STORAGE_EMULATOR_HOST': self.url,
      'TENSORSTORE_GCS_HTTP_URL': self.url,
      'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'none',
      'NO_GCE_CHECK': 'true',
      'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
    }

  def put(self, key, data):
    with self.lock:
      self.clock += 1
      self.objects[key], self.generations[key] = data, self.clock

  def take(self, key):
    with self.lock:
      self.generations.pop(key, None)
      return self.objects.pop(key, None)

  def about(self, key):
    return {
      'kind': 'storage#object',
      'id': f'{self.name}/{key}/{self.generations[key]}',
      'name': key,
      'bucket': self.name,
      'size': str(len(self.objects[key])),
      'generation': str(self.generations[key]),
      'metageneration': '1',
      'updated': '2026-01-01T00:00:00.000Z',
      'timeCreated': '2026-01-01T00:00:00.000Z',
      'storageClass': 'STANDARD',
    }


def _handler(bucket):
  root = rf'/storage/v1/b/{bucket.name}'

  class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True
    wbufsize = 1 << 16  # headers and body in one packet: two wait 40 ms for each other

    def log_message(self, *_):
      pass

    def do_GET(self):
      self.answer(self.get)

    def do_POST(self):
      self.answer(self.post)

    def do_PUT(self):
      self.answer(self.more)

    def do_DELETE(self):
      self.answer(self.delete)

    def answer(self, method):
      url = urllib.parse.urlsplit(self.path)
      self.query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
      self.body = self.read()
      with bucket.lock:
        status, data, headers = method(url.path)
      if not isinstance(data, bytes):
        data = json.dumps(data).encode()
        headers = {'Content-Type': 'application/json', **headers}
      self.send_response(status)
      for name, value in {**headers, 'Content-Length': str(len(data))}.items():
        self.send_header(name, value)
      self.end_headers()
      with contextlib.suppress(ConnectionError):  # a reader may leave before the end
        self.wfile.write(data)

    def read(self):
      if 'chunked' in self.headers.get('Transfer-Encoding', ''):
        parts = []
        while size := int(self.rfile.readline().split(b';')[0], 16):
          parts.append(self.rfile.read(size))
          self.rfile.readline()
        self.rfile.readline()
        return b''.join(parts)
      return self.rfile.read(int(self.headers.get('Content-Length') or 0))

    def missing(self, what):
      return 404, {'error': {'code': 404, 'message': f'no {what}'}}, {}

    def key(self, path):
      match = re.fullmatch(rf'(?:/download)?{root}/o/([^/]+)', path)
      return match and urllib.parse.unquote(match[1])

    def refused(self, key):
      """Whether the request's precondition does not hold."""
      wanted = self.query.get('ifGenerationMatch')
      return wanted is not None and int(wanted) != bucket.generations.get(key, 0)

    def get(self, path):
      if path == root:
        return 200, {'kind': 'storage#bucket', 'name': bucket.name, 'location': 'US'}, {}
      if path == f'{root}/o':
        return self.listing()
      key = self.key(path)
      if key is None or key not in bucket.objects:
        return self.missing(path)
      if self.refused(key):
        return 412, {'error': {'code': 412, 'message': 'precondition'}}, {}
      if self.query.get('alt') != 'media':
        return 200, bucket.about(key), {}
      return self.media(key)

    def media(self, key):
      data, status = bucket.objects[key], 200
      headers = {'x-goog-generation': str(bucket.generations[key])}
      headers['Content-Type'] = 'application/octet-stream'
      if (asked := self.headers.get('Range')) and data:
        start, end = re.fullmatch(r'bytes=(\d*)-(\d*)', asked).groups()
        start, end = (
          (int(start), min(int(end or len(data)), len(data) - 1))
          if start
          else (max(0, len(data) - int(end)), len(data) - 1)
        )
        if start >= len(data):
          return 416, {'error': {'code': 416, 'message': 'range'}}, {}
        headers['Content-Range'] = f'bytes {start}-{end}/{len(data)}'
        data, status = data[start : end + 1], 206
      return status, data, headers

    def listing(self):
      prefix, delimiter = self.query.get('prefix', ''), self.query.get('delimiter', '')
      start, end = self.query.get('startOffset', ''), self.query.get('endOffset')
      items, prefixes = [], set()
      for key in sorted(bucket.objects):
        if not key.startswith(prefix) or key < start or (end and key >= end):
          continue
        rest = key[len(prefix) :]
        if delimiter and delimiter in rest:
          prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
        else:
          items.append(bucket.about(key))
      page = int(self.query.get('maxResults', 1000))
      first = int(self.query.get('pageToken') or 0)
      found = {'kind': 'storage#objects', 'prefixes': sorted(prefixes) if not first else []}
      found['items'] = items[first : first + page]
      if first + page < len(items):
        found['nextPageToken'] = str(first + page)
      return 200, found, {}

    def post(self, path):
      if move := re.fullmatch(rf'{root}/o/([^/]+)/moveTo/o/([^/]+)', path):
        source, target = map(urllib.parse.unquote, move.groups())
        if source not in bucket.objects:
          return self.missing(source)
        bucket.put(target, bucket.take(source))
        return 200, bucket.about(target), {}
      if path != f'/upload{root}/o':
        return self.more(path) if path.startswith('/session/') else self.missing(path)
      kind = self.query.get('uploadType')
      if kind == 'multipart':
        boundary = re.search(r'boundary="?([^";]+)', self.headers['Content-Type'])[1].encode()
        about, media = self.body.split(b'--' + boundary)[1:3]
        key = json.loads(about.partition(b'\n\n')[2] or about.partition(b'\r\n\r\n')[2])['name']
        return self.stored(key, re.split(rb'\r?\n\r?\n', media, maxsplit=1)[1][:-1])
      key = self.query.get('name') or json.loads(self.body)['name']
      if kind == 'media':
        return self.stored(key, self.body)
      if self.refused(key):
        return 412, {'error': {'code': 412, 'message': 'precondition'}}, {}
      session = f'/session/{len(bucket.uploads)}'
      bucket.uploads[session] = (key, self.query.get('ifGenerationMatch'), b'')
      return 200, {}, {'Location': f'{bucket.url}{session}'}

    def more(self, path):
      """A piece of a resumable upload; the last one makes the object."""
      if path not in bucket.uploads:
        return self.missing(path)
      key, wanted, data = bucket.uploads[path]
      data += self.body
      bucket.uploads[path] = (key, wanted, data)
      total = self.headers.get('Content-Range', 'bytes */0').rpartition('/')[2]
      if total == '*' or len(data) < int(total):
        return 308, {}, {'Range': f'bytes=0-{len(data) - 1}'}
      if wanted is not None:
        self.query['ifGenerationMatch'] = wanted
      return self.stored(key, data)

    def stored(self, key, data):
      if self.refused(key):
        return 412, {'error': {'code': 412, 'message': 'precondition'}}, {}
      bucket.put(key, data)
      return 200, bucket.about(key), {}

    def delete(self, path):
      if path.startswith('/session/'):
        bucket.uploads.pop(path, None)
        return 204, b'', {}
      key = self.key(path)
      if key not in bucket.objects:
        return self.missing(path)
      if self.refused(key):
        return 412, {'error': {'code': 412, 'message': 'precondition'}}, {}
      bucket.take(key)
      return 204, b'', {}

  return Handler


class _Server(http.server.ThreadingHTTPServer):
  daemon_threads = True
  request_queue_size = 128

  def handle_error(self, *_):
    """A connection that was reset by a killed client."""


@contextlib.contextmanager
def served(name):
  """A bucket that answers on a free port of the loopback."""
  bucket = Bucket(name)
  server = _Server(('127.0.0.1', 0), _handler(bucket))
  bucket.url = f'http://127.0.0.1:{server.server_address[1]}'
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  try:
    yield bucket
  finally:
    server.shutdown()
    server.server_close()


if __name__ == '__main__':
  with served('lab') as by_hand:
    print(' '.join(f'{name}={value}' for name, value in by_hand.env.items()), flush=True)
    threading.Event().wait()
